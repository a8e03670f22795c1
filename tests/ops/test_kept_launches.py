"""Memory that calls leave behind: launches, plans and position tables are kept, but not without end."""

import tracemalloc

import numpy as np
import pytest

import cubn
from cubn._kept import Kept
from cubn.backends.cpu import launch, plan, prepare, stages

ROOM = 1 << 18
KEPT = [f for module in (launch, plan, prepare) for f in vars(module).values() if isinstance(f, Kept)]


@pytest.fixture
def little_room(monkeypatch):
    """So that a few calls fill it."""
    for function in KEPT:
        function.cache_clear()
        monkeypatch.setattr(function, "_most", ROOM)
    yield
    for function in KEPT:
        function.cache_clear()


def train(x, state):
    _, saved = cubn.forward_train(x, state, relu=True)
    cubn.backward(x, saved)


def growth(calls):
    """Bytes that are held after all calls, and were not after the first ones."""
    tracemalloc.start()
    try:
        for i, call in enumerate(calls):
            if i == 3:
                before, _ = tracemalloc.get_traced_memory()
            call()
        after, _ = tracemalloc.get_traced_memory()
        return after - before
    finally:
        tracemalloc.stop()


def held():
    """Bytes, as they are counted."""
    return sum(f.nbytes for f in KEPT)


def test_every_launch_is_kept_by_bytes():
    assert {f.__name__ for f in KEPT} >= {"forward", "train", "backward", "moments", "root", "update", "_positions"}
    by_entries = {f.__name__ for f in vars(stages).values() if hasattr(f, "cache_info")}
    assert by_entries == {"layout_of", "reading_of", "kernel"}


def test_thousands_of_shapes_do_not_fill_the_memory(little_room):
    state = cubn.BatchNormState(3)
    xs = np.zeros((3000, 3), np.float32)
    for n in range(2, 3000):
        train(xs[:n], state)
        assert n % 500 or all(0 <= f.nbytes <= ROOM for f in KEPT)
    assert prepare.train.nbytes > ROOM / 2


def test_launches_over_very_many_samples(little_room):
    """Few, but with a row of the plan for every 256 samples."""
    state = cubn.BatchNormState(1)
    xs = np.zeros((1 << 17, 1), np.float32)
    assert growth([lambda n=n: train(xs[:-n], state) for n in range(1, 60)]) < len(KEPT) * ROOM


def test_launches_of_strided_arrays(little_room):
    """Whose positions are in tables."""
    state = cubn.BatchNormState(2)
    xs = np.zeros((1, 2, 100, 200), np.float32)
    assert growth([lambda n=n: train(xs[..., :n, ::2], state) for n in range(40, 100)]) < len(KEPT) * ROOM


def test_what_is_counted_is_what_is_held(little_room):
    state = cubn.BatchNormState(3)
    xs = np.zeros((1000, 3), np.float32)
    assert 0 < growth([lambda n=n: train(xs[:n], state) for n in range(2, 40)]) < 1.2 * held()
