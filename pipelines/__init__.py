"""Runs: everything with a command line, a device or a tracker. One verb, one module."""

import os

# Read when torch is loaded. Threads that wait for each other would else do so in a loop, on the
# cores that decode and encode beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
