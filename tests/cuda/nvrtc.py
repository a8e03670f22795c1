"""NVIDIA's run-time compiler through ctypes: a kernel's PTX and the assembler's report of it, without a driver.

The compiler comes with the wheels nvidia-cuda-nvrtc (CUDA 13) and nvidia-cuda-nvrtc-cu12, or with a CUDA toolkit.
"""

import contextlib
import ctypes
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PLACES = {13: "cu13/lib/libnvrtc.so.13", 12: "cuda_nvrtc/lib/libnvrtc.so.12"}
"""Where the wheels put the library of each CUDA version, under site-packages/nvidia."""

OPTIONS = ("-std=c++17", "-ftz=true", "--ptxas-options=-v")
"""With what would flush and contract, if anything could; and a report, please."""

_REPORT = re.compile(
    r"Compiling entry function '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers(?:[^\n]*?, (\d+) bytes smem)?",
    re.DOTALL,
)
_ENTRY = re.compile(r"^\.visible \.entry (\w+)\(.*?^\}", re.MULTILINE | re.DOTALL)


class Kernel(NamedTuple):
    """What became of one kernel."""

    ptx: str
    registers: int
    stack_bytes: int  # of local memory
    spill_bytes: int
    shared_bytes: int = 0  # besides what a launch asks for


class CompileError(Exception):
    """With the compiler's log."""


@functools.cache
def library(cuda: int) -> ctypes.CDLL:
    """The compiler of a CUDA version; FileNotFoundError where there is none."""
    spec = importlib.util.find_spec("nvidia")
    folders = map(Path, spec.submodule_search_locations or ()) if spec else ()
    for path in (*(folder / PLACES[cuda] for folder in folders), Path(f"libnvrtc.so.{cuda}")):
        try:
            for part in path.parent.glob("libnvrtc-builtins.so.*"):  # which the compiler would not find by itself
                ctypes.CDLL(str(part), ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    wheel = "nvidia-cuda-nvrtc" if cuda == 13 else f"nvidia-cuda-nvrtc-cu{cuda}"
    raise FileNotFoundError(f"no compiler of CUDA {cuda}: pip install {wheel}")


def version(cuda: int) -> str:
    """Of the compiler, as "13.0"."""
    nvrtc, major, minor = library(cuda), ctypes.c_int(), ctypes.c_int()
    _check(nvrtc, nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def architectures(cuda: int) -> list[int]:
    """The compute capabilities the compiler makes code for, as 75, 90, 120."""
    nvrtc, count = library(cuda), ctypes.c_int()
    _check(nvrtc, nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    found = (ctypes.c_int * count.value)()
    _check(nvrtc, nvrtc.nvrtcGetSupportedArchs(found))
    return list(found)


def compile(source: str, options: tuple[str, ...], architecture: int, cuda: int = 13) -> dict[str, Kernel]:
    """The kernels of a translation unit by name."""
    with _compiled(source, options, architecture, cuda) as (nvrtc, program):
        log, ptx = (_bytes(nvrtc, program, what)[:-1].decode() for what in ("ProgramLog", "PTX"))
    entries = {match[1]: match[0] for match in _ENTRY.finditer(ptx)}
    reports = {name: tuple(int(number or 0) for number in numbers) for name, *numbers in _REPORT.findall(log)}
    assert entries.keys() == reports.keys(), log
    return {
        name: Kernel(entries[name], registers, stack, stores + loads, shared)
        for name, (stack, stores, loads, registers, shared) in reports.items()
    }


def cubin(source: str, options: tuple[str, ...], architecture: int, cuda: int = 13) -> bytes:
    """The machine code of a translation unit."""
    with _compiled(source, options, architecture, cuda) as (nvrtc, program):
        return _bytes(nvrtc, program, "CUBIN")


@contextlib.contextmanager
def _compiled(
    source: str, options: tuple[str, ...], architecture: int, cuda: int
) -> Iterator[tuple[ctypes.CDLL, ctypes.c_void_p]]:
    nvrtc, program = library(cuda), ctypes.c_void_p()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        given = [option.encode() for option in (*options, *OPTIONS, f"-arch=sm_{architecture}")]
        if nvrtc.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given)):
            raise CompileError(_bytes(nvrtc, program, "ProgramLog")[:-1].decode())
        yield nvrtc, program
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    """What is asked for; texts end with a zero."""
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    found = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, found))
    return found.raw


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(nvrtc.nvrtcGetErrorString(status).decode())
