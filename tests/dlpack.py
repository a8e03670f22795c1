"""The structs of dlpack.h, version 1, and capsules of them.

Nothing of cubn's reader is used, so the two check each other.
"""

import ctypes


class Tensor(ctypes.Structure):
    """DLTensor, flat: the device is (device_type, device_index), the type (code, bits, lanes).

    Pointers are plain addresses, so that any can be written down.
    """

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class Managed(ctypes.Structure):
    """DLManagedTensor, as exporters older than DLPack 1 make it."""

    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class Versioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


NAMES = {Managed: b"dltensor", Versioned: b"dltensor_versioned"}

new = ctypes.pythonapi["PyCapsule_New"]  # by index: attributes are shared with whoever else sets argument types
new.argtypes, new.restype = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p), ctypes.py_object


def integers(values):
    """An array of int64 for shape or strides; None for NULL."""
    return None if values is None else (ctypes.c_int64 * len(values))(*values)


def address_of(struct):
    """Where it is; None of None, for NULL."""
    return None if struct is None else ctypes.addressof(struct)
