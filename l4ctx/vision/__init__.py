"""Images to tiles, to tokens, to features among a prompt's embeddings."""
