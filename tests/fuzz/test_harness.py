"""The process that runs cases reports what fails, crashes or hangs, and how to see it again."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.fuzz import harness


@pytest.mark.parametrize(
    ("fault", "how"),
    [("fails", "failed"), ("crashes", r"ended the process with status -\d+"), ("hangs", "hung for 0.5 s")],
)
def test_a_case_that_ends_badly_is_reported_with_how_to_run_it_again(fault, how):
    with pytest.raises(harness.Failed, match=rf"(?s)planted: case \d+ of seed 1 {how}") as caught:
        harness.campaign("planted", 1, cases=20, environment={"CUBN_PLANTED": fault}, patience=0.5)
    text = str(caught.value)
    number = int(text.split("case ")[1].split()[0])
    assert f"Case(fault=True, number={harness.case_of(harness.part_named('planted'), 1, number).number})" in text
    assert text.endswith(f"\nAgain: CUBN_PLANTED={fault} python -m tests.fuzz planted --seed 1 --case {number}\n")
    with pytest.raises(harness.Failed, match=how):
        harness.campaign("planted", 1, cases=1, first=number, environment={"CUBN_PLANTED": fault}, patience=0.5)


def test_a_case_that_fails_is_made_simpler():
    with pytest.raises(harness.Failed, match=r"Simpler, and fails too: Case\(fault=True, number=0\)"):
        harness.campaign("planted", 1, cases=20, environment={"CUBN_PLANTED": "fails"})


def test_a_case_that_fails_after_others_alone():
    with pytest.raises(harness.Failed, match=r"case 7 of seed 1 failed:") as caught:
        harness.campaign("planted", 1, cases=20, first=3, environment={"CUBN_PLANTED": "fails after four"})
    command = "CUBN_PLANTED='fails after four' python -m tests.fuzz planted --seed 1 --first 3 --cases 5"
    assert str(caught.value).endswith(f"\nAgain (not without the cases before it): {command}\n")


@pytest.mark.skipif(sys.platform != "linux", reason="a signal at a parent's death is Linux's")
def test_a_process_ends_with_the_test_that_started_it():
    """Although its case would go on for ten minutes."""
    program = """
import os, subprocess, sys
command = [sys.executable, "-m", "tests.fuzz", "planted", "--seed", "1", "--journal", sys.argv[1]]
print(subprocess.Popen(command).pid, flush=True)
while not open(sys.argv[1]).read(1):
    pass
os.kill(os.getpid(), 9)
"""
    with tempfile.NamedTemporaryFile() as journal:
        environment = {**os.environ, "CUBN_PLANTED": "hangs"}
        command = [sys.executable, "-c", program, journal.name]
        done = subprocess.run(command, cwd=harness.ROOT, env=environment, stdout=subprocess.PIPE, timeout=120)
    end = time.monotonic() + 60
    while alive(int(done.stdout)):
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid):
    """Not ended, nor a zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_cases_that_are_well():
    said = harness.campaign("planted", 1, cases=20)
    assert said.startswith("planted: 20 cases in ")


def test_a_campaign_ends_in_time():
    said = harness.campaign("planted", 1, 0.2)
    assert said.startswith("planted: ")
