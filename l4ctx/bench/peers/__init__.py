"""Other engines on the same work, and the files that they read."""
