"""The OpenMP runtime that this process has loaded already, if any: PyTorch's, or another library's.

A runtime keeps a team of threads for each thread that enters a parallel region, and lets them spin for a while after
each, for the next one. Two teams, or a team and a pool, hold up each other: a kernel run in the team that a network's
convolutions are run in finds it awake, and leaves it awake for them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = os.name == "posix"
"""Whether runtimes are looked for on this system."""


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


class Found(NamedTuple):
    """A runtime, if any, and whether no library that is loaded later may bring one to be preferred."""

    runtime: Runtime | None
    for_good: bool


class _Location(ctypes.Structure):
    """LLVM's ident_t."""

    _fields_ = (
        ("reserved", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("more", ctypes.c_int32 * 2),
        ("source", ctypes.c_char_p),
    )


LOCATION = _Location(0, 2, (0, 0), b";cubn;run_in_team;0;0;;")  # 2: called by code compiled for this runtime


def loaded() -> Found:
    """The runtime that is loaded: where there are several, the one that PyTorch computes with."""
    for library, for_good in _libraries():
        if runtime := _runtime(library):
            return Found(runtime, for_good)
    return Found(None, False)


def tell_thread() -> bool:
    """Have PyTorch set the number of threads of the calling thread, which it does when it first computes there.

    Whether that is done, or there is nothing to do.
    """
    torch = sys.modules.get("torch")
    try:
        if torch is not None:
            torch.get_num_threads()
    except AttributeError:  # half imported
        return False
    return True


def _libraries() -> Iterator[tuple[ctypes.CDLL, bool]]:
    """Where to look, one after the other. A function of a library is its own, or one of those that it is linked to."""
    if not HERE:
        return
    if sys.platform != "darwin":
        yield ctypes.CDLL(None), True  # what is preloaded takes the place of what libraries bring along
    files = sorted(_loaded_files())
    torch = [file for file in files if os.path.basename(file).startswith("libtorch_cpu.")]
    for file in (*torch, *(file for file in files if _RUNTIME.match(os.path.basename(file)))):
        with contextlib.suppress(OSError):  # it is no longer loaded
            yield ctypes.CDLL(file, mode=os.RTLD_LAZY | os.RTLD_NOLOAD), file in torch


_RUNTIME = re.compile("lib(gomp|omp|iomp)")


def _loaded_files() -> set[str]:
    """Every file whose code is in this process.

    Not by `dl_iterate_phdr`: that calls back into Python, which waits for the GIL, and holds a lock for which another
    thread, importing a module, may wait with the GIL.
    """
    if sys.platform == "darwin":
        dyld = ctypes.CDLL(None)
        dyld._dyld_get_image_name.restype = ctypes.c_char_p
        names = [dyld._dyld_get_image_name(i) for i in range(dyld._dyld_image_count())]
        return {os.fsdecode(name) for name in names if name}
    try:
        lines = os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines()
    except OSError:
        return set()
    return {line[line.index("/") :] for line in lines if "/" in line}


def _runtime(library: ctypes.CDLL) -> Runtime | None:
    """What a library has, or is linked to; all of one runtime, whose threads it numbers."""
    max_threads, number = (_address(library, name) for name in ("omp_get_max_threads", "omp_get_thread_num"))
    for name in ("GOMP_parallel", "__kmpc_fork_call"):
        parallel = _address(library, name)
        if max_threads and number and parallel:
            file, *others = (_file_of(address) for address in (parallel, max_threads, number))
            if others == [file, file]:
                return Runtime(file, max_threads, number, parallel, name == "GOMP_parallel")
    return None


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
