"""What a run will need, what would help, and how long it takes. Imports no torch but to measure."""
