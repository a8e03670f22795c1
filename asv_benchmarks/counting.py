"""Kernels of cubn compiled for a processor that need not be there, and run here to see which way they go.

What is optimised for that processor runs on this one, where each block notes that it runs; its machine code is only
looked at. So results are as always, and any tree of cubn can be counted.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import blocks
import llvmlite.binding as llvm
import numpy as np
from numpy.typing import NDArray
from throughput import Processor

from cubn.backends.cpu import cache, compile, target

ROOM = 1 << 22
"""Blocks that a kernel may run in one call: a power of two."""


class Kernel(NamedTuple):
    """LLVM IR, optimised for the processor; a number of blocks that have run, and which."""

    text: str
    notes: NDArray[np.int64]


class Counting:
    """Every kernel that this process compiles, by name."""

    def __init__(self, name: str, processor: Processor, edit: Callable[[str], str]) -> None:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        options = {"reloc": "pic", "codemodel": "jitdefault", "jit": True}
        host, features = target.target()
        self._here = llvm.Target.from_default_triple().create_target_machine(host, features, opt=0, **options)
        self._there = llvm.Target.from_triple(processor.triple).create_target_machine(name, opt=3, **options)
        self.optimiser = llvm.Target.from_triple(processor.triple).create_target_machine(name, opt=3, **options)
        self.optimiser.emit_object = self._emit_object
        self._edit = edit
        self._last = Kernel("", np.zeros(0, np.int64))
        self.kernels: dict[str, Kernel] = {}
        self._assemblies: dict[str, str] = {}

    def _emit_object(self, module: llvm.ModuleRef) -> bytes:
        """In place of an object file for the processor, one for this machine that notes its blocks."""
        text = self._edit(str(module))
        self._last = Kernel(text, np.zeros(1 + ROOM, np.int64))
        noting = blocks.noting(
            re.sub(r"^target .*\n", "", text, flags=re.MULTILINE), self._last.notes.ctypes.data, ROOM
        )
        here = llvm.parse_assembly(noting)
        here.triple, here.data_layout = self._here.triple, str(self._here.target_data)
        return bytes(self._here.emit_object(here))

    def store(self, name: str, code: bytes) -> None:
        """In place of the cache's."""
        self.kernels[name] = self._last

    def way(self, name: str) -> blocks.Way:
        """What the processor executes where this machine went last time."""
        text, notes = self.kernels[name]
        if notes[0] > ROOM:
            raise ValueError(f"{name} runs {notes[0]} blocks; {ROOM} are noted")
        if name not in self._assemblies:
            self._assemblies[name] = self._there.emit_assembly(llvm.parse_assembly(blocks.located(text)))
        return blocks.way(self._assemblies[name], notes[1 : 1 + notes[0]].tolist())

    def run(self, call: Callable[[], object]) -> list[str]:
        """Names of the kernels that a call runs."""
        call()  # what is compiled or prepared once
        for _, notes in self.kernels.values():
            notes[0] = 0
        call()
        return [name for name, (_, notes) in self.kernels.items() if notes[0]]


@contextmanager
def counting(name: str, processor: Processor, edit: Callable[[str], str] = str) -> Iterator[Counting]:
    """To be entered before the process's first operation, whose kernels are then counted.

    `edit` changes a kernel's LLVM IR before it becomes machine code.
    """
    found = Counting(name, processor, edit)
    before = compile._machine, cache.load, cache.store
    compile._machine, cache.load, cache.store = (lambda: found.optimiser), (lambda name: None), found.store
    yield found
    compile._machine, cache.load, cache.store = before
