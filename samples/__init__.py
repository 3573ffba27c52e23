"""The sample model, how it was made, and what it is measured by."""
