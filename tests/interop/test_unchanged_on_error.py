"""What fails on the way, in a library or in a thread, leaves the state (and a gradient's `out`) as it was."""

import types

import numpy as np
import pytest

import cubn
from cubn import _arrays
from cubn._kept import Kept
from cubn.backends.cpu import pool, prepare
from cubn.sync import threads
from tests.interop.test_foreign import Grid

C = 5


class Refused(RuntimeError):
    """What the libraries below answer."""


class Moody:
    """A library that takes `patience` arrays and no more."""

    def __init__(self, patience):
        self.patience = patience
        self.kind = type("Moody", (Grid,), {})  # a library is known by the type of its arrays

    def from_dlpack(self, exporter):
        if not self.patience:
            raise Refused
        self.patience -= 1
        return self.array(np.from_dlpack(exporter))

    def array(self, values):
        return self.kind(values, self)


def values(seed=0, *shape):
    return np.random.default_rng(seed).standard_normal(shape or (4, C, 6), dtype=np.float32)


def trained(**options):
    state = cubn.BatchNormState(C, **options)
    cubn.forward_train(values(9), state)
    return state


@pytest.fixture
def unchanged():
    """A check that the call fails and the state stays."""

    def check(state, error, call, *arguments, **options):
        before = state.to_dict()
        with pytest.raises(error):
            call(*arguments, **options)
        np.testing.assert_equal(state.to_dict(), before)
        assert not state._lock._is_owned()

    return check


@pytest.mark.parametrize("operation", ["forward_train", "forward_frozen", "forward"])
def test_a_library_that_refuses_y(unchanged, operation):
    """In its memory a state's NumPy arrays would be updated in place."""
    state = trained()
    unchanged(state, Refused, getattr(cubn, operation), Moody(0).array(values()), state)


def test_a_library_that_refuses_y_of_groups_or_of_a_single_value(unchanged):
    state = trained()
    unchanged(state, Refused, cubn.forward_train, Moody(0).array(values()), state, groups=2)
    unchanged(state, Refused, cubn.forward_train, Moody(0).array(values(0, 1, C)), state, on_single="running")


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"on_single": "running"}], ids=str)
def test_a_step_in_the_midst_of_an_update_writes_nothing(options):
    state, x = trained(), values(0, 1 if "on_single" in options else 4, C)
    out = np.zeros_like(x)
    with state._turn():
        before = state._counts()
        with pytest.raises(RuntimeError, match="must not be used in the midst of its own update"):
            cubn.forward_train(x, state, out=out, **options)
    np.testing.assert_equal(state._counts(), before)
    assert not out.any()


def test_a_state_moves_once_its_y_was_taken():
    """To the bit as with an array of NumPy's own."""
    states = trained(), trained()
    y, _ = cubn.forward_train(Moody(1).array(values()), states[0])
    expected, _ = cubn.forward_train(values(), states[1])
    assert (y.values == expected).all()
    np.testing.assert_equal(states[0].to_dict(), states[1].to_dict())


def test_a_library_that_refuses_y_of_several_ranks(unchanged):
    def rank(comm):
        state, library = trained(), Moody(int(comm.rank == 1))
        x = library.array(values(comm.rank))
        if comm.rank == 1:
            return cubn.forward_train(x, state, comm=comm)
        return unchanged(state, Refused, cubn.forward_train, x, state, comm=comm)

    threads.run(2, rank)


def test_a_library_that_refuses_what_normalize_wrote(unchanged):
    unchanged(trained(), Refused, cubn.normalize, Moody(0).array(values()), cubn.moments(values()))


# --- immutable running statistics ------------------------------------------------------------------------------------


@pytest.fixture
def jax_that_fails(monkeypatch):
    """After `let(n)`, JAX adopts or moves n arrays and no more."""
    jax = pytest.importorskip("jax")
    adopt = jax.dlpack.from_dlpack

    def let(n, name="from_dlpack"):
        left = iter(range(n))

        def patient(*arguments, **options):
            if next(left, None) is None:
                raise Refused
            return adopt(*arguments, **options)

        if name == "from_dlpack":
            monkeypatch.setattr(jax.dlpack, name, patient)
        else:
            elsewhere = lambda *a, **k: types.SimpleNamespace(device="elsewhere")  # noqa: E731
            monkeypatch.setattr(jax.dlpack, "from_dlpack", elsewhere)
            monkeypatch.setattr(jax, "device_put", lambda *a, **k: patient())

    return let


@pytest.mark.parametrize("adopted", [0, 1, 2])
@pytest.mark.parametrize("held", ["numpy", "jax"])
def test_jax_refuses_an_output_of_training(unchanged, jax_that_fails, held, adopted):
    """y, the mean, the variance: whichever is refused, none of the state has moved, and the counters neither."""
    if held == "numpy" and adopted:
        pytest.skip("a NumPy state has one JAX output beside it, y")
    import jax

    x = jax.numpy.array(values())
    state = trained(like=x if held == "jax" else None)
    jax_that_fails(adopted)
    unchanged(state, Refused, cubn.forward_train, x, state)


@pytest.mark.parametrize("adopted", [0, 1])
def test_jax_refuses_what_update_wrote(unchanged, jax_that_fails, adopted):
    import jax

    state = trained(like=jax.numpy.zeros(1))
    jax_that_fails(adopted)
    unchanged(state, Refused, cubn.update, state, cubn.moments(values()))


def test_jax_cannot_move_y_to_its_device(unchanged, jax_that_fails):
    import jax

    x, state = jax.numpy.array(values()), trained()
    jax_that_fails(0, "device_put")
    unchanged(state, Refused, cubn.forward_train, x, state)


def test_a_state_of_jax_arrays_counts_what_it_took():
    jax = pytest.importorskip("jax")
    state, expected = trained(like=jax.numpy.zeros(1)), trained()
    for s in (state, expected):
        cubn.forward_train(values(), s)
    np.testing.assert_equal(state.to_dict(), expected.to_dict())


# --- gradients -------------------------------------------------------------------------------------------------------


def forward_by_groups(x, state):
    return cubn.forward_train(x, state, groups=2)


@pytest.mark.parametrize("forward", [cubn.forward_train, cubn.forward_frozen, forward_by_groups])
def test_a_library_that_refuses_a_parameter_s_gradient(forward):
    """NumPy's dx would go into a given array, dgamma into a new one of a library that refuses it."""
    library = Moody(0)
    gamma = library.array(np.ones(C, np.float32))
    state = cubn.BatchNormState.from_arrays(
        gamma=gamma, running_mean=np.zeros(C, np.float32), running_var=np.ones(C, np.float32)
    )
    x, dy = values(), values(1)
    _, saved = forward(x, state)
    for out in (dy, np.zeros_like(x)):
        before = out.copy()
        with pytest.raises(Refused):
            cubn.backward(dy, saved, out=out)
        assert (out == before).all()
    library.patience = 1
    expected = cubn.backward(dy, forward(x, cubn.BatchNormState(C))[1])
    found = cubn.backward(dy, saved, out=dy)
    assert (dy == expected.dx).all() and found.dx is dy
    assert (found.dgamma.values == expected.dgamma).all()


def test_a_library_that_refuses_a_statistic_s_gradient(monkeypatch):
    torch = pytest.importorskip("torch")
    x, dy = values(), values(1)
    _, saved = cubn.forward_frozen(x, trained(like=torch.zeros(1)))

    def refuse(*arguments, **options):
        raise Refused

    monkeypatch.setattr(_arrays.torch.Torch, "from_numpy", refuse)
    before = dy.copy()
    with pytest.raises(Refused):
        cubn.backward(dy, saved, statistics=True, out=dy)
    assert (dy == before).all()


def test_backward_from_refused():
    x, library = values(), Moody(0)
    out, gamma = np.zeros_like(x), library.array(np.ones(C, np.float32))
    with pytest.raises(Refused):
        cubn.backward_from(values(1), x, mean=np.zeros(C), invstd=np.ones(C), gamma=gamma, out=out)
    assert (out == 0).all()


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_threads(monkeypatch):
    """`no_threads(error)`: a pool without workers, where to start one raises the error; the numbers that were asked."""
    monkeypatch.setenv("CUBN_THREADING", "own")
    fresh = pool.Pool()
    asked = []

    def patch(error):
        def start(*arguments):
            asked.append(arguments)
            raise error

        monkeypatch.setattr(pool._thread, "start_new_thread", start)
        for name in ("prepare", "ask_for"):
            monkeypatch.setattr(pool, name, getattr(fresh, name))
        forget_launches()
        return asked

    before = cubn.get_num_threads()
    cubn.set_num_threads(11)
    yield patch
    cubn.set_num_threads(before)
    forget_launches()


def forget_launches():
    """Those that were prepared, which are of one pool."""
    for function in vars(prepare).values():
        if isinstance(function, Kept):
            function.cache_clear()


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()], ids=["refused", "failed"])
@pytest.mark.parametrize("operation", ["forward_train", "moments", "backward"])
def test_no_thread_can_be_started(no_threads, operation, error):
    """Computed all the same where the system has no more of them; whatever else is raised, nothing is changed."""
    x, dy, state = values(0, 64, C, 4096), values(1, 64, C, 4096), trained()
    _, saved = cubn.forward_train(x, state, update=False)
    before, out = state.to_dict(), np.zeros_like(x)
    call = {
        "forward_train": lambda: [cubn.forward_train(x, state, out=out)[0]],
        "moments": lambda: [cubn.moments(x).mean],
        "backward": lambda: list(cubn.backward(dy, saved, out=out)[:3]),
    }[operation]
    asked = no_threads(error)
    if isinstance(error, MemoryError):
        with pytest.raises(MemoryError):
            call()
        assert (out == 0).all()
        np.testing.assert_equal(state.to_dict(), before)
        found = None
    else:
        found = [result if result is None else result.copy() for result in call()]
        assert (state.tracked == before["tracked"] + (operation == "forward_train")).all()
    assert asked, "no thread was asked for: the test shows nothing"
    cubn.set_num_threads(1)
    expected = call()
    assert found is None or all(map(np.array_equal, found, expected))
