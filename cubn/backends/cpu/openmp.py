"""The OpenMP runtime that this process has loaded already, if any: PyTorch's, or another library's.

A runtime keeps a team of threads for each thread that enters a parallel region, and lets them spin for a while after
each, for the next one. Two teams, or a team and a pool, hold up each other: a kernel run in the team that a network's
convolutions are run in finds it awake, and leaves it awake for them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Runtime(NamedTuple):
    """Addresses of functions of a runtime, and the file it was loaded from."""

    file: str
    max_threads: int
    thread_number: int
    parallel: int  # GOMP_parallel, which LLVM's and Intel's have on Linux as well; else __kmpc_fork_call
    is_gnu: bool

    @property
    def threads(self) -> int:
        """How many it gives the calling thread by default."""
        return int(ctypes.CFUNCTYPE(ctypes.c_int)(self.max_threads)())


class _Location(ctypes.Structure):
    """LLVM's ident_t."""

    _fields_ = (
        ("reserved", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("more", ctypes.c_int32 * 2),
        ("source", ctypes.c_char_p),
    )


LOCATION = _Location(0, 2, (0, 0), b";cubn;run_in_team;0;0;;")  # 2: called by code compiled for this runtime


def loaded() -> Runtime | None:
    """The runtime that is loaded: where there are several, the one that PyTorch computes with."""
    for library in _libraries():
        if runtime := _runtime(library):
            return runtime
    return None


def tell_thread() -> None:
    """Have PyTorch set the number of threads of the calling thread, which it does when it first computes there."""
    if torch := sys.modules.get("torch"):
        with contextlib.suppress(AttributeError):  # half imported, or not PyTorch
            torch.get_num_threads()


def _libraries() -> Iterator[ctypes.CDLL]:
    """Where to look, one after the other. A function of a library is its own, or one of those that it is linked to."""
    if os.name != "posix":
        return
    yield ctypes.CDLL(None)  # what is preloaded takes the place of what libraries bring along
    paths: list[str] = []
    if file := getattr(sys.modules.get("torch"), "__file__", None):
        paths += map(str, Path(file).parent.glob("lib/libtorch_cpu.*"))
    with contextlib.suppress(ImportError):
        from threadpoolctl import threadpool_info  # type: ignore[import-untyped]

        paths += sorted(library["filepath"] for library in threadpool_info() if library["user_api"] == "openmp")
    for path in paths:
        with contextlib.suppress(OSError):  # which is not loaded
            yield ctypes.CDLL(path, mode=os.RTLD_LAZY | os.RTLD_NOLOAD)


def _runtime(library: ctypes.CDLL) -> Runtime | None:
    """What a library has, or is linked to."""
    max_threads, number = (_address(library, name) for name in ("omp_get_max_threads", "omp_get_thread_num"))
    gnu, llvm = (_address(library, name) for name in ("GOMP_parallel", "__kmpc_fork_call"))
    if not (max_threads and number and (gnu or llvm)):
        return None
    return Runtime(_file_of(max_threads), max_threads, number, gnu or llvm, bool(gnu))


def _address(library: ctypes.CDLL, name: str) -> int:
    try:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    except AttributeError:
        return 0


class _Place(ctypes.Structure):
    """Dl_info."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _file_of(address: int) -> str:
    place = _Place()
    found = ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(place))
    return os.fsdecode(place.file) if found and place.file else "?"
