"""Llama 4 in plain PyTorch: mathematics only. Where keys and values live is the business of `cache`."""
