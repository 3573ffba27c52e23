"""Markdown shown on a terminal while it is generated."""
