"""Plugin of pytest: appends the outcome of every test to the file $OUTCOMES as soon as it ends.

One JSON object per line: `test` (its ID), `outcome` (passed, failed or skipped) and `properties`
(those of record_property).
"""

import json
import os
from pathlib import Path

import pytest

VARIABLE = "OUTCOMES"


@pytest.hookimpl
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append the outcome: that of the call, or of a setup or teardown that did not pass."""
    if report.when != "call" and report.passed:
        return
    plain = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "properties": dict(report.user_properties),
    }
    with Path(os.environ[VARIABLE]).open("a") as file:
        file.write(json.dumps(plain, default=str) + "\n")
