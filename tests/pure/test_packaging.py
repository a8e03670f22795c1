"""What pyproject.toml promises: what is always installed, extras for the rest, the kernels' folder in the wheel."""

import re
import runpy
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from hatchling.builders.wheel import WheelBuilder

import cubn
from cubn.__main__ import main
from cubn.cli.info import info, version_of

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README_COMMANDS = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), re.MULTILINE)


def names(requirements):
    return [re.match(r"[\w-]+", requirement)[0] for requirement in requirements]


def test_what_is_always_installed_computes_on_the_cpu():
    assert names(PROJECT["dependencies"]) == ["numpy", "numba"]


def test_remedies_name_packages_that_can_be_installed_from_anywhere():
    """Not cubn itself, which may have come from a checkout and be on no index."""
    known = {"llvmlite", *names(PROJECT["dependencies"])}
    known |= {name for extra in PROJECT["optional-dependencies"].values() for name in names(extra)} - {"cubn"}
    commands = [
        (path.name, command)
        for path in (ROOT / "cubn").rglob("*.py")
        for command in re.findall(r"pip install ((?:'?[a-z][\w\[\]-]+'? ?)+)", path.read_text())
    ]
    assert commands
    for place, command in commands:
        assert set(names(command.replace("'", "").split())) <= known, place


def test_readme_has_two_commands_of_one_line_whose_extras_exist():
    assert len(README_COMMANDS) == 2
    assert README_COMMANDS[0].endswith("-m cubn demo")
    assert "-m pytest" in README_COMMANDS[1]
    for command in README_COMMANDS:
        assert re.search(r"'\.\[(\w+)\]'", command)[1] in PROJECT["optional-dependencies"]


def test_changelog_has_an_entry_for_this_version_and_its_numerics():
    entry = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1]
    assert entry.startswith(f"[{cubn.__version__}]")
    assert "### Numerics" in entry
    assert f"version {cubn.NUMERICS}" in entry


def test_info_names_every_library_and_backend():
    text = info()
    assert f"numerics contract {cubn.NUMERICS}" in text
    assert re.search(rf"^  numpy +{re.escape(np.__version__)}$", text, re.MULTILINE)
    for name in ("llvmlite", "torch", "jax", "cupy", "mpi4py"):
        assert re.search(rf"^  {name} +(\d|not installed$)", text, re.MULTILINE)
    assert re.search(r"^  cpu +available$", text, re.MULTILINE)
    assert re.search(r"^  cuda +not available: .+", text, re.MULTILINE)
    assert re.search(rf"^  threads +{cubn.get_num_threads()}, ", text, re.MULTILINE)


def test_version_is_of_the_first_distribution_there_is():
    assert version_of("no-such-distribution", "numpy") == np.__version__
    assert version_of("no-such-distribution") == "not installed"


@pytest.mark.parametrize(
    ("folder", "expected"), [("", "switched off"), ("{file}/new", "is not a folder"), ("{tmp}/new", "(writable)")]
)
def test_info_says_whether_kernels_can_be_cached(folder, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("CUBN_CACHE_DIR", folder.format(tmp=tmp_path, file=__file__))
    assert expected in info()


def test_info_survives_a_cache_folder_that_cannot_be_looked_at(monkeypatch, tmp_path):
    folder = tmp_path / ("x" * 300)  # longer than a name may be
    monkeypatch.setenv("CUBN_CACHE_DIR", str(folder))
    assert str(folder) in info()


@pytest.mark.parametrize("absent", ["cubn.backends.cpu.by_numba", "llvmlite"])
def test_a_first_use_without_a_compiler_says_what_to_install(absent):
    code = f"""
import os, sys
os.environ["CUBN_CACHE_DIR"] = ""
sys.modules["{absent}"] = None
import linecache
linecache.getlines = lambda *place: []  # no source
import cubn, numpy
try:
    cubn.moments(numpy.ones((2, 3)))
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.startswith("cubn: the CPU backend needs numba, which cannot be imported (")
    assert absent in run.stdout
    assert run.stdout.endswith("). Install what is missing with: pip install numba llvmlite\n")


def test_an_llvmlite_that_was_left_behind_is_missed(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "cubn.backends.cpu.cache", raising=False)
    with pytest.raises(ImportError, match="pip install numba llvmlite"):
        runpy.run_module("cubn.backends.cpu.cache")


def test_info_runs_with_numpy_alone_and_says_what_to_install():
    absent = ("numba", "llvmlite", "torch", "jax", "sklearn", "tqdm", "cupy", "mpi4py")
    code = (
        f"import sys; sys.modules |= dict.fromkeys({absent}); from cubn.__main__ import main; sys.exit(main(['info']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert re.search(r"^  cpu +not available: .*pip install numba llvmlite", run.stdout, re.MULTILINE)


def test_wheel_holds_the_package_and_the_kernels_folder(tmp_path):
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    listing = subprocess.run([sys.executable, "-m", "zipfile", "-l", wheel], capture_output=True, text=True, check=True)
    for name in ("cubn/__init__.py", "cubn/py.typed", "cubn/backends/cpu/simd.py", "cubn/kernels/README.md"):
        assert re.search(rf"^{re.escape(name)} ", listing.stdout, re.MULTILINE), name
    assert "tests/" not in listing.stdout


def test_the_wheel_the_package_and_the_command_line_have_one_version(tmp_path, capsys):
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    assert Path(wheel).name.split("-")[1] == cubn.__version__
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"cubn {cubn.__version__}\n"
    assert info().startswith(f"cubn {cubn.__version__}, ")


@pytest.mark.parametrize("absent", ["tqdm", "sklearn"])
def test_a_demo_without_its_packages_is_one_line(absent, monkeypatch, capsys):
    for loaded in [name for name in sys.modules if name.startswith(f"{absent}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, absent, None)
    assert main(["demo"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and absent in err
    assert err.endswith("pip install scikit-learn tqdm\n")
