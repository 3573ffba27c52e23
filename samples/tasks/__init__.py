"""The tasks that the sample model is trained and evaluated on."""
