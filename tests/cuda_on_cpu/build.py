"""Compiles CUDA C++ kernels, and the runtime they are linked with, into shared objects by g++."""

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
INCLUDE = HERE / "include"
RUNTIME = HERE / "runtime"

# The kinds of build: plain, AddressSanitizer with UndefinedBehaviorSanitizer, ThreadSanitizer.
PLAIN, ADDRESS, THREAD = "", "address,undefined", "thread"

_SHARED_OBJECT = ["-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden"]
# CUDA code reinterprets memory freely, contracts nothing that it must not, and its threads have small stacks. What it
# needs of the standard libraries the runtime has: to look through those takes a tenth of a build.
_KERNEL = [
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-math-errno",
    "-Werror=frame-larger-than=65536",
    "-nostdlib",
]
_SANITIZED = {
    PLAIN: [],
    ADDRESS: ["-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    THREAD: ["-g1", "-fno-omit-frame-pointer", "-fsanitize=thread"],
}
_RUNTIME_DEFINES = {PLAIN: [], ADDRESS: ["-DCUDA_ON_CPU_ADDRESS"], THREAD: ["-DCUDA_ON_CPU_THREAD"]}

_ALIGNMENT = r"(?:(?:__align__|alignas)\(\w+\)\s*)?"
_DYNAMIC = re.compile(rf"^([ \t]*)extern\s+__shared__\s+{_ALIGNMENT}([\w:<> ]+?)\s+(\w+)\s*\[\s*\]\s*;", re.MULTILINE)
_STATIC = re.compile(rf"(?<!extern )\b__shared__\s+{_ALIGNMENT}([\w:<>, ]+?)\s+(\w+)\s*((?:\[[^\]]*\]\s*)*);")


def unavailable() -> str:
    """Why kernels cannot run here; empty where they can."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"CUDA on the CPU needs Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    return "" if shutil.which("g++") else "CUDA on the CPU needs g++"


def rewrite_shared(source: str) -> str:
    """Replace `__shared__` declarations by what include/cuda_on_cpu/shared.h offers; the lines stay where they are."""
    source = _DYNAMIC.sub(r"\1#define \3 (cuda_on_cpu::dynamic_shared<\2>())", source)
    return _STATIC.sub(r"auto& \2 = cuda_on_cpu::static_shared<__typeof__(\1 \3)>([] {});", source)


def build_kernel(source: str, kernel: str, options: Sequence[str], sanitizer: str, optimize: str) -> Path:
    """The shared object of one translation unit, linked with the runtime; from the cache where it is there."""
    runtime = build_runtime(sanitizer)
    text = f'#include "cuda_on_cpu.h"\n#line 1 "{kernel}.cu"\n{rewrite_shared(source)}\nCUDA_ON_CPU_KERNEL({kernel})\n'
    flags = [*_SHARED_OBJECT, *_KERNEL, "-DCUBN_HOST", optimize, *_SANITIZED[sanitizer], *options]
    command = ["g++", *flags, f"-I{INCLUDE}", "-x", "c++", "-", "-x", "none", str(runtime)]
    return _compile("kernel", command, [text, _headers()], text)


@functools.cache
def build_runtime(sanitizer: str) -> Path:
    """The shared object of the scheduler, which all modules of one kind share."""
    sources = sorted(RUNTIME.glob("*.cpp"))
    flags = [*_SHARED_OBJECT, "-O2", "-g1", "-pthread", *_RUNTIME_DEFINES[sanitizer], f"-I{INCLUDE}"]
    command = ["g++", *flags, *map(str, sources)]
    contents = [path.read_text() for path in sorted(RUNTIME.iterdir())]
    return _compile("runtime", command, [*contents, _headers()])


@functools.cache
def _headers() -> str:
    return "".join(path.read_text() for path in sorted(INCLUDE.rglob("*.h")))


@functools.cache
def _compiler() -> str:
    return subprocess.run(["g++", "--version"], env=_environment(), capture_output=True, text=True, check=True).stdout


def _environment() -> dict[str, str]:
    """This process's environment, without the sanitizer's runtime that it may have been started with."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def _compile(role: str, command: list[str], contents: Iterable[str], stdin: str = "") -> Path:
    key = hashlib.sha256("\0".join([_compiler(), *command, *contents]).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"cubn_cuda_on_cpu_{os.getuid()}"
    target = folder / f"{role}-{key}.so"
    if not target.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(".so", dir=folder)
        os.close(handle)
        try:
            command = [*command, "-o", unfinished]
            done = subprocess.run(command, input=stdin, env=_environment(), capture_output=True, text=True, check=False)
            if done.returncode:
                raise CompileError(done.stderr)
            os.replace(unfinished, target)
        except BaseException:
            os.unlink(unfinished)
            raise
    return target


class CompileError(RuntimeError):
    """g++ refused the source; the message is g++'s."""
