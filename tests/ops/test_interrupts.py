"""What a signal handler raises: at any moment, with any number of threads, it leaves nothing half done and nobody
writing into memory that is free.
"""

import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers on this platform")

PROGRAM = """
import random, signal, sys, time
import numpy as np
import cubn

threads, rounds = map(int, sys.argv[1:])
cubn.set_num_threads(threads)
random.seed(threads)

class Stop(BaseException):
    pass

def stop(*_):
    raise Stop

def train(state):
    y, saved = cubn.forward_train(x, state, residual=dy, relu=True)
    return [y, *cubn.backward(dy, saved)[:3]]

def guards():
    return [np.full(x.shape, 7, np.float32) for _ in range(4)]

def interrupted(work, within):
    '''One Stop, at a random moment of the work or soon after it.'''
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-6 + random.random() * within)
        work()
        while True:
            time.sleep(0.01)
    except Stop:
        pass

rng = np.random.default_rng(0)
x, dy = (rng.standard_normal((16, 24, 50, 50), dtype=np.float32) for _ in range(2))
state = cubn.BatchNormState(24)
expected = train(state)
start = time.perf_counter()
for _ in range(20):
    train(state)
once = (time.perf_counter() - start) / 20
signal.signal(signal.SIGALRM, stop)
for _ in range(rounds):
    before = guards()
    interrupted(lambda: train(state), 1.2 * once)
    after = guards()  # in memory that the interrupted call has left
    time.sleep(1e-3)
    assert all((memory == 7).all() for memory in before + after), "somebody wrote into memory of others"
    tracked = set(state.tracked)
    assert len(tracked) == 1, "some channels of a batch were counted, others not"
assert not state.skipped.any()
assert all(np.array_equal(a, b) for a, b in zip(train(state), expected, strict=True))
"""


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_a_raising_signal_handler_leaves_nobody_writing(threads):
    command = [sys.executable, "-c", PROGRAM, str(threads), "100"]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
