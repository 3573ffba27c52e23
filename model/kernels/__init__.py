"""Attention: masks, the merging of partial results, and the backends that compute them."""
