"""What interrupts an update in its own thread: an error that says what to do; no wait for ever, no torn state."""

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

import cubn

C = 4
X = np.random.default_rng(0).standard_normal((3, C, 2), dtype=np.float32)

USES = {
    "forward_train": lambda state: cubn.forward_train(X, state),
    "update": lambda state: cubn.update(state, cubn.moments(X)),
    "reset": lambda state: state.reset(),
    "to_dict": lambda state: state.to_dict(),
    "fold": cubn.fold,
    "copy": copy.copy,
    "pickle": pickle.dumps,
    "array": lambda state: setattr(state, "gamma", np.ones(C, np.float32)),
    "counter": lambda state: setattr(state, "tracked", 7),
    "option": lambda state: setattr(state, "eps", 0.5),
}
LOOKS = {
    "repr": repr,
    "tracked": lambda state: state.tracked,
    "running_mean": lambda state: state.running_mean,
    "forward": lambda state: cubn.forward(X, state),
}


class Calling:
    """An array that calls something whenever it is asked for its memory, which a state does when it takes a turn."""

    def __init__(self, array):
        self.array = array
        self.call = None

    def __dlpack__(self, **options):
        if self.call:
            call, self.call = self.call, None
            call()
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return 1, 0


def interrupted(interrupt, by):
    """(the state, what `by` raised in the midst of its to_dict)"""
    gamma = Calling(np.ones(C, np.float32))
    given = {"running_mean": np.zeros(C, np.float32), "running_var": np.ones(C, np.float32)}
    state = cubn.BatchNormState.from_arrays(gamma=gamma, **given)
    cubn.forward_train(X, state)
    raised = []

    def attempt(*_):
        try:
            by(state)
        except RuntimeError as error:
            raised.append(str(error))

    def call():
        interrupt(attempt)

    before = state.to_dict()
    gamma.call = call
    found = state.to_dict()
    np.testing.assert_equal(found, before)
    np.testing.assert_equal(state.to_dict(), before)
    cubn.forward_train(X, state)
    assert (state.tracked == 2).all()
    return raised


def by_signal(attempt):
    old = signal.signal(signal.SIGUSR1, attempt)
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, old)


def by_finaliser(attempt):
    class Last:
        def __del__(self):
            attempt()

    cycle = Last()
    cycle.itself = cycle
    del cycle
    gc.collect()


INTERRUPTS = [by_finaliser, *([by_signal] if hasattr(signal, "SIGUSR1") else [])]


@pytest.mark.parametrize("interrupt", INTERRUPTS)
@pytest.mark.parametrize("use", USES)
def test_a_use_in_the_midst_of_another_says_what_to_do(use, interrupt):
    (text,) = interrupted(interrupt, USES[use])
    assert "state must not be used in the midst of its own update" in text
    assert text.endswith("Set a flag there, and do this after the step.")


@pytest.mark.parametrize("interrupt", INTERRUPTS)
@pytest.mark.parametrize("look", LOOKS)
def test_looking_is_allowed(look, interrupt):
    assert interrupted(interrupt, LOOKS[look]) == []


def test_another_state_may_be_used():
    other = cubn.BatchNormState(C)
    for use in USES.values():
        assert interrupted(by_finaliser, lambda _, use=use: use(other)) == []


def test_other_threads_wait_their_turn():
    """An interrupt of one thread says nothing about another's."""
    done = []

    def elsewhere(attempt):
        thread = threading.Thread(target=lambda: (attempt(), done.append(True)), daemon=True)
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()

    assert interrupted(elsewhere, lambda state: state.to_dict()) == []
    while not done:
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_error_gives_the_turn_back(error):
    gamma = Calling(np.ones(C, np.float32))
    state = cubn.BatchNormState.from_arrays(gamma=gamma)

    def call():
        raise error

    gamma.call = call
    with pytest.raises(error) as caught:
        state.to_dict()
    assert caught.value.__traceback__  # which is alive, with all that it holds
    assert state.to_dict()["gamma"].all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_child_that_was_forked_in_the_midst_of_an_update_knows_it():
    program = """
        import os
        from tests.objects.test_state_interrupted import *

        def forked(attempt):
            child = os.fork()
            if not child:
                attempt()
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

        def by(state):
            try:
                state.to_dict()
            except RuntimeError:
                return
            os._exit(1)

        interrupted(forked, by)
        """
    run(program)


def test_timers_during_training_end_in_an_error_or_done():
    """Real signals at any moment, each with every use: each ends, in an error or done, and nothing waits for ever."""
    program = """
        import itertools, signal, sys
        from tests.objects.test_state_interrupted import *

        cubn.set_num_threads(1)
        state = cubn.BatchNormState(C)
        uses = itertools.cycle(USES.values())
        met = {"done": 0, "refused": 0}

        def handler(*_):
            try:
                next(uses)(state)
                met["done"] += 1
            except RuntimeError as error:
                assert "Set a flag there" in str(error), error
                met["refused"] += 1

        for use in USES.values():  # compiled
            use(state)
        moments = cubn.moments(X)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        for _ in range(200_000):
            state.to_dict()
            cubn.update(state, moments)
            state.eps = 1e-5
            if met["refused"] > 200 and met["done"] > 200:
                break
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert met["refused"] > 200 and met["done"] > 200, met
        state.to_dict()
        """
    run(program)


def run(program):
    code = textwrap.dedent(program)
    subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", code], check=True, timeout=120)
