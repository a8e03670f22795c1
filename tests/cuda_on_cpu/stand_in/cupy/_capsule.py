"""DLPack capsules of the stand-in's arrays: on a CUDA device, by what they say."""

import ctypes
import functools
import itertools

from tests.dlpack import NAMES, Managed, Tensor, Versioned, address_of, integers, new

CUDA = 2
CODES = {"i": 0, "u": 1, "f": 2, "b": 6}

_api = ctypes.pythonapi
_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Destructor = ctypes.PYFUNCTYPE(None, ctypes.py_object)
_is_valid = _api["PyCapsule_IsValid"]
_is_valid.argtypes, _is_valid.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_int
_get = _api["PyCapsule_GetPointer"]
_get.argtypes, _get.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
_rename = _api["PyCapsule_SetName"]
_rename.argtypes, _rename.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_int

_contexts = itertools.count(1)
_held = {}  # what capsules keep
_names = {kind: ctypes.create_string_buffer(b"used_" + name) for kind, name in NAMES.items()}


def _deleter(kind):
    return _Deleter(lambda address: _held.pop(kind.from_address(address).context, None) and None)


_DELETERS = {kind: _deleter(kind) for kind in NAMES}


@_Destructor
def _destroy(capsule):
    for kind, name in NAMES.items():
        if _is_valid(capsule, name):
            _DELETERS[kind](_get(capsule, name))


def export(array, versioned):
    """A capsule of an array, which it keeps."""
    kind = Versioned if versioned else Managed
    found = kind()
    shape = integers(array.shape)
    strides = integers([step // array.itemsize for step in array.strides])
    code = 4 if array.dtype.name == "bfloat16" else CODES[array.dtype.kind]
    found.tensor = Tensor(
        array.data.ptr,
        CUDA,
        array.data.device_id,
        len(array.shape),
        code,
        8 * array.itemsize,
        1,
        address_of(shape),
        address_of(strides),
        0,
    )
    if versioned:
        found.major, found.minor = 1, 0
    found.context = context = next(_contexts)
    found.deleter = ctypes.cast(_DELETERS[kind], ctypes.c_void_p)
    _held[context] = found, shape, strides, array
    return new(ctypes.addressof(found), NAMES[kind], ctypes.cast(_destroy, ctypes.c_void_p))


def take_over(capsule):
    """As a consumer does: the capsule's tensor, and a function that says that it is no longer needed."""
    for kind, name in NAMES.items():
        if _is_valid(capsule, name):
            address = _get(capsule, name)
            _rename(capsule, ctypes.cast(_names[kind], ctypes.c_char_p))
            found = kind.from_address(address)
            return found.tensor, functools.partial(_DELETERS[kind], address)
    raise ValueError("a used capsule")
