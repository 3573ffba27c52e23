"""Saved contexts: what a model has read, kept in a folder; one writer, many readers."""
