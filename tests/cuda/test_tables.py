"""The tables of the documents are what the planner and the compiler give today."""

import json

import numpy as np
import pytest

from cubn.backends.cuda.plan import Launch
from tests.cuda import compiled, instructions, nvrtc
from tests.cuda.instructions import TABLES, of_page, parsed_arguments
from tests.cuda.machine.machine import Counts
from tests.cuda.resnet50 import DEVICES, PASSES, Layer, apart, launches
from tests.cuda.test_compiler import SPILT


def check(table):
    given = "\n".join(TABLES[table](parsed_arguments([])))
    assert of_page(table) == given, f"python -m tests.cuda.instructions --write --table {table}"


@pytest.mark.parametrize("table", ["first calls", "plans"])
def test_what_is_planned_is_the_planner_s(table):
    check(table)


@pytest.mark.parametrize(
    ("device", "threads", "shared", "registers", "blocks"),
    [
        ("H200", 256, 99 << 10, 64, 2),  # shared memory, with 1 KiB of each block's that is reserved
        ("H200", 256, 114 << 10, 64, 1),
        ("T4", 256, 32 << 10, 64, 2),
        ("H200", 256, 0, 65, 3),  # registers, by eight
        ("RTX 4090", 512, 0, 32, 3),  # threads
        ("T4", 32, 0, 16, 16),  # blocks
    ],
)
def test_a_multiprocessor_has_room_for_so_many_blocks(monkeypatch, device, threads, shared, registers, blocks):
    monkeypatch.setattr(instructions, "compiled", lambda *_: nvrtc.Kernel("", registers, 0, 0))
    launch = Launch("f", (), 1, shared, (), threads=threads)
    assert instructions.blocks_at_once(launch, DEVICES[device]) == blocks


def test_blocks_that_take_turns_reduce_where_they_read_and_apply_where_they_write():
    phases = np.array([[[1, 2, 4]], [[8, 16, 32]]])
    reads = np.array([[True, False, True], [False, True, False]])
    writes = np.array([[False, False, True], [True, False, False]])
    assert instructions.by_touch(Counts(phases, phases, reads, writes)) == (1 + 16, 2 + 32, 4 + 8)


@pytest.mark.parametrize(("layout", "limits"), [("nchw", PASSES), ("nhwc", PASSES), ("nchw", DEVICES["H200"].limits)])
def test_addresses_of_a_launch_are_apart_and_nothing_else_changes(layout, limits):
    for each in launches(Layer(32, 512, 28, layout, operation="backward"), limits):
        parameters, bases = apart(each.parameters)
        words, before = (np.frombuffer(block, np.int64) for block in (parameters, each.parameters))
        assert len(set(bases.values())) == len(bases) == (words != before).sum()


@pytest.mark.slow
@pytest.mark.parametrize("table", ["instructions", "occupancy", "predicted"])
def test_what_is_compiled_is_the_compiler_s(table):
    try:
        compiler = f"CUDA {nvrtc.version(13)}:"
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if compiler not in of_page("instructions"):
        pytest.skip(f"the tables are of another compiler than that of {compiler[:-1]}")
    check(table)


def test_the_record_of_compiled_kernels_has_nothing_wrong():
    if not compiled.RECORD.exists():
        pytest.skip("there is no record of compiled kernels: python -m tests.cuda.compiled")
    record = json.loads(compiled.RECORD.read_text())
    wrong = [line for column in record["columns"].values() for line in column["wrong"]]
    assert [line for line in wrong if line.partition(" ")[0] not in SPILT or " 8 bytes of local" not in line] == []
    if reason := compiled.stale():  # a nuisance at every change, if it failed
        pytest.skip(f"{reason}: python -m tests.cuda.compiled")


@pytest.mark.slow
def test_the_record_of_compiled_kernels_is_of_the_present_ones():
    assert compiled.stale() == ""
