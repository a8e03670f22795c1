"""How many threads an operation may use: what the environment variable may say."""

import os
import subprocess
import sys

import pytest

import cubn
from cubn.backends import threads


def number(monkeypatch, setting):
    """What is found where nobody has set a number."""
    monkeypatch.setattr(threads, "_limit", None)
    monkeypatch.setenv("CUBN_NUM_THREADS", setting)
    return cubn.get_num_threads()


@pytest.mark.parametrize("setting", ["", " ", "auto"])
def test_blank_or_auto_means_the_cores(monkeypatch, setting):
    assert number(monkeypatch, setting) == threads.cores()


def test_a_number_is_taken(monkeypatch):
    assert number(monkeypatch, "3") == number(monkeypatch, " 3 ") == 3


@pytest.mark.parametrize("setting", ["0", "-1", "two", "4.0", "1e3", "4,2", "²", "٣", "AUTO!"])
def test_what_is_no_number_of_threads_is_refused(monkeypatch, setting):
    with pytest.raises(ValueError, match=r"cubn: CUBN_NUM_THREADS must .*; got .*Unset it"):
        number(monkeypatch, setting)


def test_a_number_set_by_the_program_stands_above_the_variable(monkeypatch):
    with pytest.raises(ValueError, match="CUBN_NUM_THREADS"):
        number(monkeypatch, "two")
    monkeypatch.setattr(threads, "_limit", None)  # put back afterwards
    cubn.set_num_threads(2)
    assert cubn.get_num_threads() == 2


def test_info_says_what_is_wrong_with_it():
    """Which is where somebody looks whose operations are refused."""
    command = [sys.executable, "-m", "cubn", "info"]
    environment = os.environ | {"CUBN_NUM_THREADS": "two"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "CUBN_NUM_THREADS must be a whole number" in done.stdout
