"""The checker of order itself: what it must find, and what it must let pass."""

import gc

import numpy as np
import pytest

from tests.cuda_on_cpu.device import CaptureError, CpuDevice
from tests.cuda_on_cpu.ordering import CpuStream, Ordering

ONE, OTHER = CpuStream("one"), CpuStream("other")


class Watched:
    """A device, and operations of nobody's on its memory."""

    def __init__(self):
        self.ordering = Ordering()
        self.device = CpuDevice(ordering=self.ordering)
        with self.device.on(ONE):
            self.array = self.device.empty((4,), "float64")

    def reads(self, stream, first=0):
        self.ordering.operation(stream, "kernel", reads=[(self.array.ctypes.data + 8 * first, "x")])

    def writes(self, stream, first=0):
        self.ordering.operation(stream, "kernel", writes=[(self.array.ctypes.data + 8 * first, "y")])

    def wait(self, stream, other):
        with self.device.on(stream):
            self.device.wait_for(other)

    def release(self):
        self.array = None
        gc.collect()


@pytest.fixture
def watched():
    return Watched()


@pytest.mark.parametrize("first", ["reads", "writes"])
@pytest.mark.parametrize("second", ["reads", "writes"])
def test_two_streams(watched, first, second):
    """But for two that read, neither order is right without a wait."""
    getattr(watched, first)(ONE)
    getattr(watched, second)(OTHER, first=2)
    assert bool(watched.ordering.faults) == ("writes" in (first, second))


def test_waits_order_what_was_there_before_them(watched):
    watched.writes(ONE)
    watched.wait(OTHER, ONE)
    watched.reads(OTHER)
    assert not watched.ordering.faults
    watched.writes(ONE)
    assert watched.ordering.faults == ["memory: kernel writes y on one, unordered with kernel reads x on other"]


def test_waits_order_by_way_of_a_third_stream(watched):
    third = CpuStream("third")
    watched.writes(ONE)
    watched.wait(third, ONE)
    watched.wait(OTHER, third)
    watched.writes(OTHER)
    assert not watched.ordering.faults


def test_what_the_host_has_waited_for_is_done(watched):
    watched.writes(ONE)
    with watched.device.on(ONE):
        watched.device.synchronize()
    watched.writes(OTHER)
    assert not watched.ordering.faults


def test_an_older_write_is_not_forgotten_for_a_newer_read(watched):
    watched.writes(ONE)
    watched.reads(ONE)
    watched.reads(OTHER)
    assert len(watched.ordering.faults) == 1


def test_memory_goes_back_to_the_stream_it_is_from(watched):
    watched.writes(ONE)
    watched.wait(OTHER, ONE)
    watched.reads(OTHER)
    watched.release()
    assert watched.ordering.faults == ["memory: released to one while kernel reads x on other"]


def test_views_keep_memory(watched):
    watched.wait(OTHER, ONE)
    watched.reads(OTHER)
    view = watched.array[2:]
    watched.release()
    assert not watched.ordering.faults
    watched.array, view = view[1:], None
    watched.release()
    assert watched.ordering.faults


def test_held_memory_is_released_when_all_is_done(watched):
    watched.reads(OTHER)
    with watched.device.on(OTHER):
        watched.device.hold(watched.array)
    watched.release()
    assert not watched.ordering.faults


@pytest.mark.parametrize("held", [True, False])
def test_staging_memory_is_nobody_elses_before_it_is_copied(watched, monkeypatch, held):
    if not held:
        monkeypatch.setattr(watched.device, "hold", lambda *memory: None)
    staging = watched.device.staging((3,), "float64")
    staging[...] = 1
    np.testing.assert_array_equal(watched.device.from_host(staging[1:]), [1, 1])
    del staging
    gc.collect()
    expected = "staging memory: released to the host while copy from the host reads array on numpy"
    assert watched.ordering.faults == ([] if held else [expected])


def test_what_a_capture_refuses(watched):
    captured = CpuStream("captured")
    captured.captured = True
    device = watched.device
    watched.writes(ONE)
    with device.on(captured):
        device.from_host(device.staging((2,), "float64"))
        device.wait_for(ONE)  # nothing
        for refused in (
            lambda: device.to_host(watched.array),
            device.synchronize,
        ):
            with pytest.raises(CaptureError, match="while captured is captured"):
                refused()
    with device.on(ONE), pytest.raises(CaptureError, match="taken into the capture"):
        device.wait_for(captured)
