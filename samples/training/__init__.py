"""How the sample model was made."""
