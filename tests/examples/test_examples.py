"""Each example runs, in seconds, and ends with what it set out to show; the examples assert their own claims."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LAST_LINES = {
    "output_independent_of_batch": "one product per batch:  first layer that depends on the batch:",
    "output_independent_of_batch_torch": "kinds of layers that depend on the batch:",
    "validation_explodes": "recalibrated: running mean",
    "own_batch_norm": "moments of parts, merged, then normalize and update: the bits of forward_train",
    "one_state_per_domain": "night: running mean -0.",
    "two_images_per_device": "without synchronisation: outputs off by",
    "training_to_production": "folded into the layer before: the same answer up to rounding",
}


OF_SEVERAL_PROCESSES = {"pytorch_resnet"}


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == LAST_LINES.keys() | OF_SEVERAL_PROCESSES


@pytest.mark.parametrize("name", LAST_LINES)
def test_example_shows_what_it_claims(name, capsys):
    if "import torch" in (EXAMPLES / f"{name}.py").read_text():
        pytest.importorskip("torch")
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1].startswith(LAST_LINES[name])


def test_ranks_are_threads_where_mpi4py_is_there_for_something_else(capsys):
    pytest.importorskip("mpi4py")
    test_example_shows_what_it_claims("one_state_per_domain", capsys)


def test_the_network_over_processes_shows_which_bits_are_equal():
    pytest.importorskip("torch")
    command = [sys.executable, "-W", "error", str(EXAMPLES / "pytorch_resnet.py"), "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    cells = dict(re.findall(r"^(\S.*?) {2,}(?:\S.*?) {2,}(\S.*)$", done.stdout, re.MULTILINE))
    assert len(cells) == 9
    equal = [title for title, cell in cells.items() if cell == "equal bits"]
    assert equal[:3] == [f"a batch norm alone: {what}" for what in ("y", "dx", "running statistics")]
    weights = cells["network, step 1: weights"]
    assert weights == "equal bits" or float(weights.removeprefix("off by ")) < 1e-5
    assert cells["test accuracy, 2 processes"].endswith("%")


def test_every_example_is_linked_from_the_readme():
    readme = (EXAMPLES.parent / "README.md").read_text()
    for name in LAST_LINES.keys() | OF_SEVERAL_PROCESSES:
        assert f"(examples/{name}.py)" in readme
