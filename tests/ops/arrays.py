"""Arrays for the tests: any dtype, in any library, at any address, with any strides.

A test makes values as a NumPy *store* (float16, float32, float64; uint16 patterns stand for bfloat16), lays the store
out in memory, hands it to a library without moving it, and reads results back as a store for the oracle.
"""

import math

import numpy as np

from tests import oracle

DTYPES = ["float16", "bfloat16", "float32", "float64"]
STORES = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32, "float64": np.float64}
LIBRARIES = ["numpy", "torch", "jax"]
LAYOUTS = {
    "nchw": (1, "dense"),
    "nhwc": (-1, "dense"),
    "axis0": (0, "dense"),
    "middle": (2, "dense"),
    "channels_last": (1, "channels_last"),
    "permuted": (1, "permuted"),
    "sliced": (1, "sliced"),
    "negative": (1, "negative"),
    "broadcast": (1, "broadcast"),
}
"""Channel axis and memory of each layout; see `in_memory`."""

WILD = [np.inf, -np.inf, np.nan, 3e38, -2e38, 6e4, 1e-42, 5e-8, -0.0]


# --- values ---------------------------------------------------------------------------------------------------------


def normal(rng, shape, dtype="float32", *, centre=0.0, scale=1.0, wild=0.0):
    """A store of normal values, a fraction `wild` of them infinite, NaN, subnormal or near overflow."""
    v = rng.normal(centre, scale, shape)
    if wild:
        v = np.where(rng.random(shape) < wild, rng.choice(WILD, shape), v)
    with np.errstate(over="ignore"):
        return oracle.narrow(v, np.dtype(STORES[dtype]))


# --- memory ---------------------------------------------------------------------------------------------------------


def at_address(store, offset):
    """A C-contiguous copy whose first element lies `offset` bytes after a multiple of 64."""
    memory = np.empty(store.nbytes + 128, np.uint8)
    begin = -memory.ctypes.data % 64 + offset
    copy = memory[begin : begin + store.nbytes].view(store.dtype).reshape(store.shape)
    copy[...] = store
    assert store.size == 0 or copy.ctypes.data % 64 == offset
    return copy


def lay_out(store, layout):
    """(array, channel_axis): a store (N, C, ...) with its channel axis and memory as the layout has them."""
    axis, memory = LAYOUTS[layout]
    axis = min(axis, store.ndim - 1)
    return in_memory(np.moveaxis(store, 1, axis), memory, axis), axis


def in_memory(store, memory, channel_axis):
    """A copy of an array whose elements lie in memory in another way; "broadcast" repeats its first values."""
    rank = store.ndim
    match memory:
        case "dense":
            return np.array(store, order="C")
        case "channels_last":
            return np.moveaxis(np.array(np.moveaxis(store, channel_axis, -1), order="C"), -1, channel_axis)
        case "permuted":
            return np.array(store, order="F")
        case "sliced":
            parent = np.zeros([*(n + 2 for n in store.shape[:-1]), 2 * store.shape[-1] + 3], store.dtype)
            view = parent[(*[slice(1, -1)] * (rank - 1), slice(2, -1, 2))]
            view[...] = store
            return view
        case "negative":
            backwards = (slice(None, None, -1),) * rank
            return np.array(store[backwards], order="C")[backwards]
        case "broadcast":
            axis = 0 if rank == 2 else rank - 1
            one = np.array(store.take([0], axis), order="C")
            strides = [0 if a == axis else step for a, step in enumerate(one.strides)]
            return np.lib.stride_tricks.as_strided(one, store.shape, strides)
    raise KeyError(memory)


def is_dense(array):
    """Whether the elements fill one block of memory, all strides forwards."""
    step = array.itemsize
    for stride, extent in sorted((s, n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1):
        if stride != step:
            return False
        step *= extent
    return True


def steps(array):
    """Strides along the axes that have a step to take."""
    return [s for s, n in zip(array.strides, array.shape, strict=True) if n > 1]


# --- libraries ------------------------------------------------------------------------------------------------------


def carry(store, library):
    """The store as an array of a library; NumPy and torch see the store's own memory."""
    if library == "numpy":
        if store.dtype != np.uint16:
            return store
        import ml_dtypes

        return store.view(ml_dtypes.bfloat16)
    if library == "torch":
        import torch

        if store.dtype == np.uint16:
            return torch.from_numpy(store.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(store)
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax.numpy.array(carry(store, "numpy"))


def store_of(array):
    """A library's array as a store: the same memory where the library allows it."""
    if type(array).__module__.startswith("torch"):
        import torch

        if array.dtype == torch.bfloat16:
            return array.view(torch.int16).numpy().view(np.uint16)
        return array.numpy()
    array = np.asarray(array)
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def library_of(array):
    """The library an array belongs to."""
    return next((name for name in ("torch", "jax") if type(array).__module__.startswith(name)), "numpy")


def can_carry(library, layout):
    """torch knows no negative strides; JAX arrays are dense, with the channel axis anywhere."""
    memory = LAYOUTS[layout][1]
    return {"numpy": True, "torch": memory != "negative", "jax": memory == "dense"}[library]


# --- comparison -----------------------------------------------------------------------------------------------------


def assert_same(got, expected, what="result"):
    """got, a store, is expected to the bit (NaN as NaN, -0 as 0)."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype, f"{what}: {got.dtype}, not {expected.dtype}"
    assert got.shape == expected.shape, f"{what}: {got.shape}, not {expected.shape}"
    if oracle.equal(got, expected):
        return
    a, b = oracle.widen(got), oracle.widen(expected)
    wrong = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    differ = f"{wrong.sum()} of {math.prod(wrong.shape)} differ, the first at {first}"
    raise AssertionError(f"{what}: {differ}: {a[first]!r}, not {b[first]!r}")
