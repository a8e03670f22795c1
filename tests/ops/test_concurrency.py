"""Threads and forks: the same bits, no lost update, no hang."""

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import cubn
from tests.ops import arrays
from tests.ops.arrays import assert_same

THREADS = 8


def at_once(function):
    """Results of function(i) for every thread i; all start together."""
    start = threading.Barrier(THREADS)

    def run(i):
        start.wait()
        return function(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def batches(shape):
    rng = np.random.default_rng(0)
    return [arrays.normal(rng, shape, centre=1.0, scale=2.0) for _ in range(THREADS)]


@pytest.fixture
def state():
    state = cubn.BatchNormState(8)
    cubn.update(state, cubn.moments(batches((16, 8))[0]))
    return state


def test_forward_from_eight_threads(state):
    xs = batches((2, 8))
    expected = [cubn.forward(x, state) for x in xs]

    def forward(i):
        return sum(np.array_equal(cubn.forward(xs[i], state), expected[i]) for _ in range(1000))

    assert at_once(forward) == [1000] * THREADS


def test_training_from_eight_threads():
    """Large enough that every call is spread over the threads of the CPU."""
    xs, dys = batches((6, 8, 50, 50)), batches((6, 8, 50, 50))[::-1]

    def train(i):
        y, saved = cubn.forward_train(xs[i], cubn.BatchNormState(8), relu=True)
        return y, cubn.backward(dys[i], saved)

    expected = [train(i) for i in range(THREADS)]
    for _ in range(5):
        for (y, gradients), (want, wanted) in zip(at_once(train), expected, strict=True):
            assert_same(y, want)
            for got, want in zip(gradients[:3], wanted[:3], strict=True):
                assert_same(got, want)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("library", ["numpy", "jax"])
def test_no_update_of_a_shared_state_is_lost(library, momentum):
    """Equal batches: the order of the updates cannot matter, their number does."""
    pytest.importorskip(library)
    x = arrays.carry(batches((4, 5000))[0], library)
    rounds = 50 if library == "numpy" else 10
    alone, shared = (cubn.BatchNormState(5000, momentum=momentum, like=x) for _ in range(2))
    for _ in range(THREADS * rounds):
        cubn.forward_train(x, alone)

    def train(_):
        for _ in range(rounds):
            cubn.forward_train(x, shared)

    at_once(train)
    np.testing.assert_equal(shared.to_dict(), alone.to_dict())
    assert (shared.tracked == THREADS * rounds).all()


@pytest.mark.parametrize(
    "use",
    [
        lambda state, x: cubn.forward_train(x, state),
        lambda state, x: cubn.update(state, cubn.moments(x)),
        lambda state, x: setattr(state, "running_mean", np.zeros(8, np.float32)),
        lambda state, x: state.copy(),
        lambda state, x: state.to_dict(),
    ],
    ids=["forward_train", "update", "assignment", "copy", "to_dict"],
)
def test_what_waits_for_an_update(state, use):
    """Mean, variance and counters change together, and are copied as of one moment."""
    user = threading.Thread(target=use, args=(state, batches((16, 8))[0]))
    with state._lock:
        user.start()
        user.join(0.1)
        assert user.is_alive()
    user.join()


# --- threads that cannot be started ----------------------------------------------------------------------------------


def test_fewer_threads_where_no_more_can_be_started():
    """The results are the same; how many there are is said once; the others are started when they can be."""
    done = run(
        PRELUDE
        + """
import _thread
from cubn.backends.cpu import pool

state = cubn.BatchNormState(8)

def infer():
    return [cubn.forward(x, state), cubn.moments(x).m2]

cubn.set_num_threads(1)
expected = infer()
pool.native("serve")  # the last of what is compiled

def refuse_after(started):
    left = iter(range(started))

    def start(*arguments):
        if next(left, None) is None:
            raise RuntimeError("can't start new thread")
        return start_new_thread(*arguments)

    return start

start_new_thread = _thread.start_new_thread
cubn.set_num_threads(7)
for started in (0, 2):
    _thread.start_new_thread = threading._start_new_thread = refuse_after(started)
    for _ in range(3):
        assert equal(infer(), expected)
    assert pool._pool._workers == started
_thread.start_new_thread = start_new_thread
assert equal(infer(), expected)
assert pool._pool._workers == 6
""",
        **OWN,
    )
    assert [done.stderr.count(f"computing on {n}") for n in (1, 3)] == [1, 1]


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs a user of its own, with a limit")
def test_a_user_who_may_not_have_another_thread():
    run(
        PRELUDE
        + """
import resource
from cubn.backends.cpu import pool

for name in ("serve", "spin"):
    pool.native(name)  # compiled now: the other user may be unable to read the source
state = cubn.BatchNormState(8)
cubn.set_num_threads(1)
expected = cubn.forward(x, state)
cubn.set_num_threads(7)
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
os.setuid(64321)
try:
    threading.Thread(target=print).start()
except RuntimeError:
    pass
else:
    raise SystemExit("the limit does not hold here")
assert np.array_equal(cubn.forward(x, state), expected)
""",
        **OWN,
    )


# --- fork -----------------------------------------------------------------------------------------------------------


OWN = {"CUBN_THREADING": "own", "OMP_NUM_THREADS": "7"}
"""For what is about the pool of our own: GNU's runtime ends a process that can start no more threads."""


def run(program, **environment):
    """Run a program in a new process, which must end well and in time."""
    code = textwrap.dedent(program)
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        env=os.environ | environment,
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
    )


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")

PRELUDE = """
import os, threading
import numpy as np
import cubn

x = np.random.default_rng(0).standard_normal((16, 8, 64, 64), dtype=np.float32)

def train(state):
    y, saved = cubn.forward_train(x, state)
    return [y, *cubn.backward(x, saved)[:3], *(v for v in state.to_dict().values() if isinstance(v, np.ndarray))]

def in_child(check):
    pid = os.fork()
    if pid == 0:
        ok = False
        try:
            ok = check()
        finally:
            os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

def equal(a, b):
    return all(np.array_equal(u, v) for u, v in zip(a, b, strict=True))
"""


@needs_fork
def test_a_forked_child_trains():
    run(
        PRELUDE
        + textwrap.dedent("""
        cubn.set_num_threads(3)
        expected = train(cubn.BatchNormState(8))
        in_child(lambda: equal(train(cubn.BatchNormState(8)), expected))
        in_child(lambda: equal(train(cubn.BatchNormState(8)), expected))
        assert equal(train(cubn.BatchNormState(8)), expected)
        """)
    )


@needs_fork
def test_a_fork_in_the_midst_of_training():
    run(
        PRELUDE
        + textwrap.dedent("""
        cubn.set_num_threads(3)
        expected = train(cubn.BatchNormState(8))
        stop = threading.Event()

        def keep_training():
            while not stop.is_set():
                train(cubn.BatchNormState(8))

        threads = [threading.Thread(target=keep_training) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            in_child(lambda: equal(train(cubn.BatchNormState(8)), expected))
        stop.set()
        for thread in threads:
            thread.join()
        """)
    )


@needs_fork
def test_a_fork_while_another_thread_compiles():
    run(
        PRELUDE
        + textwrap.dedent("""
        import signal
        from cubn.backends.cpu import compile

        os.environ["CUBN_CACHE_DIR"] = ""
        begun = threading.Event()
        object_code = compile._object_code

        def watched(build):
            begun.set()
            return object_code(build)

        def child():
            signal.alarm(60)
            return np.array_equal(cubn.moments(x[:, :2]).mean, cubn.moments(x).mean[:2])

        compile._object_code = watched
        other = threading.Thread(target=cubn.moments, args=(x,))
        other.start()
        begun.wait()
        in_child(child)
        other.join()
        """)
    )


@needs_fork
def test_a_fork_while_another_thread_updates_the_state():
    run(
        PRELUDE
        + textwrap.dedent("""
        state = cubn.BatchNormState(8)
        train(state)
        held, done = threading.Event(), threading.Event()

        def hold():
            with state._lock:
                held.set()
                done.wait()

        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()

        def child():
            train(state)
            return (state.tracked == 2).all()

        in_child(child)
        done.set()
        holder.join()
        train(state)
        assert (state.tracked == 2).all()
        """)
    )
