"""From images to tiles, tokens, and features spliced into the prompt's embeddings."""
