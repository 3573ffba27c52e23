"""A small language model that answers English questions, in the published form."""
