"""Runs Python in a child process that has a sanitizer's runtime loaded, so that it can launch sanitized kernels."""

import ctypes
import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.cuda_on_cpu import build
from tests.cuda_on_cpu.build import ADDRESS, PLAIN, THREAD

ROOT = Path(__file__).parents[2]

_LIBRARIES = {ADDRESS: ["libasan.so", "libubsan.so"], THREAD: ["libtsan.so"]}
_OPTIONS = {
    # The first report ends the process. Python itself leaks on purpose; its own races and NumPy's are not in question.
    ADDRESS: {
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    },
    THREAD: {"TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1:atexit_sleep_ms=0"},
}


def run(arguments: Sequence[str], sanitizer: str, *, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run `python *arguments` at the root of the project, with kernels' `sanitizer` at hand.

    Parameters
    ----------
    arguments : sequence of str
        Such as ["-c", "..."] or ["-m", "pytest", "..."].
    sanitizer : str
        build.ADDRESS or build.THREAD; in the child, `active()` returns it.
    timeout : float
        Seconds.

    Returns
    -------
    subprocess.CompletedProcess
        Its returncode is not zero where the sanitizer found something; the report is in its stderr.
    """
    environment = {
        **os.environ,
        **_OPTIONS[sanitizer],
        "LD_PRELOAD": " ".join(map(_library, _LIBRARIES[sanitizer])),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONMALLOC": "malloc",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [*_fixed_addresses(), sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@functools.cache
def unavailable(sanitizer: str) -> str:
    """Why `sanitizer` cannot be used here; empty where it can."""
    if reason := build.unavailable():
        return reason
    process = run(["-c", "from tests.cuda_on_cpu import sanitized; print(sanitized.active())"], sanitizer)
    if process.returncode == 0 and process.stdout.strip() == sanitizer and not process.stderr:
        return ""
    return f"Python does not run under the sanitizer {sanitizer}: {process.stderr.strip()}"


def active() -> str:
    """The sanitizer whose runtime is loaded in this process."""
    process = ctypes.CDLL(None)
    if hasattr(process, "__tsan_init"):
        return THREAD
    return ADDRESS if hasattr(process, "__asan_init") else PLAIN


@functools.cache
def _library(name: str) -> str:
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return str(Path(found.stdout.strip()).resolve())


@functools.cache
def _fixed_addresses() -> tuple[str, ...]:
    """A prefix that turns address randomisation off, which ThreadSanitizer cannot always live with; where allowed."""
    prefix = ("setarch", "-R")
    try:
        allowed = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        allowed = False
    return prefix if allowed else ()
