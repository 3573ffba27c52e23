"""Reports as tables and lines for people."""
