"""Checkpoint files to a model built on the meta device."""
