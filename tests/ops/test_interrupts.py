"""What a signal handler raises: at any moment, with any number of threads, it leaves nothing half done and nobody
writing into memory that is free.
"""

import itertools
import signal
import subprocess
import sys

import numpy as np
import pytest

import cubn
from cubn._kept import Kept
from cubn.backends.cpu import pool, prepare, stages
from cubn.backends.cpu.backend import CpuBackend
from cubn.backends.cpu.calls import PreparedTrain
from cubn.backends.cpu.launch import Launch

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


needs_timers = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers on this platform")


def run(program, *arguments):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_timers
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_a_raising_signal_handler_leaves_nobody_writing(threads):
    run(PROGRAM, threads, 100)


@needs_timers
def test_a_signal_handler_may_compute():
    """In the midst of any call, with the threads of that call."""
    run("""
import signal
import numpy as np
import cubn

cubn.set_num_threads(2)
rng = np.random.default_rng(0)
x, other = (rng.standard_normal((16, 24, 50, 50), dtype=np.float32) for _ in range(2))
state = cubn.BatchNormState(24)
expected = [cubn.forward(a, state) for a in (x, other)]
right = []

def compute(*_):
    right.append(np.array_equal(cubn.forward(other, state), expected[1]))
    signal.setitimer(signal.ITIMER_REAL, 5e-3 * (len(right) < 50))  # not before: a slow machine would never be through

signal.signal(signal.SIGALRM, compute)
signal.setitimer(signal.ITIMER_REAL, 1e-3)
while len(right) < 50:
    assert np.array_equal(cubn.forward(x, state), expected[0])
assert all(right)
""")


# --- between any two bytecodes ----------------------------------------------------------------------------------------


class Stop(BaseException):
    pass


TRACED = {sys.modules[part.__module__].__file__ for part in (CpuBackend, PreparedTrain, pool.Pool, Launch, Kept)}


def stopped_before(bytecode, work):
    """Whether the CPU backend came to this bytecode of its own, and was stopped there."""
    left = bytecode

    def each(frame, event, _):
        nonlocal left
        if event == "opcode":
            left -= 1
            if left == 0:
                raise Stop
        return each

    def trace(frame, *_):
        frame.f_trace_opcodes = frame.f_code.co_filename in TRACED
        return each if frame.f_trace_opcodes else None

    tracing = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except Stop:
        return True
    finally:
        sys.settrace(tracing)
    return False


@pytest.mark.parametrize("planned", [True, False], ids=["planned", "anew"])
def test_a_training_step_is_done_or_not(planned):
    """Mean, variance and counters of all channels, wherever an exception is raised; and the next step is right."""
    cubn.set_num_threads(3)
    x = np.random.default_rng(0).standard_normal((16, 8, 64, 64), dtype=np.float32)

    def train():
        cubn.forward_train(x, state, relu=True)
        return state.to_dict()

    def forget():
        for function in () if planned else (prepare.train, stages.layout_of):
            function.cache_clear()

    state = cubn.BatchNormState(8)
    before, after = state.to_dict(), train()
    for bytecode in itertools.count(1):
        state = cubn.BatchNormState(8)
        forget()
        stopped = stopped_before(bytecode, train)
        found = state.to_dict()
        assert any(all(map(np.array_equal, found.values(), those.values())) for those in (before, after))
        state = cubn.BatchNormState(8)
        assert all(map(np.array_equal, train().values(), after.values()))
        if not stopped:
            break
    assert bytecode > 100, "the backend was watched"
