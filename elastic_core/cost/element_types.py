"""The element types in which the memory of a served model can be counted."""

# Bytes per element. fp4 includes one byte of scale for every 16 elements (NVFP4). fp8 and int8 have one scale per row,
# block or tensor; these are so few that they are not counted.
ELEMENT_BYTES = {"float32": 4, "bf16": 2, "fp8": 1, "int8": 1, "fp4": 0.5625}
QUANTISED = ("fp8", "int8", "fp4")
