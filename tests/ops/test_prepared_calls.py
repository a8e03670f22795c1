"""Calls whose signature is known: the same bits and the same errors as the first call, by a short way."""

import sys

import numpy as np
import pytest

import cubn
from cubn import backward, forward, forward_train
from tests.ops import arrays

MOST_FRAMES = {"forward": 12, "forward_train": 30, "backward": 25}
MOST_FILES = 6


def operations(x, state, **options):
    """Warm calls of the three operations that networks make at every step, by name."""
    y, saved = cubn.forward_train(x, state, **options)
    calls = {
        "forward": lambda: cubn.forward(x, state, **options),
        "forward_train": lambda: cubn.forward_train(x, state, **options),
        "backward": lambda: cubn.backward(y, saved),
    }
    for call in calls.values():
        call()
    return calls


def frames(call):
    """The files of all Python functions that a call enters, in order."""
    entered = []

    def note(frame, event, argument):
        if event == "call":
            entered.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered[1:]  # without the lambda


@pytest.fixture
def the_short_way(monkeypatch):
    """Fail where a call goes the full way."""

    def start():
        for module in (forward, forward_train, backward):
            pass
        monkeypatch.setattr("cubn._inputs.bind_x", refuse)
        monkeypatch.setattr(sys.modules["cubn.backward"], "Differentiation", refuse)

    def refuse(*arguments, **options):
        raise AssertionError("the full way")

    return start


@pytest.mark.parametrize("name", MOST_FRAMES)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_warm_call_enters_few_functions_in_few_files(library, name):
    x = arrays.carry(arrays.normal(np.random.default_rng(0), (8, 16, 2, 2)), library)
    entered = frames(operations(x, cubn.BatchNormState(16, like=x))[name])
    assert len(entered) <= MOST_FRAMES[name]
    assert len({file for file in entered if "cubn" in file}) <= MOST_FILES
