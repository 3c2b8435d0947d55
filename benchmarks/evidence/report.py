"""x"""
def write(*a):
    return ""
