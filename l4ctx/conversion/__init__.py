"""A checkpoint folder with quantized weights, made from one with 16-bit weights."""
