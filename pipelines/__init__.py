"""Runs: everything with a command line, a device or a tracker. One verb, one module."""

import os

IMPORTED_BY = os.getpid(), os.getppid()
"""This process and its parent, recorded before torch is imported, which takes seconds."""
