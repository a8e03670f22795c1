"""PyTorch's pickled objects as data: a tensor is a storage, and where in it its numbers are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cubn.health.files.pickles import Calls, Global, Opaque
from cubn.health.files.tensors import Tensor, itemsize
from cubn.health.files.unreadable import UnreadableFile

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
MOST_AXES = 64


@dataclass(frozen=True)
class Storage:
    """Numbers in the file, by their key."""

    key: str
    dtype: str


Read = Callable[[Storage, int, int], bytes]
"""Bytes of a storage: from where, how many."""


def named(persistent_id: Any) -> Storage | Global:
    """What a persistent id is of: ("storage", type, key, device, numel), or ("module", type, and its source)."""
    match persistent_id:
        case ("module", Global() as kind, *_):
            return kind
        case ("storage", Global() as kind, str() as key, *_):
            return Storage(key, STORAGES.get(kind.name, kind.name.removesuffix("Storage").lower()))
    raise UnreadableFile("its pickle refers to something that is no storage of torch")


def calls(read: Read, big_endian: bool = False) -> Calls:
    """What the calls in a checkpoint of torch give, tensors as `Tensor`."""

    def tensor(of: Any, offset: Any, shape: Any, strides: Any, *others: Any, dtype: str | None = None) -> Any:
        if not isinstance(of, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
            return Opaque(None)
        if len(shape) != len(strides) or len(shape) > MOST_AXES:
            raise UnreadableFile("it has a tensor whose shape and strides do not fit")
        if not all(isinstance(number, int) and 0 <= number < 1 << 62 for number in (offset, *shape, *strides)):
            raise UnreadableFile("it has a tensor with a negative or impossible size, stride or offset")
        dtype = dtype or of.dtype
        return Tensor(dtype, shape, lambda: _dense(read, of, itemsize(dtype), offset, shape, strides), big_endian)

    def tensor_with_dtype(*arguments: Any) -> Any:
        """Of a storage of bytes: after shape, strides, requires_grad and hooks its dtype follows."""
        name = arguments[6].name if isinstance(arguments[6], Global) else "unknown"
        return tensor(*arguments[:4], dtype=name)

    tensors: Calls = {
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_tensor_v3": tensor_with_dtype,
        "torch._utils._rebuild_parameter": _first,
        "torch._utils._rebuild_parameter_with_state": _first,
    }

    def of_a_type(function: Any, kind: Any, arguments: Any, *others: Any) -> Any:
        """Of a tensor's subclass."""
        call = tensors.get(str(function)) if isinstance(function, Global) else None
        return call(*arguments) if call else Opaque(None)

    return {
        **tensors,
        "torch._tensor._rebuild_from_type_v2": of_a_type,
        "torch.Size": _first,
        "collections.OrderedDict": _mapping,
        "collections.defaultdict": lambda *arguments: {},
    }


def _first(value: Any, *others: Any) -> Any:
    return value


def _mapping(items: Any = (), *others: Any) -> dict[Any, Any]:
    """Empty, to be filled afterwards; with its items in the form of Python 2."""
    return {key: value for key, value in items if isinstance(key, str | int)}


def _dense(read: Read, of: Storage, size: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """The bytes of a number or a vector."""
    length, stride = (shape[0], strides[0]) if shape else (1, 1)
    if length == 0:
        return b""
    span = ((length - 1) * stride + 1) * size
    if len(shape) > 1:
        raise UnreadableFile("a tensor of a batch norm is no vector")
    data = read(of, offset * size, span)
    return data * length if stride == 0 else np.frombuffer(data, f"V{size}")[::stride].tobytes()
