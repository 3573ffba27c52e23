"""The vision tower: pixels of image tiles to embeddings of the text model."""
