"""The sample model, and the scripts that train, evaluate and benchmark it."""
