"""How hypothesis looks for counterexamples in this room."""

from hypothesis import settings

# The same examples each time, however busy the machine is, and no folder for failed ones.
settings.register_profile("same", deadline=None, derandomize=True, database=None, max_examples=80)
settings.load_profile("same")
