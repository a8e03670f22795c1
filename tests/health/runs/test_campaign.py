"""The committed campaign keeps what is promised, is of today's faults and rules, and is what the document shows."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

from cubn.health.rules import RULES
from tests.health.runs.campaign import RESULT, table
from tests.health.runs.faults import FAULTS

CAMPAIGN = json.loads(RESULT.read_text())
DOCUMENT = (Path(__file__).parents[3] / "docs" / "health.md").read_text()


def counted(severity):
    """Findings of healthy runs."""
    healthy = CAMPAIGN["healthy"]
    counts = [*healthy["alone"].items(), *healthy["with moments"].items()]
    return sum(times for what, times in counts if what.startswith(severity))


def test_a_hundred_healthy_runs_gave_no_error_and_at_most_two_warnings():
    assert sum(CAMPAIGN["healthy"]["networks"].values()) == 100
    assert counted("error") == 0 and counted("warning") <= 2


def test_every_fault_was_found_and_nothing_else_blamed():
    assert [fault.name for fault in FAULTS] == [*CAMPAIGN["faults"]] and len(FAULTS) >= 30
    for name, verdict in CAMPAIGN["faults"].items():
        assert verdict["rules"] and not verdict["missed"] and not verdict["blamed"], name


def test_every_rule_named_a_fault():
    assert {rule for verdict in CAMPAIGN["faults"].values() for rule in verdict["rules"]} == {*RULES}


def test_the_document_shows_it():
    first, last = CAMPAIGN["healthy"]["seeds"]
    assert table(CAMPAIGN) in DOCUMENT
    assert re.search(rf"\b{first} to {last - 1}\b", DOCUMENT)
