"""Any DLPack capsule is read as what it says, or refused."""

import dataclasses
import random

import numpy as np
import pytest

from tests.fuzz import capsules, producer
from tests.fuzz.memory import Memory, Placed


def test_capsules_are_read_as_what_they_say_or_refused(campaign):
    campaign("capsules")


def test_capsules_say_what_numpy_reads():
    """NumPy's own reader agrees with the producer."""
    rng, found = random.Random(0), 0
    while found < 200:
        case = capsules.draw(rng)
        if case.fault != "none" or case.dtype == "bfloat16" or not case.takes_version:
            continue
        found += 1
        values = np.random.default_rng(case.seed).normal(size=case.fields.shape).astype(case.dtype)
        placed = Placed(values, case.memory)
        seen = np.from_dlpack(capsules.Exporter(case, placed.array))
        assert seen.dtype == values.dtype
        assert np.array_equal(seen, placed.array)
        assert seen.ctypes.data == placed.array.ctypes.data
        del seen


@pytest.mark.parametrize("fault", capsules.FAULTS)
def test_every_fault_is_drawn(fault):
    rng = random.Random(0)
    assert any(capsules.draw(rng).fault == fault for _ in range(2000))


def test_a_capsule_that_is_taken_with_a_fault_is_found():
    """What is wrong is said, and nothing is wrong."""
    rng = random.Random(0)
    case = next(c for c in iter(lambda: capsules.draw(rng), None) if c.fault == "none" and c.role == "x")
    with pytest.raises(AssertionError, match="accepted, with a fault: lanes"):
        capsules.run(dataclasses.replace(case, fault="lanes"))


def test_a_value_that_is_read_elsewhere_is_found():
    """One element behind where it is, with room for that before the guard page."""
    where = Memory((0, 1, 2), step=2)
    fields = producer.Fields(capsules.SHAPE, where.strides(capsules.SHAPE), *producer.CODES["float32"])
    case = capsules.Case("x", "float32", dataclasses.replace(where, at_end=False), fields)
    capsules.run(case)
    with pytest.raises(AssertionError, match=r"^x: "):
        capsules.run(dataclasses.replace(case, moved=4))
