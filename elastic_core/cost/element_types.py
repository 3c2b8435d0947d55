"""Element types that a served model can be counted in."""

# Bytes per element. fp4 has a scale of one byte for every 16 elements (NVFP4); the scales of fp8 and int8, one for a
# row, a block or a tensor, are too few to count.
ELEMENT_BYTES = {"float32": 4, "bf16": 2, "fp8": 1, "int8": 1, "fp4": 0.5625}
QUANTISED = ("fp8", "int8", "fp4")
