"""The same bits whatever the calling thread has set: flushing of subnormals, direction of rounding, trapped exceptions;
and afterwards the thread has what it had.
"""

import contextlib
import ctypes
import itertools
import platform
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import cubn
from cubn._floating_point import default_floating_point
from cubn.backends.cpu import plan, prepare
from cubn.backends.cuda.plan.tree import tree_of
from tests.ops import arrays
from tests.ops.arrays import assert_same

libc = ctypes.CDLL(None)
# fenv.h
X86 = platform.machine() in ("x86_64", "AMD64")
ROUNDING = {"upward": 0x800, "downward": 0x400, "toward zero": 0xC00} if X86 else {}
INVALID, DIVIDED_BY_ZERO = 1, 4

pytestmark = pytest.mark.skipif(not ROUNDING, reason="the numbers in fenv.h are those of x86-64")


@contextlib.contextmanager
def mode(name):
    """Work as a caller does who has set this."""
    if name == "flushing":
        torch = pytest.importorskip("torch")
        torch.set_flush_denormal(True)
        restore = lambda: torch.set_flush_denormal(False)  # noqa: E731
    else:
        libc.fesetround(ROUNDING[name])
        restore = lambda: libc.fesetround(0)  # noqa: E731
    before = settings()
    assert before != DEFAULT, "the caller has set something"
    try:
        yield
        assert settings() == before, "a call changed what its caller has set"
    finally:
        restore()
        assert settings() == DEFAULT


def settings():
    """Direction of rounding, and whether subnormals become zero on their way in and out."""
    tiny, small = np.float32(1e-39), np.float32(2.0**-100)
    return libc.fegetround(), bool(tiny * np.float32(2.0**100)), bool(small * np.float32(2.0**-40))


DEFAULT = settings()
SUBNORMAL = np.geomspace(1e-39, 1e-44, 64).astype(np.float32)
LEAST = np.float32(5.6e-45)
MODES = ["flushing", *ROUNDING]


def forget_plans():
    """Tables of shares are computed, too."""
    for function in itertools.chain(vars(plan).values(), vars(prepare).values()):
        if hasattr(function, "cache_clear"):
            function.cache_clear()


CASES = [
    ("float32", (9, 5, 41, 53), 1),
    ("float32", (20000, 5), 1),
    ("float16", (9, 41, 53, 6), -1),
    ("float64", (80, 40, 11), 1),
]
"""Kernels of every kind, on arrays large enough for several threads."""


def data(dtype, shape):
    """Normal values, every third sample of subnormal ones."""
    x = arrays.normal(np.random.default_rng(3), shape, dtype)
    x[::3] *= np.finfo(dtype).smallest_normal / 8
    return x


def everything(x, axis):
    """What every operation returns."""
    forget_plans()
    C = x.shape[axis]
    subnormal = SUBNORMAL[:C]
    dy = np.flip(x, 0).copy()
    state = cubn.BatchNormState(C, channel_axis=axis)
    state.gamma[...], state.beta[...] = subnormal, subnormal[::-1]
    state.running_mean[...], state.running_var[...] = subnormal, LEAST
    yield cubn.forward(x, state)
    y, saved = cubn.forward_frozen(x, state)
    yield y
    gradients = cubn.backward(dy, saved, statistics=True)
    yield from (getattr(gradients, name) for name in ("dx", "dgamma", "dbeta", "dmean", "dvar"))
    yield from cubn.fold(state)
    yield from cubn.fold_into(np.full((C, 3), 1e-3, np.float32), None, state)
    y, saved = cubn.forward_train(x, state)
    yield y
    yield from cubn.backward(dy, saved)[:3]
    yield from cubn.double_backward(x, subnormal, subnormal[::-1], dy, saved)
    y, saved = cubn.forward_train(x, state, renorm=(1e300, 1e300), update=False)
    yield from (y, saved.r, saved.d)
    yield from cubn.backward(dy, saved)[:3]
    yield from cubn.double_backward(x, subnormal, subnormal[::-1], dy, saved)
    whole, first, rest = (
        cubn.moments(x[a:b], channel_axis=axis, start=a) for a, b in ((0, len(x)), (0, 5), (5, len(x)))
    )
    yield from (whole.mean, whole.m2, whole.var(), whole.var_unbiased(), whole.std())
    pooled = first + cubn.Moments.from_statistics(7, rest.mean, rest.var())
    yield from (pooled.mean, pooled.m2)
    blended = rest.blend(state, 1 / 3)
    yield from (blended.mean, blended.m2)
    merged = first.merge(rest)
    yield from (merged.mean, merged.m2)
    yield cubn.normalize(x, merged, gamma=subnormal, channel_axis=axis)
    cubn.update(state, merged)
    yield from (state.running_mean, state.running_var)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize(("dtype", "shape", "axis"), CASES)
def test_no_mode_of_the_caller_changes_a_bit(dtype, shape, axis, name):
    x = data(dtype, shape)
    expected = list(everything(x, axis))
    for threads in (1, 2, 7):
        cubn.set_num_threads(threads)
        with mode(name):
            found = list(everything(x, axis))
        for got, want in zip(found, expected, strict=True):
            assert_same(got, want)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ROUNDING)
def test_no_mode_changes_the_shares_that_cuda_kernels_are_given(name, dtype):
    lengths = range(1, 3000, 37)
    with mode(name):
        found = [tree_of.__wrapped__(S, dtype) for S in lengths]
    assert found == [tree_of.__wrapped__(S, dtype) for S in lengths]


@pytest.mark.parametrize("name", MODES)
def test_an_error_gives_the_callers_mode_back(name):
    with mode(name):
        with pytest.raises(ValueError, match="running statistics"):
            cubn.fold(cubn.BatchNormState(3, track=False))
        with contextlib.suppress(ZeroDivisionError):
            divide_by_zero()


@default_floating_point
def divide_by_zero():
    assert settings() == DEFAULT
    raise ZeroDivisionError


@pytest.mark.parametrize("threads", [1, 2])
def test_the_callers_flags_stay_as_they_were(threads):
    """Those that say what arithmetic has met since they were last cleared."""
    cubn.set_num_threads(threads)
    x = np.full((20000, 5), np.inf, np.float32)  # inf - inf is invalid
    state = cubn.BatchNormState(5)
    cubn.forward_train(x, state)
    for flags in (0, DIVIDED_BY_ZERO):
        libc.feclearexcept(INVALID | DIVIDED_BY_ZERO)
        libc.feraiseexcept(flags)
        cubn.forward_train(x, state)
        default_floating_point(libc.feraiseexcept)(INVALID)
        assert libc.fetestexcept(INVALID | DIVIDED_BY_ZERO) == flags


@pytest.mark.skipif(not hasattr(libc, "feenableexcept"), reason="exceptions are trapped by a function of glibc")
def test_trapped_exceptions_stay_with_the_caller():
    """Where a result that is not finite would end the caller's own arithmetic by a signal."""
    program = f"""
        import ctypes
        import numpy as np
        import cubn

        libc = ctypes.CDLL(None)
        cubn.set_num_threads(2)
        x = np.full((20000, 5), np.inf, np.float32)
        state = cubn.BatchNormState(5)
        state.running_var[:] = np.inf
        assert libc.feenableexcept({INVALID | DIVIDED_BY_ZERO}) == 0
        y = cubn.forward(x, state)
        cubn.forward_train(x, state)
        cubn.moments(x[:10]).merge(cubn.moments(x[10:], start=10))
        cubn.fold(state)
        assert libc.fegetexcept() == {INVALID | DIVIDED_BY_ZERO}
        assert libc.fedisableexcept(-1)
        assert np.isnan(y).all()
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
