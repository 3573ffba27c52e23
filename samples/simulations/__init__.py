"""Simulations of machines that are not here."""
