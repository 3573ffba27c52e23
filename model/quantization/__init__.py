"""Weights in their stored forms: how each is expanded, and how it is multiplied."""
