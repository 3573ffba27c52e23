"""Vector code for this processor, made by LLVM (package llvmlite): weights in their stored forms times a few rows."""
