"""Launch plans: every branch has a named shape that reaches it, and whatever the shape, all work is done, once."""

import dis
import inspect
import math
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from types import CodeType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cubn._tree import COLUMNS, TILE
from cubn._types import (
    FLOATS,
    ITEMSIZE,
    Affine,
    CombineOptions,
    Extents,
    GradientOptions,
    NormalizeOptions,
    Operand,
    Operands,
)
from cubn.backends.cuda import parameters, plan
from cubn.backends.cuda.backend import CudaBackend
from cubn.backends.cuda.plan import OCTET, THREADS
from cubn.backends.cuda.plan.launch import ELEMENTS as ELEMENT_TYPES
from cubn.backends.cuda.plan.launch import power_above
from cubn.backends.cuda.plan.passes import _divisor
from cubn.backends.cuda.source import folder
from tests.cuda import calls, plans
from tests.cuda.named import CACHED, NAMED, RESIDENT
from tests.cuda.specialisations import ADDRESS, LIMITS, Recorder

PLAIN = NormalizeOptions(False, False)
DTYPES = {element: dtype for dtype, element in ELEMENT_TYPES.items()}


def operand_of(layer):
    """x of a layer, somewhere in memory."""
    sample, channel, *axes = calls.LAYOUTS[layer.layout](*layer.extents)
    axes = [axis for axis in axes if axis[0] > 1]
    shape, strides = zip(*axes, strict=True) if axes else ((), ())
    return Operand(ADDRESS + layer.offsets[0] * ITEMSIZE[layer.dtype], layer.dtype, sample, channel, shape, strides)


def launches(layer, limits):
    """What a training step, its backward and a combination launch; nobody looks at the addresses."""
    extents, x = Extents(*layer.extents), operand_of(layer)
    mask = Operand(ADDRESS, "bool", extents.S, 0, (extents.S,), (1,)) if layer.masked else None
    residual = x if layer.residual else None
    device = Recorder(limits)
    backend = CudaBackend(device)
    options = NormalizeOptions(layer.residual, layer.residual, layer.residual)
    operands = Operands(x, residual, x, mask=mask)
    statistics, relu_mask = calls.train(backend, extents, operands, Affine(None, None), options)
    gradient = GradientOptions("mask" if layer.residual else "none", False, layer.residual)
    given = extents, Operands(x, x, x, residual, mask), statistics, relu_mask
    sums = calls.backward(backend, *given, gradient)
    backend.backward_apply(*given, sums, CombineOptions(gradient.relu, "added" if residual else "none"))
    return device.launched


# --- every branch ---------------------------------------------------------------------------------------------------


def functions(code):
    """The code of every function in a module's code."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_flags & inspect.CO_OPTIMIZED:  # not a class's
                yield constant
            yield from functions(constant)


def conditions(function):
    """Of each conditional jump: offset, where it jumps to, whether it does so when met, place in the source."""
    for instruction in dis.get_instructions(function):
        name = instruction.opname
        if "JUMP" in name and "_IF_" in name:
            if_met = "IF_TRUE" in name or "IF_NOT_NONE" in name
            yield instruction.offset, instruction.argval, if_met, instruction.positions


FILES = {module.__file__: module for module in plans.MODULES}


def identity(code):
    return code.co_filename, code.co_name, code.co_firstlineno, tuple(code.co_positions())


def steps_taken(runs):
    """What runs of the planner: {(file, function): pairs of offsets, one run after the other}."""
    taken = {}

    def enter(frame, event, _):
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes = True
        steps = taken.setdefault(identity(frame.f_code), set())
        before = None

        def step(frame, event, _):
            nonlocal before
            if event == "opcode":
                steps.add((before, frame.f_lasti))
                before = frame.f_lasti
            return step

        return step

    plans.forget()
    outside = sys.gettrace()
    sys.settrace(enter)
    try:
        for run in runs:
            run()
    finally:
        sys.settrace(outside)
    return taken


def unreached(runs):
    """What of the planner these runs leave out: functions, and conditions that are always or never met."""
    taken = steps_taken(runs)
    for file, module in FILES.items():
        source = inspect.getsource(module)
        lines = source.splitlines()
        for function in functions(compile(source, file, "exec")):
            steps = taken.get(identity(function), ())
            if not steps:
                yield function.co_name
            outcomes = {}
            for offset, target, if_met, place in conditions(function):
                met = {(after == target) == if_met for before, after in steps if before == offset}
                outcomes.setdefault(place, set()).update(met)
            for place, met in outcomes.items():
                if steps and len(met) < 2:
                    yield f"{place.lineno}: {lines[place.lineno - 1].strip()}"


def planned(name):
    """A run of the planner for a named layer; the device asks for the name of the kernel's file."""
    return lambda: [launch.source for launch in launches(*NAMED[name])]


def more_than_32_bits_count():
    plan.elementwise(Extents(5, 67, 6500001), "nchw", "float16", PLAIN, RESIDENT)


def more_rows_than_a_block_merges():
    plan.reduction(Extents(2**26, 4, 1), "nhwc", "Moments", "none", "float32", 2, RESIDENT)


def nothing_to_plan():
    x = operand_of(calls.Layer((0, 3, 4)))
    plan.slab(Extents(0, 3, 4), Operands(x), PLAIN, RESIDENT)
    plan.slab_channels(Extents(0, 3, 4), Operands(x), PLAIN, RESIDENT)


def a_relu_mask_in_another_order():
    layer = calls.Layer((4, 16, 64), residual=True)
    x = operand_of(layer)
    gradient = GradientOptions("mask", False, False)
    assert plan.layout_of(Extents(*layer.extents), Operands(x), "nhwc") == "strided"
    assert plan.on_chip(Extents(*layer.extents), Operands(x, x, x), "nhwc", gradient, RESIDENT) is None


def no_tickets():
    """Beside those of too many channels for the cache, or too few: torn octets, and vectors that begin elsewhere."""
    for layer in (
        calls.Layer((4, 8, 49)),
        calls.Layer((600, 8, 49), layout="nchw, samples apart", offsets=(1,) * 6),
        calls.Layer((600, 8, 49), layout="nchw, channels apart"),
        calls.Layer((600, 5, 98)),
        calls.Layer((2000, 64, 4)),
        calls.Layer((3, 2, 25000)),
        calls.Layer((3, 2, 25000), "float64", layout="backwards"),
        calls.Layer((600, 129, 1)),
        calls.Layer((600, 264, 1), offsets=(1,) * 6),
        calls.Layer((8, 200, 49), layout="nhwc, samples apart"),
        calls.Layer((40000, 8, 8), layout="nhwc"),
    ):
        x = operand_of(layer)
        plan.ticketed(Extents(*layer.extents), Operands(x, y=x), None, PLAIN, CACHED)
    many = replace(CACHED, l2_bytes=1 << 30)
    plan.ticketed(Extents(1 << 17, 64, 300), Operands(operand_of(calls.Layer((1 << 17, 64, 300)))), None, PLAIN, many)


def nodes_of_ranks():
    plan.root(6, "Moments", (0, 1, 0, 2))


def a_channel_that_is_renormalised():
    assert plan.channelwise("renormalise", 600).source == "renormalise"


OTHERS = [
    more_than_32_bits_count,
    more_rows_than_a_block_merges,
    nothing_to_plan,
    a_relu_mask_in_another_order,
    no_tickets,
    nodes_of_ranks,
    a_channel_that_is_renormalised,
]


def test_the_named_layers_reach_every_branch():
    """The same layers are run by tests/cuda/test_named.py."""
    assert not list(unreached([*map(planned, NAMED), *OTHERS]))


def test_what_is_not_reached_is_seen():
    assert "_channels" in unreached([planned("masked")])
    assert any("C % OCTET == 0" in line for line in unreached([planned("channels")]))


# --- any shape ------------------------------------------------------------------------------------------------------

MOST_BLOCKS = 2**31 - 1
SHARED_BYTES = 48 << 10  # of a block that asks for no more
EXTENT = st.one_of(st.integers(1, 70), st.integers(1, 5000), st.integers(1, 2**33))
ELEMENTS = 2**37  # at most


EXTENTS = st.tuples(EXTENT, EXTENT, EXTENT).filter(lambda extents: math.prod(extents) <= ELEMENTS)
LAYERS = st.builds(
    calls.Layer,
    extents=EXTENTS,
    dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(sorted(calls.LAYOUTS)),
    offsets=st.integers(0, 7).map(lambda offset: (offset,) * 6),
    residual=st.booleans(),
    masked=st.booleans(),
)


def covers(parts, size, whole):
    """Whether so many parts of a size cover the whole, and none is to spare."""
    return (parts - 1) * size < whole <= parts * size


def check_launch(launch, extents, limits):
    """The grid of one kernel covers all there is to do, once, within the limits of the device."""
    N, C, S = extents
    fields = dict(launch.fields)
    options = dict(option[2:].split("=") for option in launch.options)
    across = fields.get("blocks_across", 1)
    group = fields.get("group")
    assert 1 <= launch.grid <= MOST_BLOCKS and launch.grid % across == 0
    down = launch.grid // across
    padded = power_above(-(-S // TILE)) * N
    static = 0
    match launch.kernel:
        case "reduce_rows" | "reduce_strided":
            assert covers(across, group, C) and covers(down, fields["span"], padded)
            lanes = int(options["TILE_LANES"])
            assert 8 * lanes < 2 * S or lanes == 1  # none is without an octet
            if launch.kernel == "reduce_strided" or S > COLUMNS:
                assert 8 * lanes >= min(S, COLUMNS)  # and has one alone
        case "reduce_channels":
            vector, lanes = int(options["VECTOR"]), 1 << int(options["DEPTH"])
            item = {"float": 4, "double": 8}.get(options["ELEMENT"], 2)
            assert group >= C or group * item >= 64  # whole pairs of sectors
            assert group == lanes * vector and covers(across, group, C) and covers(down, fields["span"], padded)
            assert 1 << int(options["TILE_DEPTH"]) >= min(S, COLUMNS)
            static = THREADS * vector * 16
        case "merge_rows":
            assert covers(across, group, C) and covers(down, fields["merged"], fields["from_rows"])
            assert THREADS % group == 0
        case "finish":
            assert covers(launch.grid, group, C) and THREADS % group == 0
        case "apply_rows":
            assert covers(launch.grid, fields["steps"] * THREADS * OCTET, N * C * S)
            assert options["INDEX"] == "size_t" or N * C * S < 2**31
        case "apply_channels":
            at_once = THREADS // fields["lanes"]
            assert covers(across, fields["lanes"] * OCTET, C) and covers(down, fields["steps"] * at_once, N * S)
        case "apply_strided":
            assert covers(launch.grid, THREADS * OCTET, N * C * S)
        case "ticketed" | "ticketed_channels":
            rows, pieces, ahead = (fields[name] for name in ("rows", "pieces", "ahead"))
            assert pieces % rows == 0 and covers(pieces // rows, group, C) and covers(rows, fields["span"], padded)
            assert min(rows, pieces) <= ahead <= pieces  # nobody waits for work of a later ticket
            values = min(group, C) * (fields["span"] * min(S, TILE))
            assert ahead * values * ITEMSIZE[DTYPES[options["ELEMENT"]]] <= limits.l2_bytes // 2 or ahead == pieces
            if launch.kernel == "ticketed":
                lanes = int(options["TILE_LANES"])
                assert group * S % OCTET == 0 and 8 * lanes < 2 * S
                assert lanes == 32 or S <= COLUMNS
            else:
                assert group == int(options["VECTOR"]) << int(options["DEPTH"]) and C % OCTET == group % OCTET == 0
                assert 1 << int(options["TILE_DEPTH"]) >= min(S, COLUMNS)
                static = THREADS * int(options["VECTOR"]) * 16
        case "slab" | "slab_channels":
            tiles = power_above(-(-S // TILE))
            assert launch.cluster * fields["span"] == power_above(N) * tiles
            assert launch.grid % launch.cluster == 0 and covers(launch.grid // launch.cluster, group, C)
            assert group <= launch.threads  # which finish a channel each
            assert launch.cluster in limits.clusters
            assert launch.shared_bytes <= limits.shared_bytes
            if launch.kernel == "slab_channels":
                samples = min(N, fields["span"] // tiles)
                rows = samples * S if samples else min(S, fields["span"] * TILE)
                assert rows * int(options["SLICE"]) <= fields["slot"] < launch.shared_bytes
                piece = 256 // int(options["SLICE"]) << int(options["DEPTH"])  # columns
                assert launch.cluster == 1 or fields["span"] << int(options["TILE_DEPTH"]) >= piece
                assert group % OCTET == 0 and 1 << int(options["TILE_DEPTH"]) >= min(S, COLUMNS)
        case _:
            assert launch.source == "channelwise" and covers(launch.grid, THREADS, C)
    assert launch.kernel.startswith("slab") or launch.shared_bytes + static <= SHARED_BYTES


@given(LAYERS, st.sampled_from([RESIDENT, *LIMITS, *(replace(RESIDENT, cluster=most) for most in (1, 2, 4))]))
@settings(max_examples=500)
def test_all_work_is_done_once(layer, limits):
    extents = Extents(*layer.extents)
    rows = None  # of nodes, that the next launch is to merge
    for launch in launches(layer, limits):
        check_launch(launch, extents, limits)
        fields = dict(launch.fields)
        if rows is not None:
            assert launch.kernel in ("merge_rows", "finish") and fields["from_rows"] == rows
        rows = None
        if launch.kernel.startswith("reduce_") or launch.kernel == "merge_rows":
            rows = launch.grid // fields["blocks_across"]
    assert rows is None


# --- blocks for the device --------------------------------------------------------------------------------------------

RESNET50 = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14))
"""Channels and edge of layers that are too large to stay on chip, on some device."""


@pytest.mark.parametrize("multiprocessors", [40, 108, 128, 132])
@pytest.mark.parametrize("N", [32, 256])
@pytest.mark.parametrize(("C", "edge"), RESNET50)
@pytest.mark.parametrize("what", ["Moments", "Sums"])
def test_channels_last_layers_fill_the_device_and_are_finished_by_the_next_launch(C, edge, N, what, multiprocessors):
    extents, limits = Extents(N, C, edge * edge), replace(RESIDENT, multiprocessors=multiprocessors)
    cut = plan.reduction(extents, "nhwc", what, "none", "bfloat16", 4, limits)
    narrow = dict(cut.reduce.fields)["group"] == 32  # 64 bytes of channels
    assert cut.reduce.grid >= 3.5 * multiprocessors or narrow
    assert not cut.merges


@pytest.mark.parametrize("multiprocessors", [40, 108, 128, 132])
@pytest.mark.parametrize("N", [32, 256])
@pytest.mark.parametrize(("C", "edge"), [(256, 14), (1024, 14), (512, 7), (2048, 7)])
def test_rows_of_one_tile_fill_the_device_with_as_few_lanes_as_can(C, edge, N, multiprocessors):
    extents, limits = Extents(N, C, edge * edge), replace(RESIDENT, multiprocessors=multiprocessors)
    reduce = plan.reduction(extents, "nchw", "Moments", "none", "bfloat16", 1, limits).reduce
    assert reduce.grid > 3 * multiprocessors
    assert reduce.grid <= 6 * multiprocessors or "-DTILE_LANES=1" in reduce.options


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [31, 63])
@given(data=st.data())
def test_division_by_a_constant_is_exact(bits, data):
    by = data.draw(st.integers(1, 2**bits - 1))
    at = data.draw(st.integers(0, (2**bits - 1) // by)) * by
    near = st.sampled_from([n for n in (at - 1, at, at + by - 1) if 0 <= n < 2**bits])
    n = data.draw(near | st.integers(0, 2**bits - 1))
    fields = _divisor("by", by, bits)
    if fields["by.shift"] < 0:
        assert by == 1
    else:
        multiplier = fields["by.multiplier"] % 2 ** (bits + 1)
        assert -(2**63) <= fields["by.multiplier"] < 2**63
        assert n * multiplier >> bits + 1 >> fields["by.shift"] == n // by


@pytest.mark.parametrize(
    ("layer", "dense"),
    [
        (calls.Layer((4, 16, 64)), True),
        (calls.Layer((4, 16, 49)), True),
        (calls.Layer((4, 16, 64), layout="nhwc"), True),
        (calls.Layer((4, 16, 64), layout="nhwc, positions apart"), True),
        (calls.Layer((4, 16, 64), offsets=(1,) * 6), False),
        (calls.Layer((4, 16, 64), layout="nchw, channels apart"), False),
        (calls.Layer((4, 16, 64), layout="nchw, samples apart"), False),
        (calls.Layer((4, 16, 64), "float16", layout="nhwc", offsets=(4,) * 6), False),
    ],
    ids=str,
)
def test_which_elementwise_kernels_need_not_look_at_addresses(layer, dense):
    extents, x = Extents(*layer.extents), operand_of(layer)
    launch = plan.elementwise(extents, plan.elementwise_layout(extents, Operands(x)), layer.dtype, PLAIN, RESIDENT)
    assert plan.is_dense(launch, extents, Operands(x)) is dense
    elsewhere = operand_of(replace(layer, offsets=(1,) * 6))
    assert not plan.is_dense(launch, extents, Operands(x, elsewhere))


# --- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_members_are_where_the_compiler_has_them(tmp_path):
    names = [re.sub(r"\.(\d+)", r"[\1]", name) for name in parameters.members()]
    offsets = ", ".join(f"__builtin_offsetof(Parameters, {name})" for name in names)
    header = (folder() / "parameters.cuh").read_text().replace("#pragma once", "")
    program = f"""
    #include <cstdio>
    #include <initializer_list>
    {header}
    int main() {{ for (unsigned long offset : {{{offsets}, sizeof(Parameters)}}) std::printf("%lu ", offset); }}"""
    target = tmp_path / "offsets"
    subprocess.run(["g++", "-x", "c++", "-", "-o", str(target)], input=program, text=True, check=True)
    found = subprocess.run([str(target)], capture_output=True, text=True, check=True).stdout.split()
    words = [8 * member.word for member in parameters.members().values()]
    assert [*map(int, found)] == [*words, len(parameters.pack({}))]


def test_a_template_is_filled_with_the_values_of_a_call():
    fields = {"samples": 2**40, "x.sample": 7, "last.share.7": 5, "momentum": 0.1, "slot": 3}
    places = {"x.pointer": 2, "eps": 0, "y.pointer": 2, "g.pointer": 1, "first": 3, "second": 4, "samples": 1}
    values = (1e-5, 2**63 - 1, -8, 5, 6)
    filled = parameters.Template(fields, places).filled(values)
    assert filled == parameters.pack({**fields, **{name: values[place] for name, place in places.items()}})


def test_fields_are_packed_where_the_struct_has_them():
    fields = {"samples": 2**40, "x.pointer": 2**63 - 1, "last.share.7": 5, "eps": 1e-5, "momentum": -0.0}
    block = parameters.pack(fields)
    members = parameters.members()
    assert len(block) == 8 * len(members)
    for name, (word, is_double) in members.items():
        value = struct.unpack_from("d" if is_double else "q", block, 8 * word)[0]
        assert value == fields.get(name, 0)
    with pytest.raises(KeyError):
        parameters.pack({"sample": 1})
