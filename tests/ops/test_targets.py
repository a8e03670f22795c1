"""Kernels for other processors than this one: the same bits, and nothing that a process may not have."""

import os
import re
import subprocess
import sys

import llvmlite.binding as llvm
import pytest

from tests.ops import elf

ON_X86 = pytest.mark.skipif(not llvm.get_default_triple().startswith("x86_64"), reason="of another architecture")
SLOW = pytest.mark.slow

DTYPES = ["float16", "bfloat16", "float32", "float64"]
TARGETS = {"generic": None, "nehalem": "", "ivybridge": "", "x86-64-v3": "", "this one": None}
"""Features beside those of the name; None leaves it to cubn."""

REPORTING = re.compile("Py|numba_|NRT_|_GLOBAL_OFFSET_TABLE_$")
"""What an object file may leave open: what numba would report an error with, of which kernels have none, and a mark for
the loader.
"""


def environment(processor, folder):
    chosen = os.environ | {"CUBN_CACHE_DIR": str(folder)}
    if processor != "this one":
        chosen["NUMBA_CPU_NAME"] = processor
    if TARGETS[processor] is not None:
        chosen["NUMBA_CPU_FEATURES"] = TARGETS[processor]
    return chosen


def left_open(folder):
    """Names that the object files in a cache folder expect the process to have."""
    found = [path.read_bytes() for path in folder.rglob("*.o")]
    assert found
    names = set().union(*(elf.undefined(content[content.index(b"\x7fELF") :]) for content in found))
    return {name for name in names if not REPORTING.match(name)}


@ON_X86
@pytest.mark.parametrize(
    ("processor", "dtype", "layouts"),
    [
        ("nehalem", "float16", ["nchw"]),
        *(
            pytest.param(processor, dtype, ["nchw", "nhwc", "permuted"], marks=SLOW)
            for processor in TARGETS
            for dtype in DTYPES
        ),
    ],
)
def test_other_processors_give_the_same_bits(processor, dtype, layouts, tmp_path):
    command = [sys.executable, "-m", "tests.ops.on_target", dtype, *layouts]
    subprocess.run(command, env=environment(processor, tmp_path), check=True, timeout=580)
    if sys.platform == "linux":
        assert not left_open(tmp_path)


def told(program, processor, folder):
    """What a program prints where kernels are compiled for a processor."""
    command = [sys.executable, "-c", program]
    options = {"env": environment(processor, folder), "capture_output": True, "text": True}
    return subprocess.run(command, **options, check=True, timeout=60).stdout.strip()


@ON_X86
@pytest.mark.parametrize(("processor", "has"), [("generic", False), ("nehalem", False), ("x86-64-v3", True)])
def test_a_processor_is_asked_whether_it_converts_halves(processor, has, tmp_path):
    program = "from cubn.backends.cpu.target import converts_halves; print(converts_halves())"
    assert told(program, processor, tmp_path) == str(has)


@ON_X86
def test_kernels_of_other_processors_are_other_files(tmp_path):
    program = "from cubn.backends.cpu.cache import fingerprint; print(fingerprint())"
    keys = [told(program, processor, tmp_path) for processor in ("nehalem", "ivybridge", "this one")]
    assert len(set(keys)) == 3
