"""What the README and the documents show: their Python runs, their links lead somewhere, their tables were measured."""

import ast
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


def anchors(path):
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_links_to_headings_find_them(path):
    for target, anchor in re.findall(r"\]\(((?!https?:)[^)#]*)#([^)]+)\)", path.read_text()):
        assert anchor in anchors(path.parent / target if target else path), (target, anchor)


FOLDERS = ("cubn", "kernels", "tests", "examples", "asv_benchmarks", "docs")
OF_THE_READER = {"train.py"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_files_that_are_named_exist(path):
    there = {file.name for folder in FOLDERS for file in (ROOT / folder).rglob("*.*")}
    named = set(re.findall(r"\b(\w+\.(?:py|cuh?|sh))\b", path.read_text()))
    assert named - there == named & OF_THE_READER


def test_the_architecture_names_every_file_of_the_package():
    named = (ROOT / "docs" / "architecture.md").read_text()
    folders_of_one_kind = {"_arrays", "plan"}
    files = [path for path in (ROOT / "cubn").rglob("*.py") if path.parent.name not in folders_of_one_kind]
    left_out = {path.name for path in files if not re.search(rf"\b{path.name}\b", named)} - {"__init__.py"}
    assert left_out == set()


@pytest.mark.parametrize(
    ("script", "result", "document"),
    [
        ("compare.py", "cpu.json", README),
        ("networks.py", "networks.json", README),
        ("host_cost.py", "host_cost.json", README),
        ("idle.py", "idle.json", ROOT / "docs" / "decisions" / "0011-threads-that-share.md"),
        ("accuracy.py", "accuracy.json", ROOT / "docs" / "numerics.md"),
        ("synchronised.py", "synchronised.json", ROOT / "docs" / "synchronised.md"),
        ("cost_of_ranks.py", "synchronised.json", ROOT / "docs" / "synchronised.md"),
        ("cycles.py", "cycles.json", ROOT / "docs" / "cpu.md"),
        ("cycles.py", "contracts.json", ROOT / "docs" / "decisions" / "0012-what-the-contract-costs.md"),
        ("cycles_here.py", "cycles_here.json", ROOT / "docs" / "cpu.md"),
        ("checkpoints.py", "checkpoints.json", ROOT / "docs" / "health.md"),
        ("monitor.py", "monitor.json", ROOT / "docs" / "health.md"),
    ],
)
def test_table_is_that_of_the_committed_result_file(script, result, document):
    (path,) = (ROOT / "asv_benchmarks" / "results").glob(f"*/{result}")
    command = [sys.executable, str(ROOT / "asv_benchmarks" / script), "--table", str(path)]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert table in document.read_text()
    assert path.parent.name in document.read_text()


BAD_INPUT = (ROOT / "docs" / "bad_input.md").read_text()


def exceptions(text):
    return set(re.findall(r"\b(\w*Error|CollectiveMismatch|BackendUnavailable)\b", text))


def named_by_tests():
    """By number, the exceptions that the tests of bad input name, from their decorators to their ends."""
    source = (ROOT / "tests" / "ops" / "test_bad_input.py").read_text()
    found = {}
    for node in ast.parse(source).body:
        numbers = re.match(r"test((_\d+)+)_", getattr(node, "name", ""))
        if numbers:
            begin = min(part.lineno for part in (node, *node.decorator_list))
            text = "\n".join(source.splitlines()[begin - 1 : node.end_lineno])
            for number in numbers[1].split("_")[1:]:
                found.setdefault(int(number), set()).update(exceptions(text) - {"CudaError"})
    return found


def test_every_number_of_bad_input_is_tested_for_the_exceptions_that_the_page_names():
    rows = re.findall(r"^\| (\d+) \| .*? \| ([^|]*) \| [^|]* \|$", BAD_INPUT, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 26))
    assert {int(number): exceptions(named) for number, named in rows} == named_by_tests()
