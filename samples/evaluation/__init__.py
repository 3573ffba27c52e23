"""Measures how well the sample model finds facts in texts and images."""
