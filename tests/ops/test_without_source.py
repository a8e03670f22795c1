"""Installations of bytecode alone: numba compiles the kernels, to the same bits."""

import compileall
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cubn

CODE = """
import hashlib, sys
import numpy as np
import cubn

digest = hashlib.sha256()
rng = np.random.default_rng(0)
for shape, axis, dtype, fused in {cases}:
    x, dy = rng.standard_normal((2, *shape)).astype(dtype)
    state = cubn.BatchNormState(shape[axis], channel_axis=axis)
    y, saved = cubn.forward_train(x, state, relu=fused, residual=dy if fused else None)
    found = [y, *cubn.backward(dy, saved)[:3], state.running_var, cubn.forward(x, state), cubn.moments(x[1:]).m2]
    for array in found:
        digest.update(np.ascontiguousarray(array + array.dtype.type(0)).tobytes())
print(digest.hexdigest(), "numba" in sys.modules, cubn.__file__.endswith(".pyc"))
"""
FEW = [((3, 5, 17, 16), 1, "float32", False)]
ALL = [
    (shape, axis, dtype, fused)
    for shape, axis in (((3, 5, 17, 16), 1), ((4, 20, 7, 7), 1), ((3, 17, 16, 20), -1), ((300, 20), 1), ((600, 3), 1))
    for dtype in ("float16", "float32", "float64")
    for fused in (False, True)
]


def run(folder, cases):
    environment = os.environ | {"PYTHONPATH": str(folder), "CUBN_CACHE_DIR": "", "NUMBA_DISABLE_JIT": "1"}
    command = [sys.executable, "-W", "error", "-c", CODE.format(cases=cases)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("cases", [FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"])
def test_bytecode_alone_computes_the_same_bits(cases, tmp_path):
    package = Path(cubn.__file__).parent
    shutil.copytree(package, tmp_path / "cubn", ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(tmp_path / "cubn", quiet=1, legacy=True)
    for source in (tmp_path / "cubn").rglob("*.py"):
        source.unlink()
    bits, numba, bytecode = run(tmp_path, cases)
    assert (numba, bytecode) == ("True", "True")
    assert run(package.parent, cases) == [bits, "False", "False"]
