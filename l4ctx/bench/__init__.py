"""`l4ctx bench`: this program, and others, on the same work."""
