"""PyTorch."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import numpy as np

from cubn._arrays import dlpack
from cubn._arrays.library import HOST, ITEMSIZE, Array, Library, Output
from cubn._arrays.refusals import refuse, refuse_device, refuse_dtype, refuse_misaligned, refuse_stand_in
from cubn._layout import Shape, Strides
from cubn.backends import CUDA

_HUGE = 4 << 20  # bytes from which huge pages pay; NumPy asks for them itself, from the same size


class Torch(Library):
    """PyTorch, through its tensors' own methods."""

    name = "torch"

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._strided = torch.strided
        self._names = {getattr(torch, name): name for name in dlpack.CODES}
        self._dtypes = {name: dtype for dtype, name in self._names.items()}
        self._unpack_dual = torch.autograd.forward_ad.unpack_dual

    def describe(self, x: Any, function: str, argument: str, dtypes: tuple[str, ...], detach: bool) -> Array:
        if x.layout is not self._strided or x.is_nested:
            kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
            refuse(x, function, argument, TypeError, "be a dense tensor", f"a {kind} one", "Convert it first.")
        device = HOST if x.is_cpu else self._device(x, function, argument)
        try:
            pointer = x.data_ptr()
        except RuntimeError:
            pointer = 0
        if not pointer and x.numel():
            refuse_stand_in(x, function, argument)
        dtype = self._names.get(x.dtype)
        if dtype not in dtypes:
            refuse_dtype(x, dtype or str(x.dtype).removeprefix("torch."), dtypes, function, argument)
        own = not x.requires_grad
        if not detach:
            self._check_detached(x, function, argument)
        if x.is_neg():  # a view whose memory holds the numbers with the other sign
            x, own = x.resolve_neg(), False
            pointer = x.data_ptr()
        if pointer % ITEMSIZE[dtype]:
            refuse_misaligned(x, function, argument, f"address {pointer:#x}")
        return Array(pointer, tuple(x.shape), x.stride(), dtype, device, own, x, self)

    def _check_detached(self, x: Any, function: str, argument: str) -> None:
        """A gradient asked for in either direction would be lost without a word."""
        if x.requires_grad:
            got = "requires_grad=True"
        elif self._unpack_dual(x).tangent is not None:
            got = "a forward-mode dual tensor"
        else:
            return
        refuse(x, function, argument, TypeError, "not require a gradient", got, f"Pass {argument}.detach().")

    def _device(self, x: Any, function: str, argument: str) -> tuple[int, int]:
        if not x.is_cuda or self._torch.version.hip:
            refuse_device(x, "rocm" if x.is_cuda else x.device.type, function, argument)
        return CUDA, x.device.index

    def empty(self, shape: Shape, strides: Strides, dtype: str, like: Array) -> Output:
        y = self._torch.empty_strided(shape, strides, dtype=self._dtypes[dtype], device=like.owner.device)
        if type(y) is not self._torch.Tensor:  # a mode is on that makes tensors of its own
            refuse_stand_in(y, "cubn", "an output")
        pointer = y.data_ptr()
        if y.nbytes >= _HUGE and like.device == HOST:
            _advise_huge_pages(pointer, y.nbytes)
        return Output(Array(pointer, shape, strides, dtype, like.device, True, y, self), lambda: y)

    def from_numpy(self, values: np.ndarray[Any, Any], dtype: str, like: Array) -> Any:
        rounded = values if dtype == "bfloat16" else values.astype(dtype)  # in this thread, not in torch's own
        return self._torch.tensor(rounded, dtype=self._dtypes[dtype], device=like.owner.device)

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


def _advise_huge_pages(address: int, size: int) -> None:
    """Ask for huge pages under a new output: touching small ones for the first time costs more than the arithmetic."""
    if sys.platform == "linux":
        page = mmap.PAGESIZE
        start = -(-address // page) * page
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + size - start), mmap.MADV_HUGEPAGE)
