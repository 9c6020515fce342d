"""Runs: everything with a command line, a device or a tracker. One verb, one module."""
