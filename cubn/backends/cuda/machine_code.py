"""The kernels' machine code: each is compiled once, by the first thread that needs it, unless a file has it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from cubn.backends.cores import cores
from cubn.backends.cuda.compile import Compiler
from cubn.backends.cuda.plan import Launch
from cubn.backends.cuda.source import specialised
from cubn.backends.kernel_files import keep, read

ENDING = ".cubin"


class MachineCode:
    """That of one architecture, in memory, and in the cache's folder for it and this compiler.

    The name of a file is a digest of all of the text and of the compiler's options: nothing in it is ever stale.
    """

    def __init__(self, compiler: Compiler) -> None:
        self.compiler = compiler
        self.key = "cuda-sm_{}-nvrtc-{}.{}".format(compiler.architecture, *compiler.version)
        self.compiled_here: list[str] = []
        """Names of the kernels that this process has compiled, in any order."""
        self._found: dict[tuple[str, str, tuple[str, ...]], bytes] = {}
        self._locks: dict[tuple[str, str, tuple[str, ...]], threading.RLock] = {}

    def of(self, launch: Launch) -> bytes:
        """That of the kernel of a launch. Threads that ask for the same one wait for the first of them."""
        which = launch.source, launch.kernel, launch.options
        if which not in self._found:
            with self._locks.setdefault(which, threading.RLock()):
                if which not in self._found:
                    self._found[which] = self.compiled(launch.kernel, specialised(launch.source, launch.options))
        return self._found[which]

    def compiled(self, kernel: str, source: str) -> bytes:
        """That of a translation unit, from a file where there is one."""
        digest = hashlib.sha256("\n".join([*self.compiler.options, source]).encode()).hexdigest()
        name = f"{kernel}-{digest[:32]}"
        code = read(self.key, name, ENDING)
        if code is None:
            code = self.compiler.cubin(kernel, source)
            self.compiled_here.append(name)
            keep(self.key, name, ENDING, code)
        return code

    def lost(self) -> int:
        """How many of those that this process has compiled are in no file."""
        return sum(read(self.key, name, ENDING) is None for name in self.compiled_here)

    def make_ready(self, launches: Iterable[Launch]) -> None:
        """Have the machine code of all of them: what is to be compiled is compiled at once, on all cores."""
        wanted = {(launch.source, launch.kernel, launch.options): launch for launch in launches}
        missing = [launch for which, launch in wanted.items() if which not in self._found]
        if len(missing) < 2:
            return  # what is alone is compiled as well where it is needed
        executor = ThreadPoolExecutor(min(cores(), len(missing)))  # the compiler leaves other threads alone
        try:
            for _ in executor.map(self.of, missing):
                pass
        finally:
            executor.shutdown(cancel_futures=True)
