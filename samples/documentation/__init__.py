"""Generates the pictures in this repository's documents."""
