"""DLPack capsules of the stand-in's arrays: on a CUDA device, by what they say."""

import ctypes
import functools

from tests.interop import exporter

CODES = {"i": 0, "u": 1, "f": 2, "b": 6}

_names = {kind: ctypes.create_string_buffer(name) for kind, name in exporter._USED.items()}


def export(array, versioned):
    """A capsule of an array, which it keeps."""
    found = exporter.Exporter(
        shape=array.shape,
        strides=[step // array.itemsize for step in array.strides],
        memory=array,
        data=array.data.ptr,
        device=(exporter.CUDA, array.data.device_id),
        code=exporter.BFLOAT if array.dtype.name == "bfloat16" else CODES[array.dtype.kind],
        bits=8 * array.itemsize,
        version=(1, 0) if versioned else None,
    )
    return found.__dlpack__()


def take_over(capsule):
    """As a consumer does: the capsule's tensor, its shape, and a function that says that it is no longer needed."""
    for kind, name in exporter.NAMES.items():
        if exporter._is_valid(id(capsule), name):
            address = exporter._get(id(capsule), name)
            exporter._rename(capsule, _names[kind])
            tensor = kind.from_address(address).tensor
            shape = ctypes.cast(tensor.shape, ctypes.POINTER(ctypes.c_int64))[: tensor.ndim]
            return tensor, shape, functools.partial(exporter._DELETERS[kind], address)
    raise ValueError("a used capsule")
