"""GGUF, the file format of llama.cpp: headers, names, and what they say of configuration and tokenizer."""
