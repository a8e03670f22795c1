"""What the README and the documents show: their Python runs, their links lead somewhere, their tables were measured."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CHANGELOG.md", ROOT / "kernels" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def python_blocks(path):
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


BLOCKS = [
    pytest.param(block, id=f"{path.stem}-{i}") for path in DOCUMENTS for i, block in enumerate(python_blocks(path))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_in_documents_runs(block):
    exec(compile(block, "<document>", "exec"), {"__name__": "document"})


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_readme_has_a_short_example_of_each_array_library(library):
    example = next(block for block in python_blocks(README) if block.startswith(f"import {library}"))
    assert example.count("\n") <= 12


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize(
    ("script", "result", "document"),
    [
        ("compare.py", "cpu.json", README),
        ("accuracy.py", "accuracy.json", ROOT / "docs" / "numerics.md"),
        ("synchronised.py", "synchronised.json", ROOT / "docs" / "synchronised.md"),
        ("cost_of_ranks.py", "synchronised.json", ROOT / "docs" / "synchronised.md"),
    ],
)
def test_table_is_that_of_the_committed_result_file(script, result, document):
    (path,) = (ROOT / "asv_benchmarks" / "results").glob(f"*/{result}")
    command = [sys.executable, str(ROOT / "asv_benchmarks" / script), "--table", str(path)]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert table in document.read_text()
    assert path.parent.name in document.read_text()
