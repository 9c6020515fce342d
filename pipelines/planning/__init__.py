"""Choosing the settings of a run: facts of the data, a timed trial, settings with reasons."""
