"""Who may import what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cubn

ROOT = Path(cubn.__file__).parent
HEAVY = {"numba", "llvmlite", "cupy", "mpi4py", "torch", "jax"}
SHOWN = {"rich", "matplotlib"}
"""What only reports are shown with."""
ADAPTERS = {"backends", "sync", "torch"}
A_RANK = "cli/demo_ranks.py"
"""A program of its own, which mpiexec runs: one rank of the demo."""


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
    files = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    heavy = {str(path): imported(ROOT / path) & HEAVY for path in files if path.parts[0] not in ADAPTERS}
    assert {"_arrays/torch.py", "cli/demo.py"} < heavy.keys()
    assert {path: names for path, names in heavy.items() if names} == {A_RANK: {"mpi4py"}}


def modules(root):
    """The modules of the package in the folder, by their names."""
    paths = {path: path.relative_to(root.parent).with_suffix("").parts for path in root.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in paths.items()}


def imports_among(found):
    """Which of the modules each of them imports: anywhere in its file, also inside functions or for types alone."""

    def of(path):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: a relative import"
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    yield submodule if submodule in found else node.module

    return {name: {other for other in of(path) if other in found} for name, path in found.items()}


def circles(edges):
    """Sets of nodes that reach each other, or themselves, along the edges."""

    def reached(start):
        seen, ahead = set(), list(edges[start])
        while ahead:
            node = ahead.pop()
            if node not in seen:
                seen.add(node)
                ahead += edges[node]
        return seen

    reach = {node: reached(node) for node in edges}
    found = {frozenset(other for other in reach[node] if node in reach[other]) for node in edges}
    return {circle for circle in found if circle}


def test_no_circle_of_imports_in_the_package():
    edges = imports_among(modules(ROOT))
    assert "cubn._arrays" in edges["cubn.state"] and "cubn.backends.cuda.device" in edges["cubn.backends.protocol"]
    assert circles(edges) == set()


@pytest.mark.parametrize(
    ("where", "line", "circle"),
    [
        ("c", "import p.a", {"p.a", "p.b", "p.c"}),
        ("c", "def f():\n    from p import b", {"p.b", "p.c"}),
        ("d/__init__", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.a import x", {"p.a", "p.d"}),
        ("b", "from p.b import x", {"p.b"}),
        ("b", "import os", None),
        ("c", "from p.d import x", None),
    ],
)
def test_a_planted_circle_is_found(where, line, circle, tmp_path):
    package = {
        "__init__": "from p.a import x",
        "a": "from p import d\nfrom p.b import x",
        "b": "import p.c",
        "c": "",
        "d/__init__": "",
    }
    for name, text in (package | {where: f"{package[where]}\n{line}"}).items():
        path = tmp_path / "p" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert circles(imports_among(modules(tmp_path / "p"))) == ({frozenset(circle)} if circle else set())


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


def test_what_examines_states_is_imported_when_it_is_asked_for():
    """And shows what it found without what makes that colourful."""
    asked = "cubn.diagnose(cubn.BatchNormState(2))"
    program = f"import sys, cubn; assert 'cubn.health' not in sys.modules; print(end=str({asked})[:0])"
    assert not modules_after(program) & (HEAVY | SHOWN)


def test_what_watches_trainings_is_there_after_a_plain_import_and_imported_when_it_is_asked_for():
    program = "import sys, cubn; assert 'cubn.health' not in sys.modules; cubn.health.Monitor(cubn.BatchNormState(2))"
    assert not modules_after(program) & (HEAVY | SHOWN)
