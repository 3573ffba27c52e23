"""Building the prompt: documents and a question to token ids, with the span of each document and image."""
