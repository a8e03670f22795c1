"""Each example runs, in seconds, and ends with what it set out to show; the examples assert their own claims."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LAST_LINES = {
    "output_independent_of_batch": "one product per batch:  first layer that depends on the batch:",
    "validation_explodes": "recalibrated: running mean",
    "own_batch_norm": "moments of parts, merged, then normalize and update: the bits of forward_train",
    "one_state_per_domain": "night: running mean -0.",
    "two_images_per_device": "without synchronisation: outputs off by",
    "training_to_production": "folded into the layer before: the same answer up to rounding",
}


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(LAST_LINES)


@pytest.mark.parametrize("name", LAST_LINES)
def test_example_shows_what_it_claims(name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1].startswith(LAST_LINES[name])


def test_ranks_are_threads_where_mpi4py_is_there_for_something_else(capsys):
    pytest.importorskip("mpi4py")
    test_example_shows_what_it_claims("one_state_per_domain", capsys)


def test_every_example_is_linked_from_the_readme():
    readme = (EXAMPLES.parent / "README.md").read_text()
    for name in LAST_LINES:
        assert f"(examples/{name}.py)" in readme
