"""Asks questions over documents of millions of tokens with Llama 4."""
