"""tests/gpu/run.sh from beginning to end without a GPU: stand-ins for CuPy and torch, and a tree of sources alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_on_cpu.build import unavailable
from tests.gpu import digests
from tests.gpu.run import STAND_INS

ROOT = Path(__file__).parents[2]
SOURCES = ("asv_benchmarks", "cubn", "kernels", "tests", "pyproject.toml")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "results", "*.so", "*.nbi", "*.nbc")


@pytest.mark.skipif(bool(unavailable()), reason=unavailable())
def test_the_short_run_from_a_tree_without_build_outputs(tmp_path):
    tree, out = tmp_path / "tree", tmp_path / "out"
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=LEFT_OUT)
        else:
            shutil.copy(source, tree / name)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CUBN_REQUIRE_GPU")}
    run = subprocess.run(
        [tree / "tests" / "gpu" / "run.sh", "--rehearse", "first", "second"],
        env=environment | {"PYTHON": sys.executable, "OUT": str(out)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    summary = json.loads((out / "summary.json").read_text())
    assert run.returncode == 0, run.stdout
    assert {step["status"] for stage in summary.values() for step in stage["steps"].values()} == {"passed"}
    assert summary["first"]["found"]["packages"]
    lines = {
        stage: [json.loads(line) for line in (out / f"{stage}.jsonl").read_text().splitlines()] for stage in summary
    }

    def results(stage, step, key):
        return [line[key] for line in lines[stage] if line["step"] == step and key in line]

    assert results("first", "launches", "as_on_the_cpu") == [True] * 2
    assert results("first", "smoke", "as_on_the_cpu") == [True]
    assert results("first", "kernels of layers", "called") == [True]
    assert [len(results("first", step, "share")) for step in ("layers", "layers, float32")] == [2, 2]
    assert len(results("first", "layers of others", "torch_ms")) == 4
    assert len(results("first", "memory traffic", "refused")) == 1
    assert results("first", "tests", "outcome") == ["passed"]
    assert len(results("first", "host", "measured")) == 2
    assert results("second", "kernels of clusters", "as_on_the_cpu") == [True]
    assert sorted(results("second", "clusters", "tool")) == ["memcheck", "racecheck", "synccheck"]
    assert not any("error" in line for stage in lines.values() for line in stage)
    assert sum(path.stat().st_size for path in out.iterdir()) < 100_000


BREAKS_THE_FIRST = """
from tests.gpu import digests
stores = digests.stores
def broken(case):
    if case == digests.CASES[0]:
        raise RuntimeError("an illegal memory access")
    return stores(case)
digests.stores = broken
"""


@pytest.mark.skipif(bool(unavailable()), reason=unavailable())
def test_after_an_error_another_process_goes_on(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BREAKS_THE_FIRST)
    folders = map(str, (tmp_path, ROOT, STAND_INS))
    cut = len(digests.CASES) // 2
    run = subprocess.run(
        [sys.executable, "-m", "tests.gpu.smoke", "--part", "0", str(cut)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    first, second = map(json.loads, run.stdout.splitlines())
    assert first["case"] == str(digests.CASES[0]) and "an illegal memory access" in first["error"]
    assert second["case"] == str(digests.CASES[cut]) and second["as_on_the_cpu"]
    assert run.returncode == 1
