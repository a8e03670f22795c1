"""Compiling: announced when it takes long, interrupted, by several threads at once, and ahead of the first use."""

import ctypes
import itertools
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from cubn.backends.cpu import compile, language
from cubn.backends.cpu.simd import put


def build(number):
    def kernel(parameters, worker):
        put(parameters, worker + number)

    return kernel


def answer(number):
    found = ctypes.c_int64()
    compile.compiled(f"answer-{number}", lambda: build(number)).call(ctypes.addressof(found), 0)
    return found.value


@pytest.fixture(autouse=True)
def uncached(monkeypatch):
    monkeypatch.setenv("CUBN_CACHE_DIR", "")


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    """As in a process that has not compiled yet."""
    monkeypatch.setattr(compile, "_stopwatch", compile._Stopwatch())
    monkeypatch.setattr(compile, "_kernels", {})


@pytest.mark.parametrize(("patience", "lines"), [(0.0, 1), (1e9, 0)])
def test_what_takes_long_is_announced_once_and_without_a_thread(patience, lines, monkeypatch, caplog):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(compile, "PATIENCE", patience)
    with caplog.at_level(logging.INFO, "cubn"):
        assert [answer(i) for i in range(3)] == [0, 1, 2]
    assert caplog.messages == ["cubn: compiling kernels for this CPU, about 1 s, once"] * lines


def test_the_time_of_all_kernels_counts(monkeypatch, caplog):
    ticks = itertools.count(0, 3)
    clock = SimpleNamespace(monotonic=lambda: next(ticks) / 100)  # looked at three times a kernel
    monkeypatch.setattr(compile, "time", clock)
    with caplog.at_level(logging.INFO, "cubn"):
        said = []
        for i in range(20):
            answer(i)
            said.append(len(caplog.messages))
    assert said == [0] * 15 + [1] * 5  # 15 kernels of 0.06 s before, 0.03 s of translation and four times that


def test_a_kernel_that_cannot_be_translated_leaves_the_next_ones_alone():
    def unknown(parameters, worker):
        put(parameters, worker**2)

    with pytest.raises(language.NotInTheLanguage, match=r"worker \*\* 2"):
        compile.compiled("unknown", lambda: unknown)
    assert answer(7) == 7


def test_threads_that_compile_at_once():
    """Each kernel once, though there is no cache."""
    start, before = threading.Barrier(8), len(compile.compiled_here)

    def one(i):
        start.wait()
        return answer(i % 3)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(8))) == [i % 3 for i in range(8)]
    assert sorted(compile.compiled_here[before:]) == ["answer-0", "answer-1", "answer-2"]


def run(program, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no interval timers on this platform")
def test_an_interrupt_while_compiling_leaves_a_usable_process():
    program = """
        import random, signal
        import numpy as np
        import cubn

        x = np.arange(48, dtype=np.float32).reshape(4, 3, 4)
        state = cubn.BatchNormState(3)
        random.seed(0)
        interrupted = 0
        for i in range(60):
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.001, 0.05))
            try:
                try:
                    cubn.moments(x)
                    cubn.forward(x, state)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                break
            except KeyboardInterrupt:
                interrupted += 1
        assert interrupted > 1, interrupted
        y, saved = cubn.forward_train(x, state)
        assert abs(y.mean()) < 1e-6
        assert (cubn.moments(x).mean == x.mean(axis=(0, 2), dtype=float)).all()
    """
    handler = "import signal; signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
    done = run(handler + textwrap.dedent(program))
    assert done.returncode == 0, done.stderr


# --- ahead of the first use -----------------------------------------------------------------------------------------

LARGER = """
import numpy as np
import cubn
from cubn.backends.cpu.compile import compiled_here

cubn.set_num_threads(3)
for shape, axis in (((8, 32, 40, 40), 1), ((7, 5, 50, 50), 1), ((64, 48, 9, 9), 1), ((16, 20, 20, 96), -1),
                    ((5, 20, 20, 130), -1), ((3000, 100), 1), ((3000, 1000), 1), ((3000, 5), 1)):
    x = np.ones(shape, np.float32)
    state = cubn.BatchNormState(shape[axis], channel_axis=axis)
    y, saved = cubn.forward_train(x, state, residual=x, relu=True)
    cubn.backward(x, saved)
    cubn.forward(x, state, residual=x, relu=True)
    cubn.update(state, cubn.moments(x, channel_axis=axis))
print(compiled_here)
"""


def test_after_a_warm_up_nothing_is_left_to_compile(tmp_path):
    def warm_up():
        command = [sys.executable, "-m", "cubn", "warm-up", "--fused", "residual-relu"]
        environment = os.environ | {"CUBN_CACHE_DIR": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    first = warm_up()
    assert first.returncode == 0, first.stderr
    assert "compiling" in first.stderr
    done = run(LARGER, CUBN_CACHE_DIR=str(tmp_path))
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
    again = warm_up()
    assert (again.returncode, again.stdout[:19]) == (0, "Compiled 0 kernels ")


@pytest.mark.skipif(os.name != "posix", reason="sends a signal to a group of processes, as a terminal does")
@pytest.mark.parametrize("at_work", [True, False], ids=["compiling", "starting"])
def test_ctrl_c_ends_a_warm_up_without_a_traceback(at_work, tmp_path):
    command = [sys.executable, "-m", "cubn", "warm-up", "--processes", "2"]
    environment = os.environ | {"CUBN_CACHE_DIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as begun:
        begun.stderr.read(1)  # the other processes have been started
        while at_work and not [*tmp_path.rglob("*.o")]:
            time.sleep(0.01)
        os.killpg(begun.pid, signal.SIGINT)
        said = begun.stderr.read()
        kept = {path.name for path in tmp_path.rglob("*.o")}
    assert begun.returncode == 130
    assert "Traceback" not in said and "Error" not in said
    assert len(kept) < 20, "what was being compiled, and nothing after it"


def test_a_warm_up_that_keeps_nothing_fails():
    program = """
        import sys
        from cubn.__main__ import main
        sys.modules["tqdm"] = None

        if __name__ == "__main__":
            sys.exit(main(["warm-up", "--layouts", "2d", "--fused", "plain", "--operations", "moments"]))
    """
    done = run(program, CUBN_CACHE_DIR="")
    assert done.returncode == 1
    assert done.stdout.startswith("Compiled ")
    lines = done.stderr.splitlines()
    assert lines[:3] == [f"compiling: {i} of 3" for i in (1, 2, 3)]
    assert lines[3].endswith("could not be kept: see the kernel cache in `python -m cubn info`.") and len(lines) == 4
