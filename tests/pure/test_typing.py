"""The types of the public functions, as a user's type checker sees them."""

import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest

import cubn
from cubn.typing import SupportsDLPack

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RIGHT, WRONG = ["typed_program.py", "typed_modules.py"], "mistyped_program.py"


@pytest.fixture(scope="module")
def reported():
    """Lines with the kinds of errors of the programs: in one process, since reading torch takes seconds."""
    for name in ("mypy", "torch", "jax", "mpi4py"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent"]
    command += [f"--cache-dir={ROOT / '.mypy_cache' / 'programs'}", *RIGHT, WRONG]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=environment)
    assert run.returncode < 2, run.stdout + run.stderr
    found = {name: {} for name in (*RIGHT, WRONG)}
    for file, line, kind in re.findall(r"^(\w+\.py):(\d+): error: .*\[([\w-]+)\]$", run.stdout, re.MULTILINE):
        found[file].setdefault(int(line), set()).add(kind)
    return found


@pytest.mark.parametrize("program", RIGHT)
def test_a_right_program_has_no_errors_and_the_types_it_says(reported, program):
    assert reported[program] == {}


def test_each_planted_error_is_reported_where_it_stands(reported):
    lines = enumerate((HERE / WRONG).read_text().splitlines(), 1)
    planted = {line: set(text.partition("# error: ")[2].split()) for line, text in lines if "# error: " in text}
    assert len(planted) >= 8
    assert reported[WRONG] == planted


@pytest.mark.parametrize("name", [name for name in cubn.__all__ if callable(getattr(cubn, name))])
def test_type_hints_can_be_evaluated(name):
    typing.get_type_hints(getattr(cubn, name))


def test_generic_results_can_be_written_at_run_time():
    for generic in (cubn.Saved, cubn.Gradients, cubn.StatisticsGradients, cubn.Started):
        assert typing.get_origin(generic[SupportsDLPack]) is generic
    with pytest.raises(TypeError, match=r"^Saved: only forward_train and forward_frozen make one"):
        cubn.Saved[np.ndarray]()
