"""Whether the sample model finds what is in texts and images."""
