"""Settings of hypothesis for these tests."""

from hypothesis import settings

# Deterministic examples, no deadline on a busy machine, no folder for failed examples.
settings.register_profile("same", deadline=None, derandomize=True, database=None, max_examples=80)
settings.load_profile("same")
