"""How many threads an operation may use: what the environment variable may say."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

import cubn
from cubn.backends import threads
from cubn.backends.cpu.whose_threads import ACTIVE, SPINNING, spinning


def number(monkeypatch, setting):
    """What is found where nobody has set a number."""
    monkeypatch.setattr(threads, "limit", None)
    monkeypatch.setenv("CUBN_NUM_THREADS", setting)
    return cubn.get_num_threads()


@pytest.mark.parametrize("setting", ["", " ", "auto"])
def test_blank_or_auto_means_the_cores(monkeypatch, setting):
    assert number(monkeypatch, setting) == threads.cores()


def test_a_number_is_taken(monkeypatch):
    assert number(monkeypatch, "3") == number(monkeypatch, " 3 ") == 3


@pytest.mark.parametrize("setting", ["0", "-1", "two", "4.0", "1e3", "4,2", "²", "٣", "AUTO!", "4194305", "9" * 5000])
def test_what_is_no_number_of_threads_is_refused(monkeypatch, setting):
    with pytest.raises(ValueError, match=r"cubn: CUBN_NUM_THREADS must .*; got .*Unset it"):
        number(monkeypatch, setting)


def test_a_number_set_by_the_program_stands_above_the_variable(monkeypatch):
    with pytest.raises(ValueError, match="CUBN_NUM_THREADS"):
        number(monkeypatch, "two")
    monkeypatch.setattr(threads, "limit", None)  # put back afterwards
    cubn.set_num_threads(2)
    assert cubn.get_num_threads() == 2


@pytest.mark.parametrize("n", [2, np.int8(2), np.uint64(2), np.array(2)])
def test_an_integer_of_any_library_is_a_number_of_threads(monkeypatch, n):
    monkeypatch.setattr(threads, "limit", None)
    cubn.set_num_threads(n)
    assert type(cubn.get_num_threads()) is int
    assert cubn.get_num_threads() == 2


@pytest.mark.parametrize(
    ("n", "error", "text"),
    [
        (True, TypeError, "be an int; got bool. Pass 1"),
        (2.0, TypeError, "be an int; got float. Pass 1"),
        (np.float32(2), TypeError, "be an int; got float32. Pass 1"),
        (np.array([1, 2]), TypeError, "be an int; got ndarray. Pass 1"),
        (None, TypeError, "be an int; got NoneType. Pass 1"),
        (0, ValueError, "be at least 1; got 0. Pass 1"),
        (np.int8(-1), ValueError, "be at least 1; got -1. Pass 1"),
        (2**22 + 1, ValueError, "be at most 2**22; got more."),
        (2**64, ValueError, "be at most 2**22; got more."),
        pytest.param(10**5000, ValueError, "be at most 2**22; got more.", id="huge"),
        pytest.param(-(10**5000), ValueError, "be at least 1; got less. Pass 1", id="huge below"),
    ],
)
def test_what_cannot_be_set_is_refused_and_changes_nothing(monkeypatch, n, error, text):
    monkeypatch.setattr(threads, "limit", 3)
    with pytest.raises(error, match="^" + re.escape(f"set_num_threads: n must {text}")):
        cubn.set_num_threads(n)
    assert cubn.get_num_threads() == 3


def test_info_says_what_is_wrong_with_it():
    """Which is where somebody looks whose operations are refused."""
    command = [sys.executable, "-m", "cubn", "info"]
    environment = os.environ | {"CUBN_NUM_THREADS": "two"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "CUBN_NUM_THREADS must be a whole number" in done.stdout


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("3", 3), (" 4,2", 4), ("", None), ("0", None), ("-2", None), ("two", None), (",2", None), ("4194305", None)],
)
@pytest.mark.parametrize("own", ["", "auto"])
def test_openmps_variable_holds_where_cubns_leaves_the_choice(monkeypatch, own, setting, expected):
    """Its first level; where it is no number, as if it were not there."""
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    assert number(monkeypatch, own) == (expected or threads.cores())


def test_cubns_variable_stands_above_openmps(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert number(monkeypatch, "3") == 3


@pytest.mark.parametrize(
    ("policy", "seconds"),
    [("passive", 0), ("Passive ", 0), ("ACTIVE", ACTIVE), ("", SPINNING), ("nonsense", SPINNING)],
)
def test_workers_wait_as_openmps_threads_are_told_to(monkeypatch, policy, seconds):
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    assert spinning() == seconds
