"""The process that runs cases reports what fails, crashes or hangs, and how to see it again."""

import pytest

from tests.fuzz import harness


@pytest.mark.parametrize(
    ("fault", "how"),
    [("fails", "failed"), ("crashes", r"ended the process with status -\d+"), ("hangs", "hung for 2 s")],
)
def test_a_case_that(fault, how):
    with pytest.raises(harness.Failed, match=rf"(?s)planted: case \d+ of seed 1 {how}") as caught:
        harness.campaign("planted", 1, cases=20, environment={"CUBN_PLANTED": fault}, patience=2)
    text = str(caught.value)
    number = int(text.split("case ")[1].split()[0])
    assert f"Case(fault=True, number={harness.case_of(harness.part_named('planted'), 1, number).number})" in text
    assert f"Again: CUBN_PLANTED={fault} python -m tests.fuzz planted --seed 1 --case {number}\n" in text
    with pytest.raises(harness.Failed, match=how):
        harness.campaign("planted", 1, cases=1, first=number, environment={"CUBN_PLANTED": fault}, patience=2)


def test_a_case_that_fails_is_made_simpler():
    with pytest.raises(harness.Failed, match=r"Simpler, and fails too: Case\(fault=True, number=0\)"):
        harness.campaign("planted", 1, cases=20, environment={"CUBN_PLANTED": "fails"})


def test_cases_that_are_well():
    said = harness.campaign("planted", 1, cases=20)
    assert said.startswith("planted: 20 cases in ")


def test_a_campaign_ends_in_time():
    said = harness.campaign("planted", 1, 0.2)
    assert said.startswith("planted: ")
