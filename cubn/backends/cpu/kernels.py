"""The kernels: each claims tasks until none is left, and each is one phase, or several while a channel's slab is in
cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from cubn.backends.cpu import channels
from cubn.backends.cpu.arithmetic import Moments, Reduction, Sums
from cubn.backends.cpu.elementwise import (
    Backward,
    Forward,
    Pass,
    channel_pass,
    flat_pass,
    group_pass,
    position_pass,
    repeat_channels,
)
from cubn.backends.cpu.nodes import AT_SPREAD, HALF_NODE, Source, jit
from cubn.backends.cpu.parameters import OFFSET
from cubn.backends.cpu.plan import NODE
from cubn.backends.cpu.reduce import channels_of_a_slot, gather
from cubn.backends.cpu.simd import (
    DOUBLE,
    LANES,
    Element,
    Value,
    claim,
    convert,
    first_lanes,
    get,
    instruction,
    load_raw,
    put,
    ratio,
    splat,
    store_raw,
)
from cubn.backends.cpu.strided import strided_pass

Function = Callable[[int, int], None]

TASK, TASKS, PASS_TASK, PASS_TASKS = (OFFSET[name] for name in ("task", "tasks", "pass_task", "pass_tasks"))
SAMPLES, CHANNELS, POSITIONS = OFFSET["samples"], OFFSET["channels"], OFFSET["positions"]
X, X_CHANNEL, G, G_CHANNEL = OFFSET["x"], OFFSET["x_channel"], OFFSET["g"], OFFSET["g_channel"]
BITS, BITS_CHANNEL = OFFSET["bits"], OFFSET["bits_channel"]
COEFFICIENTS, COEFFICIENT_ROW = OFFSET["coefficients"], OFFSET["coefficient_row"]
ROW_TABLE, CHUNK, CHUNKS, BLOCK = OFFSET["rows"], OFFSET["chunk"], OFFSET["chunks"], OFFSET["block"]
NODE_FIRST, NODE_SECOND, NODE_COUNT = OFFSET["node_first"], OFFSET["node_second"], OFFSET["node_count"]
SCRATCH, SCRATCH_SIZE = OFFSET["scratch"], OFFSET["scratch_size"]
AT_COUNTS = OFFSET["at_counts"]
COUNT, MEAN, M2, VAR, INVSTD = (OFFSET[name] for name in ("count", "mean", "m2", "var", "invstd"))
FIRST, SECOND = OFFSET["first"], OFFSET["second"]
GAMMA, BETA, DGAMMA, DBETA = (OFFSET[name] for name in ("gamma", "beta", "dgamma", "dbeta"))
KEPT_GAMMA, KEPT_BETA = OFFSET["kept_gamma"], OFFSET["kept_beta"]
OLD_MEAN, OLD_VAR, NEW_MEAN, NEW_VAR = (OFFSET[name] for name in ("old_mean", "old_var", "new_mean", "new_var"))
CODE, STRIDE = OFFSET["gamma_code"] - GAMMA, OFFSET["gamma_stride"] - GAMMA  # behind any vector's address
EPS, MOMENTUM, CUMULATIVE, DDOF = (OFFSET[name] for name in ("eps", "momentum", "cumulative", "ddof"))
TRACKED, SKIPPED = OFFSET["tracked"], OFFSET["skipped"]
STEPS, STEP_TABLE, NODE_ROW = OFFSET["steps"], OFFSET["step_table"], OFFSET["node_row"]


@instruction()
def store_lanes(to: Value, slot: Value, lanes: Value) -> None:
    """The first `lanes` float64 of a vector in scratch."""
    store_raw(load_raw(slot, DOUBLE, 8), to, 8, first_lanes(lanes))


@instruction()
def clear(slot: Value) -> None:
    """The node of nothing."""
    zero = Value(slot.b, ir.Constant(ir.VectorType(DOUBLE, LANES), None))
    store_raw(zero, slot, 8)
    store_raw(zero, slot + HALF_NODE, 8)


def reduce_rows(source: Source, kind: str) -> Function:
    """One node a row and channel. Task: a row of the plan's table, a chunk of channels."""
    collect, in_slot = gather(source, kind), channels_of_a_slot(kind)
    # then a word is 16 channels, and strided.py finds its own
    bits_by_position = kind in ("channels", "single", "narrow")

    def kernel(p, worker):  # type: ignore[no-untyped-def]
        work = get(p + SCRATCH) + worker * get(p + SCRATCH_SIZE)
        chunk, chunks, c_all = get(p + CHUNK), get(p + CHUNKS), get(p + CHANNELS)
        task = claim(p + TASK)
        while task < get(p + TASKS):
            r, c0 = task // chunks, task % chunks * chunk
            row = get(p + ROW_TABLE) + 32 * r
            few = min(chunk, c_all - c0)
            bits = get(p + BITS) + c0 * get(p + BITS_CHANNEL)
            if bits_by_position:
                bits += c0 // 8
            slots = collect(
                p,
                work,
                (get(p + X) + c0 * get(p + X_CHANNEL), get(p + G) + c0 * get(p + G_CHANNEL), bits),
                get(row),
                get(row + 8),
                get(row + 16),
                get(row + 24),
                c0,
                (few + in_slot - 1) // in_slot,
            )
            count = get(work + get(p + AT_COUNTS) + 2048)
            if count == 0:
                for c in range(0, few, in_slot):
                    clear(slots + c // in_slot * NODE)
            for c in range(0, few, in_slot):
                to, slot = 8 * (r * c_all + c0 + c), slots + c // in_slot * NODE
                store_lanes(get(p + NODE_FIRST) + to, slot, min(few - c, in_slot))
                store_lanes(get(p + NODE_SECOND) + to, slot + HALF_NODE, min(few - c, in_slot))
            put(get(p + NODE_COUNT) + 8 * r, count)
            task = claim(p + TASK)

    return kernel


def merge_rows(what: Reduction) -> Function:
    """The plan's steps (left row, right row) over node rows. Where a root is asked for, it is what row 0 then holds."""
    at_once, sets_count = LANES, what is Moments

    @instruction()
    def merge(a: Value, a2: Value, b: Value, b2: Value, count_a: Value, count_b: Value, lanes: Value) -> None:
        mask = first_lanes(lanes)
        left = load_raw(a, DOUBLE, 8, mask), load_raw(a2, DOUBLE, 8, mask)
        right = load_raw(b, DOUBLE, 8, mask), load_raw(b2, DOUBLE, 8, mask)
        share = ratio(count_b, count_a + count_b, DOUBLE)
        first, second = what.merge(left, right, splat(share), splat(convert(count_a, DOUBLE) * share))
        store_raw(first, a, 8, mask)
        store_raw(second, a2, 8, mask)

    @jit
    def replace(to, at, c_all):  # type: ignore[no-untyped-def]
        for c in range(0, c_all, at_once):
            store_lanes(to + 8 * c, at + 8 * c, min(c_all - c, at_once))

    def kernel(p, worker):  # type: ignore[no-untyped-def]
        c_all, counts = get(p + CHANNELS), get(p + NODE_COUNT)
        first, second = get(p + NODE_FIRST), get(p + NODE_SECOND)
        row = get(p + NODE_ROW)
        for i in range(get(p + STEPS)):
            step = get(p + STEP_TABLE) + 16 * i
            a, b = get(step), get(step + 8)
            count_a, count_b = get(counts + 8 * a), get(counts + 8 * b)
            if count_a == 0:
                replace(first + a * row, first + b * row, c_all)
                replace(second + a * row, second + b * row, c_all)
            elif count_b != 0:
                for c in range(0, c_all, at_once):
                    at_a, at_b = a * row + 8 * c, b * row + 8 * c
                    lanes = min(c_all - c, at_once)
                    merge(first + at_a, second + at_a, first + at_b, second + at_b, count_a, count_b, lanes)
            put(counts + 8 * a, count_a + count_b)
        if get(p + FIRST):
            replace(get(p + FIRST), first, c_all)
            replace(get(p + SECOND), second, c_all)
            if sets_count:
                put(get(p + COUNT), get(counts))

    return kernel


@jit
def vector(p, name, c):  # type: ignore[no-untyped-def]
    """A caller's vector from channel c on: address, stride, code."""
    stride = get(p + name + STRIDE)
    return get(p + name) + c * stride, stride, get(p + name + CODE)


@jit
def sums(p, c):  # type: ignore[no-untyped-def]
    """Roots, or sums, from channel c on."""
    return get(p + FIRST) + 8 * c, get(p + SECOND) + 8 * c


def table_of(element: Element) -> Any:
    """For kernels: the table's entries of some channels, from their mean and invstd."""
    of_channels, acc = channels.coefficients(element.acc), element.acc_size

    @jit
    def tabulate(p, c, lanes):  # type: ignore[no-untyped-def]
        table = get(p + COEFFICIENTS) + c * acc, get(p + COEFFICIENT_ROW)
        mean, invstd = get(p + MEAN) + 8 * c, get(p + INVSTD) + 8 * c
        of_channels(table, mean, invstd, vector(p, GAMMA, c), vector(p, BETA, c), lanes)

    return tabulate


def gradient_table_of(element: Element) -> Any:
    """For kernels: k1 and k2 of some channels, from their sums."""
    of_channels, acc = channels.gradient_coefficients(element.acc), element.acc_size

    @jit
    def tabulate(p, c, lanes):  # type: ignore[no-untyped-def]
        table = get(p + COEFFICIENTS) + c * acc, get(p + COEFFICIENT_ROW)
        of_channels(table, sums(p, c), get(get(p + COUNT)), get(p + INVSTD) + 8 * c, lanes)

    return tabulate


@jit
def finish(p, c, roots, stride, count, lanes):  # type: ignore[no-untyped-def]
    """Statistics of some channels from their roots."""
    at = 8 * c
    to = get(p + MEAN) + at, get(p + M2) + at, get(p + VAR) + at, get(p + INVSTD) + at
    channels.statistics(roots, stride, count, p + EPS, to, lanes)


@jit
def finish_root(p, c, lanes):  # type: ignore[no-untyped-def]
    """`finish`, where the roots are vectors."""
    finish(p, c, sums(p, c), 8, get(get(p + COUNT)), lanes)


@jit
def widen_running(p, c, lanes):  # type: ignore[no-untyped-def]
    """Mean, var and invstd of some channels from running statistics."""
    at = 8 * c
    to = get(p + MEAN) + at, get(p + VAR) + at, get(p + INVSTD) + at
    channels.frozen_statistics(vector(p, OLD_MEAN, c), vector(p, OLD_VAR, c), p + EPS, to, lanes)


def slab_pass(element: Element, kind: str, what: Pass) -> Any:
    """For kernels: the elementwise pass over all samples of a chunk of channels, the last sample first."""
    of_channels = channel_pass(element, what, in_slab=True)
    if kind == "columns":

        @jit
        def one_by_one(p, table, c0, few):  # type: ignore[no-untyped-def]
            for n in range(get(p + SAMPLES) - 1, -1, -1):
                of_channels(p, n, c0, few)

        return one_by_one

    spread, of_group = group_pass(element, what)

    groups = LANES

    @jit
    def together(p, table, c0, few):  # type: ignore[no-untyped-def]
        for c in range(0, few, groups):
            count = min(few - c, groups)
            long = spread(p, table, c0 + c, count)
            for n in range(get(p + SAMPLES) - 1, -1, -1):
                if long:
                    of_group(p, table, n, c0 + c, count)
                else:
                    of_channels(p, n, c0 + c, count)

    return together


def train_slab(element: Element, kind: str, what: Forward) -> Function:
    """Moments, statistics and y, a chunk of channels at a time; y in reverse, so that it starts on what is still in
    cache.
    """
    source = Source(element, Moments, "none")
    collect, tabulate, normalize = gather(source, kind), table_of(element), slab_pass(element, kind, what)
    in_slot, at_once = channels_of_a_slot(kind), LANES
    between = 8 if in_slot == LANES else NODE

    def kernel(p, worker):  # type: ignore[no-untyped-def]
        work = get(p + SCRATCH) + worker * get(p + SCRATCH_SIZE)
        chunk, c_all = get(p + CHUNK), get(p + CHANNELS)
        tiles = (get(p + POSITIONS) + 2047) // 2048
        task = claim(p + TASK)
        while task < get(p + TASKS):
            c0 = task * chunk
            few = min(chunk, c_all - c0)
            width = (few + in_slot - 1) // in_slot
            at = get(p + X) + c0 * get(p + X_CHANNEL), 0, 0
            slots = collect(p, work, at, 0, get(p + SAMPLES), 0, tiles, c0, width)
            count = get(work + get(p + AT_COUNTS) + 2048)
            if task == 0:
                put(get(p + COUNT), count)
            for i in range(0, few, at_once):
                slot, lanes = slots + i // in_slot * NODE, min(few - i, at_once)
                finish(p, c0 + i, (slot, slot + HALF_NODE), between, count, lanes)
                tabulate(p, c0 + i, lanes)
            normalize(p, work + get(p + AT_SPREAD), c0, few)
            task = claim(p + TASK)

    return kernel


def backward_slab(element: Element, kind: str, what: Backward) -> Function:
    """Sums and dx, a chunk of channels at a time. The table holds the coefficients already."""
    source = Source(element, Sums, what.gate)
    collect, apply = gather(source, kind), slab_pass(element, kind, what)
    tabulate, in_slot, at_once = gradient_table_of(element), channels_of_a_slot(kind), LANES

    def kernel(p, worker):  # type: ignore[no-untyped-def]
        work = get(p + SCRATCH) + worker * get(p + SCRATCH_SIZE)
        chunk, c_all = get(p + CHUNK), get(p + CHANNELS)
        tiles = (get(p + POSITIONS) + 2047) // 2048
        task = claim(p + TASK)
        while task < get(p + TASKS):
            c0 = task * chunk
            few = min(chunk, c_all - c0)
            width = (few + in_slot - 1) // in_slot
            at = (
                get(p + X) + c0 * get(p + X_CHANNEL),
                get(p + G) + c0 * get(p + G_CHANNEL),
                get(p + BITS) + c0 * get(p + BITS_CHANNEL),
            )
            slots = collect(p, work, at, 0, get(p + SAMPLES), 0, tiles, c0, width)
            for c in range(0, few, in_slot):
                to, slot = 8 * (c0 + c), slots + c // in_slot * NODE
                store_lanes(get(p + FIRST) + to, slot, min(few - c, in_slot))
                store_lanes(get(p + SECOND) + to, slot + HALF_NODE, min(few - c, in_slot))
            for c in range(0, few, at_once):
                tabulate(p, c0 + c, min(few - c, at_once))
            apply(p, work + get(p + AT_SPREAD), c0, few)
            task = claim(p + TASK)

    return kernel


def elementwise_strided(element: Element, what: Pass) -> Function:
    """y or dx of arrays of any strides. Task: up to 16 channels of one sample."""
    one, groups_of = strided_pass(element, what), LANES

    def kernel(p, worker):  # type: ignore[no-untyped-def]
        groups = (get(p + CHANNELS) + groups_of - 1) // groups_of
        task = claim(p + PASS_TASK)
        while task < get(p + PASS_TASKS):
            one(p, task // groups, task % groups * groups_of)
            task = claim(p + PASS_TASK)

    return kernel


def elementwise_flat(element: Element, what: Pass) -> Function:
    """y or dx from a table of repeated channels. Task: a block of elements, the last ones first."""
    of_elements = flat_pass(element, what)

    def kernel(p, worker):  # type: ignore[no-untyped-def]
        block = get(p + BLOCK)
        total = get(p + SAMPLES) * get(p + POSITIONS) * get(p + CHANNELS)
        task = claim(p + PASS_TASK)
        while task < get(p + PASS_TASKS):
            first = (get(p + PASS_TASKS) - 1 - task) * block
            of_elements(p, first, min(block, total - first))
            task = claim(p + PASS_TASK)

    return kernel


def repeat(element: Element) -> Function:
    """The coefficient table of few channels, repeated."""
    fill = repeat_channels(element)

    def kernel(p, worker):  # type: ignore[no-untyped-def]
        fill(p)

    return kernel


def elementwise(element: Element, kind: str, what: Pass) -> Function:
    """y or dx from the coefficient table. Task: a block of rows, the last ones first."""
    rowwise = kind in ("rows", "columns")
    of_rows = channel_pass(element, what) if rowwise else position_pass(element, what)
    inner = CHANNELS if rowwise else POSITIONS

    def kernel(p, worker):  # type: ignore[no-untyped-def]
        many, block = get(p + inner), get(p + BLOCK)
        rows = get(p + SAMPLES) * many
        task = claim(p + PASS_TASK)
        while task < get(p + PASS_TASKS):
            stop = rows - task * block
            at = max(stop - block, 0)
            while at < stop:
                n, first = at // many, at % many
                count = min(many - first, stop - at)
                of_rows(p, n, first, count)
                at += count
            task = claim(p + PASS_TASK)

    return kernel


def for_all(first: Any, second: Any = None) -> Function:
    """One or two functions of (parameters, first channel, channels) over all channels, 16 at a time."""
    at_once = LANES

    def one(p, worker):  # type: ignore[no-untyped-def]
        for c in range(0, get(p + CHANNELS), at_once):
            first(p, c, min(get(p + CHANNELS) - c, at_once))

    def two(p, worker):  # type: ignore[no-untyped-def]
        for c in range(0, get(p + CHANNELS), at_once):
            first(p, c, min(get(p + CHANNELS) - c, at_once))
            second(p, c, min(get(p + CHANNELS) - c, at_once))

    return two if second else one


def update(code: int) -> Any:
    """Running statistics stored in float32 (code 3) or float64 (4), and both counters."""
    of_channels = channels.update[code]

    @jit
    def update_running(p, c, lanes):  # type: ignore[no-untyped-def]
        at = 8 * c
        of_channels(
            vector(p, OLD_MEAN, c),
            vector(p, OLD_VAR, c),
            vector(p, NEW_MEAN, c),
            vector(p, NEW_VAR, c),
            (get(p + MEAN) + at, get(p + M2) + at),
            get(get(p + COUNT)),
            get(p + DDOF),
            p + MOMENTUM,
            get(p + CUMULATIVE),
            (get(p + TRACKED) + at, get(p + SKIPPED) + at),
            lanes,
        )

    return update_running


@jit
def keep(p, c, lanes):  # type: ignore[no-untyped-def]
    """gamma and beta of some channels, where they are to be kept."""
    if get(p + KEPT_GAMMA):
        channels.keep(vector(p, GAMMA, c), get(p + KEPT_GAMMA) + 8 * c, lanes)
    if get(p + KEPT_BETA):
        channels.keep(vector(p, BETA, c), get(p + KEPT_BETA) + 8 * c, lanes)


@jit
def gradients(p, c, lanes):  # type: ignore[no-untyped-def]
    """dgamma and dbeta of some channels, each in its own dtype."""
    dgamma, dbeta = vector(p, DGAMMA, c), vector(p, DBETA, c)
    channels.parameter_gradients(sums(p, c), get(p + INVSTD) + 8 * c, dgamma, dbeta, lanes)


FOR_ALL = {"statistics": finish_root, "frozen": widen_running, "keep": keep, "parameter_gradients": gradients}
IN_ACC: dict[str, Callable[[Element], Function]] = {
    "finish": lambda element: for_all(finish_root, table_of(element)),
    "repeat": repeat,
    "tabulate": lambda element: for_all(table_of(element)),
    "tabulate_gradient": lambda element: for_all(gradient_table_of(element)),
    "tabulate_frozen": lambda element: for_all(widen_running, table_of(element)),
}


def build(name: str, dtype: str, options: tuple[Any, ...]) -> Function:
    """The kernel called `name`, specialised for a dtype and its options."""
    if name in FOR_ALL:
        return for_all(FOR_ALL[name])
    if name == "update":
        return for_all(update(*options))
    if name == "merge_rows":
        return merge_rows(Moments if options[0] == "moments" else Sums)
    element = Element(dtype)
    if name in IN_ACC:
        return IN_ACC[name](element)
    kind, *rest = options
    if name == "moments":
        return reduce_rows(Source(element, Moments, "none"), kind)
    if name == "sums":
        return reduce_rows(Source(element, Sums, *rest), kind)
    if name == "train_slab":
        return train_slab(element, kind, Forward(*rest))
    if name == "backward_slab":
        return backward_slab(element, kind, Backward(*rest))
    what = Forward(*rest) if name == "normalize" else Backward(*rest)
    if kind == "strided":
        return elementwise_strided(element, what)
    return elementwise_flat(element, what) if kind == "flat" else elementwise(element, kind, what)
