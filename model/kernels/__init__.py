"""Attention: masks, merging of partial results by log-sum-exp, and the backends."""
