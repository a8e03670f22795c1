"""Where the driver reads a kernel's parameters."""

from __future__ import annotations

import ctypes


class Slot:
    """Memory for the parameters of one launch. The driver takes the address of a list of addresses, here of one."""

    __slots__ = ("_memory", "bytes", "pointers")

    def __init__(self, size: int) -> None:
        address = ctypes.sizeof(ctypes.c_void_p)
        self._memory = ctypes.create_string_buffer(address + size)
        self.pointers = ctypes.addressof(self._memory)
        self.bytes = memoryview(self._memory).cast("B")[address:]
        ctypes.c_void_p.from_buffer(self._memory).value = self.pointers + address
