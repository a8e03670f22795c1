"""Programs in processes of their own: whose threads compute is chosen once in a process."""

import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest

CHOICES = {
    "own": {"CUBN_THREADING": "own", "LIBRARY": "torch"},
    "openmp": {"CUBN_THREADING": "openmp", "LIBRARY": "torch"},
    "auto": {"CUBN_THREADING": "auto", "LIBRARY": "torch"},
    "alone": {"CUBN_THREADING": "auto", "LIBRARY": "numpy"},
}
"""Environments of a program: what is asked for, and which library is imported before."""

every_choice = pytest.mark.parametrize("choice", CHOICES)
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")

PRELUDE = """
import ctypes, importlib, os, signal, sys, threading, time

torch = importlib.import_module(os.environ.get("LIBRARY", "torch"))
import numpy as np
import cubn
from cubn.backends.cpu import pool, words

pool = pool._pool
rng = np.random.default_rng(0)
x, dy = (rng.standard_normal((16, 8, 64, 64), dtype=np.float32) for _ in range(2))

def train():
    state = cubn.BatchNormState(8)
    y, saved = cubn.forward_train(x, state, relu=True)
    return [y, *cubn.backward(dy, saved)[:3], state.running_var]

def same(found, wanted=None):
    return all(map(np.array_equal, found, wanted or expected))

def word(address):
    return ctypes.c_int64.from_address(address).value

def region_words():
    "What runs a parallel region of the runtime, if native code is to enter any."
    runtime = word(pool._address + words.RUNTIME)
    return runtime and word(runtime + words.PARALLEL)

def tasks():
    "Threads of this process, Python's and others."
    return len(os.listdir("/proc/self/task"))

def at_once(threads, function):
    "function() in so many threads, all there at the same time; what they returned."
    together, found = threading.Barrier(threads), []

    def work():
        together.wait()
        found.append(function())
        together.wait()

    started = [threading.Thread(target=work) for _ in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return found

def in_child(check):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # a child that hangs
        ok = False
        try:
            ok = check()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

cubn.set_num_threads(1)
expected = train()
THREADS = 3
cubn.set_num_threads(THREADS)
if torch is not np:
    torch.set_num_threads(THREADS)  # of its own, it takes no more than there are cores; it starts some other threads
before = tasks() if sys.platform == "linux" else 0
"""


def run(program, **environment):
    """Run a program behind the prelude, which must end well and in time; what it printed."""
    if environment.get("LIBRARY", "torch") == "torch":
        pytest.importorskip("torch")
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PRELUDE + textwrap.dedent(program)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "CUBN_NUM", "KMP_"))}
    few = {
        "OMP_NUM_THREADS": "3",
        "GOMP_SPINCOUNT": "0",
    }  # more than cores, perhaps; which spin would hold each other up
    environment = {name: value for name, value in (clean | few | environment).items() if value is not None}
    done = subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout
