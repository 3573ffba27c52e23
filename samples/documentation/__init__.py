"""What the documents of this repository show is made here."""
