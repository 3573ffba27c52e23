"""What the program remembers from run to run, in a folder that only its user can read: answers, contexts, models."""
