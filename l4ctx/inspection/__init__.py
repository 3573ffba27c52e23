"""What a folder holds, and what is damaged in it."""
