"""Llama 4 in plain PyTorch: the mathematics only. The KV cache is in `cache`."""
