"""Who may import what."""

import ast
import subprocess
import sys
from pathlib import Path

import cubn

ROOT = Path(cubn.__file__).parent
HEAVY = {"numba", "llvmlite", "cupy", "mpi4py", "torch", "jax"}
ADAPTERS = {"backends", "sync", "torch.py", "jax.py"}


def imported(path):
    """Top-level names of the modules a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_only_backends_sync_and_adapters_import_what_is_heavy():
    files = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in ADAPTERS]
    assert ROOT / "_arrays" / "torch.py" in files
    assert {path.name: imported(path) & HEAVY for path in files if imported(path) & HEAVY} == {}


def test_only_the_cpu_backend_imports_the_compiler():
    cpu = ROOT / "backends" / "cpu"
    files = [path for path in ROOT.rglob("*.py") if cpu not in path.parents]
    assert {path.name for path in files if imported(path) & {"numba", "llvmlite"}} == set()
    assert any(imported(path) & {"numba", "llvmlite"} for path in cpu.rglob("*.py")), "the test sees such imports"


def test_numba_is_imported_in_one_place():
    """Where kernels have no source: their own compiler takes a fraction of its time."""
    assert {path.name for path in ROOT.rglob("*.py") if "numba" in imported(path)} == {"by_numba.py"}


def modules_after(program):
    """What is in sys.modules of a fresh interpreter after the program."""
    code = f"{program}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.split())


def test_importing_cubn_imports_numpy_and_the_standard_library():
    after = modules_after("import cubn")
    assert "cubn" in after
    assert not after & HEAVY
    beyond_numpy = after - modules_after("import numpy")
    assert {name for name in beyond_numpy if name not in sys.stdlib_module_names} == {"cubn"}


def test_describing_an_array_imports_no_other_library():
    program = "import numpy as np; from cubn import _arrays; _arrays.describe(np.ones((2, 3)), 'x')"
    assert not modules_after(program) & HEAVY
