"""The memory that a launch works in is the thread's own, and nobody else's while the launch runs."""

import sys
import threading
import weakref

import numpy as np
import pytest

import cubn
from cubn.backends.cpu import launch, pool, prepare
from cubn.backends.cpu.calls import PreparedTrain

RNG = np.random.default_rng(0)
SMALL, LARGE = (RNG.standard_normal(shape, dtype=np.float32) for shape in ((6, 20), (300, 700)))


def train(x):
    y, saved = cubn.forward_train(x, cubn.BatchNormState(x.shape[1]))
    return [y, *cubn.backward(x, saved)[:3]]


@pytest.fixture
def fresh(monkeypatch):
    """No thread has a workspace yet."""
    monkeypatch.setattr(launch, "_thread", launch._Thread())


def interrupted_before(bytecode, work, handler):
    """Whether `work` came to this bytecode of a prepared call or its launch, where a handler ran."""
    left, came = bytecode, False
    files = {sys.modules[part.__module__].__file__ for part in (PreparedTrain, launch.Launch)}

    def each(frame, event, _):
        nonlocal left, came
        if event == "opcode":
            left -= 1
            if left == 0:
                came = True
                sys.settrace(None)
                handler()
        return each

    def trace(frame, *_):
        frame.f_trace_opcodes = frame.f_code.co_filename in files
        return each if frame.f_trace_opcodes else None

    tracing = sys.gettrace()
    sys.settrace(trace)
    try:
        return work(), lambda: came
    finally:
        sys.settrace(tracing)


@pytest.fixture
def watched(fresh, plans_anew, monkeypatch):
    """Every launch is told by an assertion if its workspace is free."""
    memory, another, prepare = {}, launch._another, pool.prepare

    def recorded(size, has_team):
        workspace = another(size, has_team)
        memory[workspace.address] = weakref.ref(workspace.memory)
        return workspace

    def prepared(program):
        run = prepare(program)

        def checked(workspace, *arguments):
            assert not workspace or memory[workspace]() is not None, "a launch works in memory that is free"
            run(workspace, *arguments)

        return checked

    monkeypatch.setattr(launch, "_another", recorded)
    monkeypatch.setattr(pool, "prepare", prepared)


def test_a_handler_that_needs_more_room_takes_none_away(watched):
    """Between any two bytecodes: the interrupted call has an address, and the memory there is still its own."""
    expected = train(SMALL), train(LARGE)

    def handler():
        for _ in range(2):
            launch._thread.workspace = launch.Workspace(0, 0, False)  # as if what it takes were larger
            assert all(map(np.array_equal, train(LARGE), expected[1]))
        launch._thread.workspace = launch.Workspace(0, 0, False)

    for bytecode in range(1, 1000):
        found, came = interrupted_before(bytecode, lambda: train(SMALL), handler)
        assert all(map(np.array_equal, found, expected[0]))
        if not came():
            break
    assert bytecode > 50, "calls were watched"


def test_what_many_calls_need_is_not_allocated_again(fresh):
    train(LARGE)
    before = launch._thread.workspace
    for x in (SMALL, LARGE):
        train(x)
    assert launch._thread.workspace is before


def test_a_large_workspace_is_given_back(fresh, monkeypatch):
    monkeypatch.setattr(launch, "WORKSPACE", 1 << 12)
    train(LARGE)
    assert launch._thread.workspace.size <= 1 << 12


def test_each_thread_has_its_own(fresh):
    train(SMALL)
    found = []
    thread = threading.Thread(target=lambda: (train(SMALL), found.append(launch._thread.workspace)))
    thread.start()
    thread.join()
    assert found[0].address != launch._thread.workspace.address


@pytest.mark.parametrize("arguments", [(), (0,) * 4, (0,) * 6, (0, 0, 0, 0, None), (0, 0, 0, 0.5, 0.5)])
def test_arguments_that_do_not_fit_a_launch_are_refused(arguments):
    """As they would be by any builtin function, before anything is read or written."""
    run = prepare.statistics(1).run
    with pytest.raises(TypeError):
        run(*arguments)
