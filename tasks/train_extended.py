"""Stage `train_extended`; see tasks/train.py."""

from tasks import train

if __name__ == "__main__":
    train.main("train_extended")
