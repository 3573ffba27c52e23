"""What a run will need, what would help, and how long it takes."""
