"""The tables of the documents are what the planner and the compiler give today."""

import json

import pytest

from tests.cuda import compiled, nvrtc
from tests.cuda.instructions import TABLES, of_page, parsed_arguments


def check(table):
    given = "\n".join(TABLES[table](parsed_arguments([])))
    assert of_page(table) == given, f"python -m tests.cuda.instructions --write --table {table}"


def test_plans_are_the_planner_s():
    check("plans")


@pytest.mark.slow
@pytest.mark.parametrize("table", ["instructions", "occupancy", "predicted"])
def test_what_is_compiled_is_the_compiler_s(table):
    try:
        nvrtc.library(13)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    check(table)


def test_the_record_of_compiled_kernels_has_nothing_wrong():
    if not compiled.RECORD.exists():
        pytest.skip("there is no record of compiled kernels: python -m tests.cuda.compiled")
    record = json.loads(compiled.RECORD.read_text())
    assert {name: column["wrong"] for name, column in record["columns"].items() if column["wrong"]} == {}
    if reason := compiled.stale():  # a nuisance at every change, if it failed
        pytest.skip(f"{reason}: python -m tests.cuda.compiled")


@pytest.mark.slow
def test_the_record_of_compiled_kernels_is_of_the_present_ones():
    assert compiled.stale() == ""
