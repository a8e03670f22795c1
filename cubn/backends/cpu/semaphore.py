"""Semaphores that native code can wait for and post without Python: the operating system's own.

`wait(semaphore, -1, 0)` and `post(semaphore, 1, 0)` fit the functions of all three systems, which ignore what they do
not take: `sem_wait(s)` and `sem_post(s)` of POSIX; `dispatch_semaphore_wait(s, forever)` and
`dispatch_semaphore_signal(s)` of macOS, which has no `sem_init`; `WaitForSingleObject(s, forever)` and
`ReleaseSemaphore(s, 1, nothing)` of Windows. A wait may end early: look again.
"""

from __future__ import annotations

import ctypes
import sys

SIZE = 64
"""Bytes of a semaphore in its owner's memory; POSIX takes 32 or less, the others none."""

_library = ctypes.CDLL("kernel32" if sys.platform == "win32" else None)
_WAIT, _POST, _NAP = {
    "darwin": ("dispatch_semaphore_wait", "dispatch_semaphore_signal", "usleep"),
    "win32": ("WaitForSingleObject", "ReleaseSemaphore", "Sleep"),
}.get(sys.platform, ("sem_wait", "sem_post", "usleep"))
A_NAP = 1 if sys.platform == "win32" else 20
"""What `nap` is given: milliseconds there, elsewhere microseconds."""


def _address(name: str) -> int:
    return ctypes.cast(getattr(_library, name), ctypes.c_void_p).value or 0


WAIT, POST, NAP = map(_address, (_WAIT, _POST, _NAP))


def made(memory: int) -> int:
    """A semaphore of count 0, in SIZE bytes of memory or elsewhere: what native code is to be given."""
    if sys.platform == "darwin":
        create = _library.dispatch_semaphore_create
        create.argtypes, create.restype = [ctypes.c_long], ctypes.c_void_p
        return int(create(0))
    if sys.platform == "win32":
        create = _library.CreateSemaphoreW
        create.restype = ctypes.c_void_p
        return int(create(None, 0, 0x7FFFFFFF, None))
    if _library.sem_init(ctypes.c_void_p(memory), 0, 0):
        raise OSError("cubn: sem_init failed")
    return memory
