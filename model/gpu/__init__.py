"""Kernels of our own for GPUs, written in Triton, and decoding by CUDA graphs."""
