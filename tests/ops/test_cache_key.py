"""The key of an object file: what changes the code changes the key, and nothing is kept where none can be had."""

import ast
import compileall
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import cubn
from cubn.backends.cpu import cache

PACKAGE = Path(cubn.__file__).parent


@pytest.fixture
def copied(tmp_path):
    """A folder with a copy of the package."""
    shutil.copytree(PACKAGE, tmp_path / "cubn", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(folder, program, *arguments):
    done = subprocess.run(
        [sys.executable, "-B", "-c", program, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def key(folder, program="from cubn.backends.cpu import cache; print(cache.fingerprint())"):
    return run(folder, program)


def edit(folder, module, old="", new="# an edit\n"):
    file = folder / "cubn" / module
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new) if old else text + new)


@pytest.mark.parametrize("module", ["backends/cpu/nodes.py", "_types.py", "_tree.py"])
def test_an_edited_source_is_another_key(copied, module):
    before = key(copied)
    assert before == key(copied)
    edit(copied, module)
    assert key(copied) != before


def imported(module):
    """The modules of this package that a module takes something from."""
    file = PACKAGE.parent / Path(*module.split("."))
    tree = ast.parse((file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text())
    for node in tree.body if file.is_dir() else ast.walk(tree):  # a package's functions dispatch to other backends
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cubn":
            for alias in node.names:
                place = PACKAGE.parent / Path(*node.module.split("."), alias.name)
                inner = place.is_dir() or place.with_suffix(".py").is_file()
                yield f"{node.module}.{alias.name}" if inner else node.module


NOT_ABOUT_KERNELS = {
    "cubn._kept",
    "cubn._weak",
    "cubn.errors",
    *(f"cubn.backends.{name}" for name in ("cores", "folder", "kernel_files", "threads")),
}


def test_every_module_that_kernels_take_something_from_is_in_the_key():
    found, waiting = set(), ["cubn.backends.cpu.kernels", "cubn.backends.cpu.native_pool", "cubn.backends.cpu.pool"]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += imported(module)
    assert found >= {"cubn.backends.cpu.simd", *cache.SHARED}
    assert found - NOT_ABOUT_KERNELS <= set(cache._modules())


def without_sources(folder):
    compileall.compile_dir(folder / "cubn", legacy=True, quiet=1, force=True)
    for source in (folder / "cubn").rglob("*.py"):
        source.unlink()


def test_without_sources_the_bytecode_is_in_the_key(copied, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(copied, other, dirs_exist_ok=True)
    edit(other, "backends/cpu/nodes.py", new="EDITED = 1\n")
    without_sources(copied)
    without_sources(other)
    keys = key(copied), key(copied), key(other)
    assert keys[0] == keys[1] != keys[2]
    assert all(keys)


ZIPPED = "import sys; sys.path.insert(0, 'cubn.zip'); from cubn.backends.cpu import cache; print(cache.fingerprint())"


def test_in_an_archive_the_source_is_in_the_key(copied):
    def zipped():
        shutil.make_archive(str(copied / "cubn"), "zip", copied, "cubn")
        shutil.rmtree(copied / "cubn")
        return key(copied, ZIPPED)

    kept = copied / "kept"
    shutil.copytree(copied / "cubn", kept)
    first = zipped()
    shutil.copytree(kept, copied / "cubn")
    edit(copied, "_tree.py")
    assert first
    assert zipped() not in ("", first)


FROZEN = """
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from cubn.backends.cpu import cache

def hidden(self, path):
    raise OSError("part of an executable")

def code(self, name):
    return None if sys.argv[1] == "nothing" else compile(Path(self.path).read_bytes(), name, "exec")

SourceFileLoader.get_data, SourceFileLoader.get_code = hidden, code
if sys.argv[1] == "no list":
    import pkgutil
    pkgutil.iter_modules = lambda *arguments: iter(())
cache.store("kernel", b"code")
print(cache.fingerprint(), cache.load("kernel"), cache.state(), sep="; ")
"""


def test_code_that_only_a_loader_has_is_in_the_key(copied, monkeypatch):
    monkeypatch.setenv("CUBN_CACHE_DIR", str(copied / "cache"))
    before = run(copied, FROZEN, "code")
    assert before == run(copied, FROZEN, "code")
    assert before.split("; ")[1] == "b'code'"
    edit(copied, "backends/cpu/nodes.py", new="EDITED = 1\n")
    assert run(copied, FROZEN, "code") != before


@pytest.mark.parametrize("missing", ["nothing", "no list"])
def test_code_that_nobody_has_is_never_kept(missing, copied, monkeypatch):
    monkeypatch.setenv("CUBN_CACHE_DIR", str(copied / "cache"))
    assert run(copied, FROZEN, missing).startswith("; None; not used, as neither the source nor the bytecode")
    assert not (copied / "cache").exists()


def test_packages_without_metadata_have_a_version(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    expected = [metadata.version(name) for name in ("numba", "llvmlite")]
    monkeypatch.setattr(metadata, "version", missing)
    assert [cache._version(name) for name in ("numba", "llvmlite")] == expected


@pytest.mark.parametrize(
    "name",
    ["OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "CPU_NAME", "CPU_FEATURES", "BOUNDSCHECK", "DEBUGINFO", "ENABLE_AVX"],
)
def test_settings_of_the_code_generator_are_in_the_key(name, monkeypatch):
    monkeypatch.delenv(f"NUMBA_{name}", raising=False)
    before = cache.fingerprint()
    monkeypatch.setenv(f"NUMBA_{name}", "0")
    zero = cache.fingerprint()
    monkeypatch.setenv(f"NUMBA_{name}", "1")
    assert len({before, zero, cache.fingerprint()}) == 3
    monkeypatch.delenv(f"NUMBA_{name}")
    assert cache.fingerprint() == before


@pytest.mark.parametrize("name", ["NUM_THREADS", "THREADING_LAYER", "DISABLE_JIT", "CACHE_DIR", "CUDA_LOG_LEVEL"])
def test_settings_without_effect_are_not_in_the_key(name, monkeypatch):
    monkeypatch.delenv(f"NUMBA_{name}", raising=False)
    before = cache.fingerprint()
    monkeypatch.setenv(f"NUMBA_{name}", "1")
    assert cache.fingerprint() == before


def test_the_file_of_settings_is_in_the_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = cache.fingerprint()
    (tmp_path / ".numba_config.yaml").write_bytes(b"opt: 0 # \xff\n")
    assert cache.fingerprint() != before


def test_a_pipe_in_place_of_the_file_of_settings_does_not_hang(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = cache.fingerprint()
    os.mkfifo(tmp_path / ".numba_config.yaml")
    assert cache.fingerprint() == before


def test_a_folder_that_is_gone_from_under_a_process_has_a_key(tmp_path, monkeypatch):
    before = cache.fingerprint()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cache.fingerprint() == before


UPGRADED = """
import sys
from cubn.backends.cpu import cache
cache.store("before", b"code")
with open("cubn/backends/cpu/nodes.py", "a") as file:
    file.write("# another version")
cache.store("after", b"code")
print(cache.load("before"), cache.load("after"))
"""


def test_nothing_is_kept_by_a_process_under_which_another_version_was_installed(copied, monkeypatch):
    monkeypatch.setenv("CUBN_CACHE_DIR", str(copied / "cache"))
    assert run(copied, UPGRADED) == "b'code' None"
