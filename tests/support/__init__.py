"""Toys, oracles and runners shared by several test files."""
