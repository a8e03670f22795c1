"""Any array in, the same library's array out.

NumPy, PyTorch and CuPy arrays are read through their own attributes, which is fastest; every other array through its
DLPack capsule. No library is imported here: a library whose array came in is in `sys.modules` already.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, NoReturn, Protocol

import numpy as np

from cubn import _dlpack, _layout
from cubn.backends import CPU, CUDA
from cubn.errors import message

Shape = tuple[int, ...]
Strides = tuple[int, ...]

FLOATS = ("float16", "bfloat16", "float32", "float64")
BOOL = ("bool",)
ITEMSIZE = {name: bits // 8 for name, (_, bits) in _dlpack.CODES.items()}


class Array(NamedTuple):
    """A described array: all that a backend needs of it, and what keeps it alive."""

    pointer: int  # address of the first element
    shape: Shape
    strides: Strides  # in elements
    dtype: str
    device: tuple[int, int]  # DLPack (type, index)
    writable: bool
    owner: Any  # the array itself
    library: Library
    capsule: object = None  # keeps the memory alive where the array alone might not


class Output(NamedTuple):
    """Memory to write, and what turns it into the library's own array once it is written."""

    array: Array
    finish: Callable[[], Any]


class Library(Protocol):
    """What cubn asks of an array library. `like` is always one of the library's own arrays."""

    name: str
    immutable: bool
    fixed: bool  # an array is the same memory, shape and type for life

    def describe(self, x: Any, function: str, argument: str, dtypes: tuple[str, ...], detach: bool) -> Array:
        """See `describe`."""

    def empty(self, shape: Shape, strides: Strides, dtype: str, like: Array) -> Output:
        """Memory for an array on like's device."""

    def from_numpy(self, values: np.ndarray[Any, Any], dtype: str, like: Array) -> Any:
        """A new array of these values on like's device; NumPy's own for a library cubn does not know."""

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        """A copy in host memory; bfloat16 comes, exactly, as float32."""

    def unchanged(self, array: Array) -> bool:
        """Whether the owner is as it was described: a yes is quick, a no may mean that one has to describe it again."""

    def version(self, array: Array) -> int | None:
        """A number that grows when the array is written in place, where the library counts that."""

    def mark_written(self, array: Array) -> None:
        """Tell the library that the array was written behind its back."""


def describe(x: Any, function: str, argument: str, dtypes: tuple[str, ...] = FLOATS, *, detach: bool = False) -> Array:
    """Describe any library's array without copying it.

    Parameters
    ----------
    x : array
        Of any library with `__dlpack__`.
    function, argument : str
        Whose argument this is, for messages.
    dtypes : tuple of str
        What is accepted.
    detach : bool
        Whether an array that requires a gradient is read as if it did not (it never is writable then), or refused.

    Raises
    ------
    TypeError
        Not an array; not of these dtypes; one that stands for numbers without holding them (a tracer), or that holds
        more than numbers (a mask, a unit, a gradient to come).
    ValueError
        A misaligned, deleted or multi-device array.
    NotImplementedError
        A device that is neither a CPU nor CUDA's.
    BufferError
        The array's library would not export it.
    """
    read = _DESCRIBERS.get(type(x)) or _describer(x, function, argument)
    return read(x, function, argument, dtypes, detach)


def empty_like(x: Array) -> Output:
    """An output of x's shape, dtype, device and library; of its layout too where x is dense, else C-contiguous."""
    return x.library.empty(x.shape, _layout.output_strides(x.shape, x.strides), x.dtype, x)


def empty_vector(features: int, dtype: str, like: Array) -> Output:
    """A per-channel output beside `like`, in its library."""
    return like.library.empty((features,), (1,), dtype, like)


def destination(out: Any, function: str, argument: str = "out") -> Output:
    """A caller's own array, to be written and given back."""
    array = describe(out, function, argument)
    check_writable(array, function, argument)

    def finish() -> Any:
        array.library.mark_written(array)
        return out

    return Output(array, finish)


def check_writable(array: Array, function: str, argument: str) -> None:
    """Raise unless the array can be written: TypeError for an immutable library, ValueError for this array alone."""
    refuse = partial(_refuse, array, function, argument)
    if array.library.immutable:
        refuse(
            TypeError, "be an array that can be written", f"an immutable {array.library.name} array", "Leave it out."
        )
    if not array.writable and getattr(array.owner, "requires_grad", False):
        refuse(ValueError, "be writable", "a tensor that requires a gradient", "Pass it detached.")
    if not array.writable:
        refuse(ValueError, "be writable", "a read-only array", "Pass a copy.")
    if not _layout.is_distinct(array.shape, array.strides):
        got = f"elements that share memory, strides={array.strides}"
        refuse(ValueError, "have memory of its own for every element", got, "Pass a copy.")


def overlap(a: Array, b: Array) -> Literal["none", "same", "partial"]:
    """Whether two arrays share memory: no, element for element, or otherwise (in doubt, otherwise)."""
    if a.device != b.device:
        return "none"
    low_a, high_a = addresses(a)
    low_b, high_b = addresses(b)
    if high_a <= low_b or high_b <= low_a:
        return "none"
    if (a.pointer, a.shape, a.dtype) == (b.pointer, b.shape, b.dtype) and all(
        extent == 1 or stride_a == stride_b
        for extent, stride_a, stride_b in zip(a.shape, a.strides, b.strides, strict=True)
    ):
        return "same"
    try:
        shared = np.shares_memory(_view(a), _view(b), max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        shared = True
    return "partial" if shared else "none"


def addresses(array: Array) -> tuple[int, int]:
    """The lowest address the array uses and one past the highest; nothing without elements."""
    low, high = _layout.span(array.shape, array.strides)
    size = ITEMSIZE[array.dtype]
    return array.pointer + low * size, array.pointer + high * size


class _Interface:
    """NumPy's array interface over a described array."""

    def __init__(self, array: Array) -> None:
        size = ITEMSIZE[array.dtype]
        self.array = array
        self.__array_interface__ = {
            "version": 3,
            "data": (array.pointer, True),
            "shape": array.shape,
            "strides": _in_bytes(array.strides, size),
            "typestr": _storage(array.dtype).str,
        }


def _view(array: Array) -> np.ndarray[Any, Any]:
    """The memory under NumPy's eyes, read-only; bfloat16 as its bits."""
    return np.asarray(_Interface(array))


def _storage(dtype: str) -> np.dtype[Any]:
    """A NumPy dtype that holds this one's bits."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


@lru_cache(maxsize=1024)
def _in_bytes(strides: Strides, size: int) -> Strides:
    return tuple(stride * size for stride in strides)


def _refuse(
    x: Any, function: str, argument: str, error: type[Exception], rule: str, got: object, remedy: str
) -> NoReturn:
    """Raise what is wrong with x, with the facts known about it."""
    raise error(message(function, argument, rule, got, remedy, **_facts(x)))


def _facts(x: Any) -> dict[str, Any]:
    """Shape, dtype and device, as far as x has them and they mean that."""
    shape, dtype, device = (_attribute(x, name) for name in ("shape", "dtype", "device"))
    if not isinstance(x, Array):
        kind, _, index = str(device).partition(":")
        device = (_DEVICE_TYPES[kind], int(index or 0)) if kind in _DEVICE_TYPES else None
    return {
        "shape": tuple(shape) if isinstance(shape, tuple) else None,
        "dtype": None if dtype is None else str(dtype).rpartition(".")[2],  # torch.float32
        "device": device,
    }


def _attribute(x: Any, name: str) -> Any:
    """The attribute, or None: a deleted or nested array raises anything when asked."""
    try:
        return getattr(x, name, None)
    except Exception:
        return None


def _refuse_dtype(x: Any, dtype: str, dtypes: tuple[str, ...], function: str, argument: str) -> NoReturn:
    *most, last = dtypes
    rule = f"have dtype {', '.join(most)} or {last}" if most else f"have dtype {last}"
    _refuse(x, function, argument, TypeError, rule, dtype, "Convert it first.")


def _refuse_stand_in(x: Any, function: str, argument: str) -> NoReturn:
    rule = "hold numbers in memory, not stand for them"
    remedy = "Call it outside tracing, vmap and the like."
    _refuse(x, function, argument, TypeError, rule, f"a {_type_name(x)}", remedy)


def _refuse_misaligned(x: Any, function: str, argument: str, got: str) -> NoReturn:
    _refuse(x, function, argument, ValueError, "be aligned to its elements", got, "Pass a copy.")


def _refuse_device(x: Any, device: str, function: str, argument: str) -> NoReturn:
    _refuse(x, function, argument, NotImplementedError, "be on a CPU or CUDA device", device, "Move it there first.")


def _type_name(x: Any) -> str:
    """As `numpy.matrix`, `list`."""
    return f"{type(x).__module__.partition('.')[0]}.{type(x).__qualname__}".removeprefix("builtins.")


_DEVICE_TYPES = {"cpu": CPU, "cuda": CUDA}
_HOST = (CPU, 0)
_read_address = ctypes.c_size_t.from_address
_DATA = object.__basicsize__


_HUGE = 4 << 20  # bytes from which huge pages pay; NumPy asks for them itself, from the same size


def _advise_huge_pages(address: int, size: int) -> None:
    """Ask for huge pages under a new output: touching small ones for the first time costs more than the arithmetic."""
    if sys.platform == "linux":
        page = mmap.PAGESIZE
        start = -(-address // page) * page
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + size - start), mmap.MADV_HUGEPAGE)


def numpy_address(x: np.ndarray[Any, Any]) -> int:
    """Where a NumPy array's first element is.

    PyArrayObject is the object's header, then the data pointer. Every compiled extension relies on that, and reading it
    takes an eighth of the time of `x.ctypes.data`.
    """
    return _read_address(id(x) + _DATA).value


class _NumPy:
    """NumPy, through its arrays' own attributes."""

    name = "numpy"
    immutable = False
    fixed = True

    def describe(self, x: Any, function: str, argument: str, dtypes: tuple[str, ...], detach: bool) -> Array:
        shape = x.shape
        dtype = x.dtype
        strides, name = _numpy_layout(shape, x.strides, dtype)
        if name not in dtypes:
            if not dtype.isnative:
                remedy = f"Pass {argument}.astype({argument}.dtype.newbyteorder('='))."
                _refuse(x, function, argument, TypeError, "have this machine's byte order", name, remedy)
            _refuse_dtype(x, name, dtypes, function, argument)
        pointer = numpy_address(x)
        if strides is None:
            _refuse_misaligned(x, function, argument, f"strides of {x.strides} bytes")
        if pointer % dtype.itemsize:
            _refuse_misaligned(x, function, argument, f"address {pointer:#x}")
        return Array(pointer, shape, strides, name, _HOST, x.flags.writeable, x, self)

    def empty(self, shape: Shape, strides: Strides, dtype: str, like: Array) -> Output:
        y: np.ndarray[Any, Any] = np.ndarray(shape, dtype, None, 0, _in_bytes(strides, ITEMSIZE[dtype]))
        pointer = numpy_address(y)
        return Output(Array(pointer, shape, strides, dtype, _HOST, True, y, self), lambda: y)

    def from_numpy(self, values: np.ndarray[Any, Any], dtype: str, like: Array) -> Any:
        return np.array(values, dtype)

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        return np.array(array.owner, "float32" if array.dtype == "bfloat16" else None)

    def unchanged(self, array: Array) -> bool:
        return bool(array.owner.flags.writeable) is array.writable

    def version(self, array: Array) -> int | None:
        return None

    def mark_written(self, array: Array) -> None:
        pass


@lru_cache(maxsize=1024)
def _numpy_layout(shape: Shape, strides: Strides, dtype: np.dtype[Any]) -> tuple[Strides | None, str]:
    """Strides in elements, or None where a step is no whole number of them; and the dtype's name."""
    name = _dtype_name(dtype)
    size = dtype.itemsize or 1
    if any(extent > 1 and stride % size for extent, stride in zip(shape, strides, strict=True)):
        return None, name
    return tuple(stride // size for stride in strides), name


@lru_cache
def _dtype_name(dtype: np.dtype[Any]) -> str:
    """`float32`; with the byte order, `>f4`, where that is not the machine's own."""
    return dtype.name if dtype.isnative else dtype.str


class _Torch:
    """PyTorch, through its tensors' own methods."""

    name = "torch"
    immutable = False
    fixed = False

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._strided = torch.strided
        self._names = {getattr(torch, name): name for name in _dlpack.CODES}
        self._dtypes = {name: dtype for dtype, name in self._names.items()}
        self._unpack_dual = torch.autograd.forward_ad.unpack_dual

    def describe(self, x: Any, function: str, argument: str, dtypes: tuple[str, ...], detach: bool) -> Array:
        if x.layout is not self._strided or x.is_nested:
            kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
            _refuse(x, function, argument, TypeError, "be a dense tensor", f"a {kind} one", "Convert it first.")
        device = _HOST if x.is_cpu else self._device(x, function, argument)
        try:
            pointer = x.data_ptr()
        except RuntimeError:
            pointer = 0
        if not pointer and x.numel():
            _refuse_stand_in(x, function, argument)
        dtype = self._names.get(x.dtype)
        if dtype not in dtypes:
            _refuse_dtype(x, dtype or str(x.dtype).removeprefix("torch."), dtypes, function, argument)
        own = not x.requires_grad
        if not detach:
            self._check_detached(x, function, argument)
        if x.is_neg():  # a view whose memory holds the numbers with the other sign
            x, own = x.resolve_neg(), False
            pointer = x.data_ptr()
        if pointer % ITEMSIZE[dtype]:
            _refuse_misaligned(x, function, argument, f"address {pointer:#x}")
        return Array(pointer, tuple(x.shape), x.stride(), dtype, device, own, x, self)

    def _check_detached(self, x: Any, function: str, argument: str) -> None:
        """A gradient asked for in either direction would be lost without a word."""
        if x.requires_grad:
            got = "requires_grad=True"
        elif self._unpack_dual(x).tangent is not None:
            got = "a forward-mode dual tensor"
        else:
            return
        _refuse(x, function, argument, TypeError, "not require a gradient", got, f"Pass {argument}.detach().")

    def _device(self, x: Any, function: str, argument: str) -> tuple[int, int]:
        if not x.is_cuda or self._torch.version.hip:
            _refuse_device(x, "rocm" if x.is_cuda else x.device.type, function, argument)
        return CUDA, x.device.index

    def empty(self, shape: Shape, strides: Strides, dtype: str, like: Array) -> Output:
        y = self._torch.empty_strided(shape, strides, dtype=self._dtypes[dtype], device=like.owner.device)
        if type(y) is not self._torch.Tensor:  # a mode is on that makes tensors of its own
            _refuse_stand_in(y, "cubn", "an output")
        pointer = y.data_ptr()
        if y.nbytes >= _HUGE and like.device == _HOST:
            _advise_huge_pages(pointer, y.nbytes)
        return Output(Array(pointer, shape, strides, dtype, like.device, True, y, self), lambda: y)

    def from_numpy(self, values: np.ndarray[Any, Any], dtype: str, like: Array) -> Any:
        return self._torch.tensor(values, dtype=self._dtypes[dtype], device=like.owner.device)

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        host = array.owner.detach().cpu()
        return np.array((host.float() if array.dtype == "bfloat16" else host).numpy())

    def unchanged(self, array: Array) -> bool:
        x = array.owner  # assigning to x.data moves or converts it
        return (
            x.data_ptr() == array.pointer
            and x.dtype is self._dtypes[array.dtype]
            and x.shape == array.shape
            and x.stride() == array.strides
            and x.requires_grad is not array.writable
        )

    def version(self, array: Array) -> int | None:
        return None if array.owner.is_inference() else int(array.owner._version)

    def mark_written(self, array: Array) -> None:
        self._torch.autograd.graph.increment_version(array.owner)


class _Cupy:
    """CuPy, through its arrays' own attributes."""

    name = "cupy"
    immutable = False
    fixed = True

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._is_rocm = bool(cupy.cuda.runtime.is_hip)

    def describe(self, x: Any, function: str, argument: str, dtypes: tuple[str, ...], detach: bool) -> Array:
        if self._is_rocm:
            _refuse_device(x, "rocm", function, argument)
        strides, name = _numpy_layout(x.shape, x.strides, x.dtype)
        if name not in dtypes:
            _refuse_dtype(x, name, dtypes, function, argument)
        if strides is None:
            _refuse_misaligned(x, function, argument, f"strides of {x.strides} bytes")
        pointer = x.data.ptr
        if pointer % x.itemsize:
            _refuse_misaligned(x, function, argument, f"address {pointer:#x}")
        return Array(pointer, x.shape, strides, name, (CUDA, x.device.id), True, x, self)

    def empty(self, shape: Shape, strides: Strides, dtype: str, like: Array) -> Output:
        storage = like.owner.dtype if dtype == like.dtype else np.dtype(dtype)  # NumPy has no bfloat16 of its own
        with like.owner.device:
            memory = self._cupy.cuda.alloc(max(math.prod(shape), 1) * storage.itemsize)
            y = self._cupy.ndarray(shape, storage, memory, _in_bytes(strides, storage.itemsize))
        return Output(Array(y.data.ptr, shape, strides, dtype, like.device, True, y, self), lambda: y)

    def from_numpy(self, values: np.ndarray[Any, Any], dtype: str, like: Array) -> Any:
        with like.owner.device:
            return self._cupy.array(values, dtype)

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        values: np.ndarray[Any, Any] = array.owner.get()
        return values.astype("float32") if array.dtype == "bfloat16" else values

    def unchanged(self, array: Array) -> bool:
        return True

    def version(self, array: Array) -> int | None:
        return None

    def mark_written(self, array: Array) -> None:
        pass


class _Jax:
    """JAX, through its arrays' capsules. An array is never written: others may hold its memory."""

    name = "jax"
    immutable = True
    fixed = False

    def __init__(self, jax: Any) -> None:
        self._jax = jax

    def describe(self, x: Any, function: str, argument: str, dtypes: tuple[str, ...], detach: bool) -> Array:
        if x.is_deleted():
            _refuse(x, function, argument, ValueError, "not be deleted", "a deleted array", "Was it donated?")
        devices = len(x.sharding.device_set)
        if devices > 1:
            remedy = "Call it on each shard."
            _refuse(x, function, argument, ValueError, "be on one device", f"one on {devices} devices", remedy)
        dtype = _dtype_name(x.dtype)
        if dtype not in dtypes:  # some have no capsule
            _refuse_dtype(x, dtype, dtypes, function, argument)
        return _read(x, function, argument, dtypes, self)

    def empty(self, shape: Shape, strides: Strides, dtype: str, like: Array) -> Output:
        output, exporter = _new_output(shape, strides, dtype, like.device, self)
        device = like.owner.device

        def finish() -> Any:
            y = self._adopt(exporter)
            return y if y.device == device else self._jax.device_put(y, device)

        return Output(output, finish)

    def _adopt(self, exporter: _dlpack.Exporter) -> Any:
        """A JAX array in the exporter's memory."""
        if exporter.dtype != "float64":
            return self._jax.dlpack.from_dlpack(exporter)
        with self._jax.enable_x64(True):  # without it JAX returns float32
            return self._jax.dlpack.from_dlpack(exporter)

    def from_numpy(self, values: np.ndarray[Any, Any], dtype: str, like: Array) -> Any:
        with self._jax.enable_x64(dtype == "float64"):
            return self._jax.device_put(values.astype(dtype), like.owner.device)

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        return np.array(array.owner, "float32" if array.dtype == "bfloat16" else None)

    def unchanged(self, array: Array) -> bool:
        return False

    def version(self, array: Array) -> int | None:
        return None

    def mark_written(self, array: Array) -> None:
        raise TypeError("a JAX array is never written")


class _Foreign:
    """A library cubn has never heard of, by `__dlpack__` and `from_dlpack`."""

    immutable = False
    fixed = False

    def __init__(self, name: str, from_dlpack: Callable[[Any], Any] | None) -> None:
        self.name = name
        self._from_dlpack = from_dlpack

    def describe(self, x: Any, function: str, argument: str, dtypes: tuple[str, ...], detach: bool) -> Array:
        return _read(x, function, argument, dtypes, self)

    def empty(self, shape: Shape, strides: Strides, dtype: str, like: Array) -> Output:
        adopt = self._from_dlpack
        if adopt is None:
            raise TypeError(
                message("cubn", "x's library", "have from_dlpack, to make outputs", self.name, "Pass out=.")
            )
        output, exporter = _new_output(shape, strides, dtype, like.device, self)
        return Output(output, lambda: adopt(exporter))

    def from_numpy(self, values: np.ndarray[Any, Any], dtype: str, like: Array) -> Any:
        return NUMPY.from_numpy(values, dtype, like)

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        values = _host_copy(array)
        if array.dtype == "bfloat16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values

    def unchanged(self, array: Array) -> bool:
        return False

    def version(self, array: Array) -> int | None:
        return None

    def mark_written(self, array: Array) -> None:
        pass


def _read(x: Any, function: str, argument: str, dtypes: tuple[str, ...], library: Library) -> Array:
    """Describe x by its capsule."""
    kind = int(x.__dlpack_device__()[0])
    if kind not in (CPU, CUDA):
        _refuse_device(x, _OTHER_DEVICES.get(kind, f"DLPack device type {kind}"), function, argument)
    try:
        tensor = _dlpack.read(x, None if kind == CPU else _LEGACY_STREAM)
    except BufferError as error:
        rule = "be an array its library can export"
        raise BufferError(message(function, argument, rule, f"'{error}'", **_facts(x))) from error
    capsule, pointer, shape, strides, dtype, device, writable = tensor
    if strides is None:
        strides = _layout.c_strides(shape)
    array = Array(pointer, shape, strides, dtype, _HOST if kind == CPU else device, writable, x, library, capsule)
    if dtype not in dtypes:
        _refuse_dtype(array, dtype, dtypes, function, argument)
    if pointer % ITEMSIZE[dtype]:
        _refuse_misaligned(array, function, argument, f"address {pointer:#x}")
    return array


def _buffer(shape: Shape, strides: Strides, dtype: str) -> np.ndarray[Any, Any]:
    """Host memory aligned as JAX asks for it: what is not, it copies."""
    storage = _storage(dtype)
    memory = np.empty(math.prod(shape) * storage.itemsize + _ALIGNMENT, np.uint8)
    offset = -numpy_address(memory) % _ALIGNMENT
    return np.ndarray(shape, storage, memory, offset, _in_bytes(strides, storage.itemsize))


def _new_output(
    shape: Shape, strides: Strides, dtype: str, device: tuple[int, int], library: Library
) -> tuple[Array, _dlpack.Exporter]:
    """Memory of ours for an output of a library, and what it will take it over from."""
    if device[0] == CPU:
        buffer = _buffer(shape, strides, dtype)
        pointer, capsule_of = buffer.ctypes.data, None
    else:
        from cubn.backends import cuda

        buffer = cuda.new_buffer(shape, _in_bytes(strides, ITEMSIZE[dtype]), _storage(dtype), device[1])
        pointer, capsule_of = buffer.data.ptr, cuda.capsule_of
    exporter = _dlpack.Exporter(buffer, dtype, capsule_of)
    return Array(pointer, shape, strides, dtype, device, True, buffer, library), exporter


def _host_copy(array: Array) -> np.ndarray[Any, Any]:
    """The memory's bits, as `_storage` has them, in NumPy."""
    if array.device[0] == CPU:
        return np.array(_view(array))
    from cubn.backends import cuda

    strides = _in_bytes(array.strides, ITEMSIZE[array.dtype])
    bits: np.ndarray[Any, Any] = cuda.host_copy(
        array.pointer, array.shape, strides, _storage(array.dtype), array.owner, array.device[1]
    )
    return bits


_ALIGNMENT = 64
_LEGACY_STREAM = 1  # DLPack's number for CUDA's legacy default stream, where the CUDA backend works on such arrays
_OTHER_DEVICES = {
    3: "pinned host memory",
    4: "opencl",
    7: "vulkan",
    8: "metal",
    10: "rocm",
    13: "cuda managed memory",
    14: "oneapi",
}

NUMPY = _NumPy()
_Describer = Callable[[Any, str, str, tuple[str, ...], bool], Array]
_DESCRIBERS: dict[type, _Describer] = {np.ndarray: NUMPY.describe, np.memmap: NUMPY.describe}


def _describer(x: Any, function: str, argument: str) -> _Describer:
    """Who describes arrays of x's type, on meeting the first one; an error if nobody does."""
    kind = type(x)
    torch, jax, cupy = (sys.modules.get(name) for name in ("torch", "jax", "cupy"))
    if isinstance(x, np.ndarray):
        _refuse_subclass(x, function, argument)
    if torch and isinstance(x, torch.Tensor):
        if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            _refuse_stand_in(x, function, argument)
        found = _torch(torch).describe
    elif jax and isinstance(x, jax.Array):
        if isinstance(x, jax.core.Tracer):
            _refuse_stand_in(x, function, argument)
        found = _jax(jax).describe
    elif cupy and isinstance(x, cupy.ndarray):
        found = _cupy(cupy).describe
    elif hasattr(kind, "__dlpack__"):
        found = _foreign(*_home(x)).describe
    else:
        remedy = f"Pass numpy.asarray({argument})."
        _refuse(x, function, argument, TypeError, "be an array with __dlpack__", f"a {_type_name(x)}", remedy)
    _DESCRIBERS[kind] = found
    return found


def _refuse_subclass(x: Any, function: str, argument: str) -> NoReturn:
    """Subclasses of NumPy's array mean more, or other, than their numbers: masks, units, matrix products."""
    masked = isinstance(x, np.ma.MaskedArray)
    plain = f"{argument}.data, and the valid positions as mask" if masked else f"numpy.asarray({argument})"
    _refuse(x, function, argument, TypeError, "be a plain numpy.ndarray", f"a {_type_name(x)}", f"Pass {plain}.")


def _home(x: Any) -> tuple[str, Callable[[Any], Any] | None]:
    """The name of x's library, and its from_dlpack."""
    name = type(x).__module__.partition(".")[0]
    namespace = x.__array_namespace__() if hasattr(x, "__array_namespace__") else sys.modules.get(name)
    return name, getattr(namespace, "from_dlpack", None)


# one of each library
_torch, _jax, _cupy, _foreign = lru_cache(_Torch), lru_cache(_Jax), lru_cache(_Cupy), lru_cache(_Foreign)
