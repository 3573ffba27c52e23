"""How fast it reads and what memory it takes."""
