"""Predictions against masks, exact for any number of ranks."""
