"""A plugin of pytest that prints an object for each test, as JSON, a line each: see tests.gpu.steps."""

import json
import os

REASON = 600  # characters


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        found = {"test": report.nodeid, "outcome": report.outcome, "took": round(report.duration, 2)}
        if report.outcome != "passed":
            reason = report.longrepr
            found["reason"] = (reason[2] if isinstance(reason, tuple) else str(reason))[-REASON:]
        os.write(1, ("\n" + json.dumps(found) + "\n").encode())
