"""Each example runs, in seconds, and ends with what it set out to show; the examples assert their own claims."""

import importlib.util
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
    "validation_explodes": "an overflow in channel 2: torch's running mean is not finite from then on, cubn's is",
    "own_batch_norm": "moments of parts, merged, then normalize and update: the bits of forward_train",
    "one_state_per_domain": "night: running mean -0.",
    "two_images_per_device": "without synchronisation, in torch: outputs off by 0.5",
    "training_to_production": "one value per channel: forward_train: x must have more than one value",
}


OF_SEVERAL_PROCESSES = {"pytorch_resnet"}


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == LAST_LINES.keys() | OF_SEVERAL_PROCESSES


def run(name, monkeypatch, *arguments):
    """As from the command line."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", LAST_LINES)
def test_example_shows_what_it_claims(name, monkeypatch, capsys, tmp_path):
    text = (EXAMPLES / f"{name}.py").read_text()
    for library in ("torch", "sklearn"):
        if re.search(f"^(import|from) {library}", text, re.MULTILINE):
            pytest.importorskip(library)
    figure = tmp_path / "figure.png" if "--figure" in text and importlib.util.find_spec("matplotlib") else None
    run(name, monkeypatch, *(["--figure", str(figure)] if figure else []))
    assert capsys.readouterr().out.splitlines()[-1].startswith(LAST_LINES[name])
    assert figure is None or figure.read_bytes().startswith(b"\x89PNG")


def test_ranks_are_threads_where_mpi4py_is_there_for_something_else(monkeypatch, capsys):
    pytest.importorskip("mpi4py")
    run("one_state_per_domain", monkeypatch)
    assert capsys.readouterr().out.splitlines()[-1].startswith(LAST_LINES["one_state_per_domain"])


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


def test_every_figure_is_shown_with_the_command_that_makes_it():
    stories = (EXAMPLES.parent / "docs" / "stories.md").read_text()
    texts = "".join(path.read_text() for path in EXAMPLES.glob("*.py"))
    commands = re.findall(r"^    (python examples/\w+\.py --figure docs/(figures/\w+\.png))$", texts, re.MULTILINE)
    assert len(commands) == 5
    for command, figure in commands:
        assert command in stories and f"({figure})" in stories
        assert (EXAMPLES.parent / "docs" / figure).exists()
