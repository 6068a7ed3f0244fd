from __future__ import annotations

from hypothesis import settings

# The same examples in every run: a failure is a bug of the change at hand, and never of the day.
settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("repeatable")
