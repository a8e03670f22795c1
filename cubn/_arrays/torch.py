"""PyTorch."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import numpy as np

from cubn._arrays.library import ALIGNMENT, Allocate, Array, Layout, Library, Output
from cubn._arrays.memory import rounded, view, widened
from cubn._arrays.refusals import refuse, refuse_device, refuse_dtype, refuse_misaligned, refuse_stand_in
from cubn._layout import Shape, Strides, Unaddressable, is_dense, span
from cubn._types import CUDA, DTYPES, HOST, ITEMSIZE
from cubn.errors import reporting_as

_HUGE = 4 << 20  # bytes from which huge pages pay; NumPy asks for them itself, from the same size


class Torch(Library):
    """PyTorch, through its tensors' own methods."""

    name = "torch"
    conversion = "Pass {0}.to(torch.{1})."
    counts_versions = True

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._strided = torch.strided
        self._names = {getattr(torch, name): name for name in DTYPES}
        self._dtypes = {name: dtype for dtype, name in self._names.items()}
        self._forward_ad = torch.autograd.forward_ad
        self._increment_version = torch.autograd.graph.increment_version
        self._tracing_state = torch._C._get_tracing_state
        self._dispatch_modes = torch._C._len_torch_dispatch_stack
        self._function_modes = torch._C._len_torch_function_stack
        self._transformation = torch._C._functorch.peek_interpreter_stack

    def describe(self, x: Any, argument: str, dtypes: tuple[str, ...], detach: bool) -> Array:
        if x.layout is not self._strided or x.is_nested:
            self._refuse_layout(x, argument)
        if self._tracing_state() or self._dispatch_modes() or self._function_modes():
            self._check_modes(x, argument)
        device = HOST if x.is_cpu else self._device(x, argument)
        pointer = _address(x)
        if not pointer and x.numel():
            self._refuse_without_memory(x, argument)
        dtype = self._names.get(x.dtype)
        if dtype not in dtypes:
            conversion = "Pass {0}.dequantize()." if x.is_quantized else self.conversion
            refuse_dtype(x, dtype or str(x.dtype).removeprefix("torch."), dtypes, argument, conversion)
        own = not x.requires_grad
        if not (own or detach):
            remedy = f"Pass {argument}.detach()."
            refuse(x, argument, TypeError, "not require a gradient", "requires_grad=True", remedy)
        if self._forward_ad._current_level >= 0 and self._is_dual(x):
            remedy = f"Pass {argument}.detach()."
            refuse(x, argument, TypeError, "have no forward-mode tangent", "a dual tensor", remedy)
        if x.is_neg():  # a view whose memory holds the numbers with the other sign
            x, own = x.resolve_neg(), False
            pointer = x.data_ptr()
        size = ITEMSIZE[dtype]
        if pointer % size:
            refuse_misaligned(x, argument, f"address {pointer:#x}")
        shape, strides = tuple(x.shape), x.stride()
        reach = span(shape, strides)[1]  # 0 without elements, which may begin past the end
        if reach and (x.storage_offset() + reach) * size > x.untyped_storage().nbytes():
            self._refuse_without_memory(x, argument)
        return Array(pointer, shape, strides, dtype, device, own, x, self)

    def _refuse_layout(self, x: Any, argument: str) -> NoReturn:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        dense = f"torch.nested.to_padded_tensor({argument}, 0)" if x.is_nested else f"{argument}.to_dense()"
        refuse(x, argument, TypeError, "be a dense tensor", f"a {kind} one", f"Pass {dense}.")

    def _check_modes(self, x: Any, argument: str) -> None:
        """Raise where operations are recorded or faked: the numbers would be constants of the recording.

        Modes that watch what torch does, or say where it does it, are none of cubn's business.
        """
        c = self._torch._C
        recorders = {"FAKE": "FakeTensorMode", "FUNCTIONAL": "functionalization", "PROXY": "make_fx or torch.export"}
        active = [
            name for key, name in recorders.items() if c._get_dispatch_mode(getattr(c._TorchDispatchModeKey, key))
        ]
        if self._torch._ops._len_torch_dispatch_stack_pre_dispatch():
            active.append(recorders["PROXY"])
        if self._tracing_state():
            active.append("torch.jit.trace")
        if active:
            refuse_stand_in(x, argument, f" under {active[-1]}")

    def _is_dual(self, x: Any) -> bool:
        return self._forward_ad.unpack_dual(x).tangent is not None

    def _refuse_without_memory(self, x: Any, argument: str) -> NoReturn:
        """x has elements where there is no memory of its own: it is no plain tensor, or its storage was freed."""
        try:
            held = x.untyped_storage().nbytes()
        except NotImplementedError:
            held = None
        if held is None or x._is_zerotensor() or self._torch._is_functional_tensor(x):
            refuse_stand_in(x, argument)
        got, remedy = f"a storage of {held} bytes", "It was freed or cut: restore it first, as FSDP's unshard does."
        refuse(x, argument, ValueError, "lie inside its storage", got, remedy)

    def _device(self, x: Any, argument: str) -> tuple[int, int]:
        if not x.is_cuda or self._torch.version.hip:
            name = "rocm" if x.is_cuda else x.device.type
            filled = f"It holds no numbers: fill torch.empty_like({argument}, device='cpu') and pass that."
            refuse_device(x, name, argument, filled if name == "meta" else f"Pass {argument}.cpu().")
        return CUDA, x.device.index

    def signature(self, x: Any) -> tuple[Layout, int] | None:
        if self._tracing_state() or self._dispatch_modes() or self._function_modes():
            return None
        if self._transformation() is not None:  # of torch.func, which may make outputs that stand for others
            return None
        if self._forward_ad._current_level >= 0 or x.requires_grad or x.layout is not self._strided or x.is_nested:
            return None
        pointer = _address(x)
        if not pointer or x.is_neg():
            return None
        shape, strides = x.shape, x.stride()
        try:
            reach = x.numel() if x.is_contiguous() else span(shape, strides)[1]
        except Unaddressable:
            return None
        if (x.storage_offset() + reach) * x.itemsize > x.untyped_storage().nbytes():
            return None
        index = -1 if x.is_cpu else x.get_device() if x.is_cuda else None  # other accelerators count theirs alike
        return (shape, strides, x.dtype, pointer % ALIGNMENT, index), pointer

    def is_still(self, x: Any, layout: Layout, pointer: int) -> bool:
        shape, _, _, remainder, _ = layout
        return _address(x) == pointer and pointer % ALIGNMENT == remainder and not x.requires_grad and x.shape == shape

    def layout(self, array: Array) -> Layout | None:
        dtype, index = self._dtypes[array.dtype], -1 if array.device == HOST else array.device[1]
        return array.shape, array.strides, dtype, array.pointer % ALIGNMENT, index

    def allocator(self, shape: Shape, strides: Strides, dtype: str, like: Array) -> Allocate:
        if 0 in shape or not is_dense(shape, strides) or math.prod(shape) * ITEMSIZE[dtype] >= _HUGE:
            return super().allocator(shape, strides, dtype, like)
        like, empty_like = like.nowhere(), self._torch.empty_like  # a call that is kept holds no array of a caller's
        template = self.empty(shape, strides, dtype, like).array.owner  # a caller's own may be another by now
        template.untyped_storage().resize_(0)

        def allocate(x: Any) -> tuple[Any, int]:
            y = empty_like(template)
            pointer = _address(y)
            if not pointer:  # made by a transformation: `empty` says so
                return super(Torch, self).allocator(shape, strides, dtype, like)(x)
            return y, pointer

        return allocate

    def empty(self, shape: Shape, strides: Strides, dtype: str, like: Array) -> Output:
        device = "cpu" if like.device == HOST else f"cuda:{like.device[1]}"  # where its owner may have left
        y = self._torch.empty_strided(shape, strides, dtype=self._dtypes[dtype], device=device)
        pointer = _address(y) if type(y) is self._torch.Tensor else 0
        if not pointer and 0 not in shape:  # a mode or a transformation makes tensors of its own
            with reporting_as("cubn"):
                refuse_stand_in(y, "an output")
        if y.nbytes >= _HUGE and like.device == HOST:
            _advise_huge_pages(pointer, y.nbytes)
        return Output(Array(pointer, shape, strides, dtype, like.device, True, y, self), lambda: y)

    def from_numpy(self, values: np.ndarray[Any, Any], dtype: str, like: Array) -> Any:
        return self._torch.tensor(rounded(values, dtype), dtype=self._dtypes[dtype], device=like.owner.device)

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        host = array.owner.detach().to("cpu", copy=True)  # `numpy` makes a storage one that cannot be resized
        try:
            values: np.ndarray[Any, Any] = (host.float() if array.dtype == "bfloat16" else host).numpy()
            return values
        except RuntimeError:
            if array.device != HOST:
                raise
            return widened(np.array(view(array)), array.dtype)  # inside of torch.func, torch itself cannot

    def watch(self, arrays: Iterable[Array]) -> Callable[[], bool]:
        level, is_dual, dtypes = self._forward_ad, self._is_dual, self._dtypes
        watched = tuple(
            (x, x.data_ptr, x.stride, x.numel, pointer, dtypes[dtype], strides, shape[0], not writable)
            for pointer, shape, strides, dtype, _, writable, x, *_ in arrays
        )

        def unchanged() -> bool:
            for x, data_ptr, stride, numel, pointer, dtype, strides, size, needs_gradient in watched:
                if (
                    data_ptr() != pointer  # assigning to x.data moves or converts it
                    or x.dtype is not dtype
                    or stride() != strides  # of one axis, as a vector has
                    or numel() != size
                    or x.requires_grad is not needs_gradient
                ):
                    return False
            return level._current_level < 0 or not any(is_dual(x) for x, *_ in watched)

        return unchanged

    def count(self, mask: Any) -> int:
        return int(self._torch.count_nonzero(mask))

    def version(self, x: Any) -> int | None:
        return None if x.is_inference() else int(x._version)

    def mark_written(self, *arrays: Any) -> None:
        self._increment_version(arrays)


def _address(x: Any) -> int:
    """The address of x's first element; 0 where it has none."""
    try:
        address: int = x.data_ptr()
    except RuntimeError:
        return 0
    return address


def _advise_huge_pages(address: int, size: int) -> None:
    """Ask for huge pages under a new output: touching small ones for the first time costs more than the arithmetic."""
    if sys.platform == "linux":
        page = mmap.PAGESIZE
        start = -(-address // page) * page
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + size - start), mmap.MADV_HUGEPAGE)
