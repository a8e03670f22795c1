"""An exception out of a signal handler leaves nobody writing, and no state moved in part."""

import random
import threading
import time

import numpy as np
import pytest

from tests.fuzz import signals


def test_a_signal_leaves_nobody_writing_and_nothing_half_done(campaign):
    campaign("signals")


def test_a_late_write_is_found():
    y = np.zeros(10_000, np.float32)

    def late():
        time.sleep(3e-4)
        y[::100] = 1

    for _ in range(20):
        thread = threading.Thread(target=late)
        thread.start()
        try:
            signals.check_nobody_writes([y])
        except AssertionError:
            return
        finally:
            thread.join()
    pytest.fail("not found")


def test_a_case_interrupts_calls(monkeypatch):
    """Were every signal to come too late, the campaign would show nothing."""
    seen = []
    honest = signals.interrupted
    monkeypatch.setattr(signals, "interrupted", lambda *arguments: seen.append(honest(*arguments)) or seen[-1])
    rng = random.Random(0)
    with np.errstate(all="ignore"):
        for _ in range(3):
            signals.run(signals.draw(rng))
    assert sum(seen) > 5


def test_a_worker_that_goes_on_after_an_interrupt_is_found(monkeypatch):
    class Late(signals.Step):
        def call(self):
            try:
                super().call()
            except signals.Interrupted:
                threading.Thread(target=self.write_late).start()
                raise

        def write_late(self):
            time.sleep(3e-4)
            self.y[...] = 1

    monkeypatch.setattr(signals, "Step", Late)
    case = signals.Case("train", (4, 7, 3000), "nchw", 2, (1e-4,) * 30)
    with pytest.raises(AssertionError, match="written to after the call had ended"):
        signals.run(case)
