"""What the sample model is trained for, and asked."""
