"""The tables of docs/gpu.md and docs/gpu_layers.md: what the planner and the compiler make of ResNet-50, as Markdown.

    python -m tests.cuda.instructions                      all of them
    python -m tests.cuda.instructions --table plans        of first calls, instructions, plans, occupancy, predicted
    python -m tests.cuda.instructions --dtype float32 --layout nhwc --device T4
    python -m tests.cuda.instructions --write              into the pages

Instructions are counted where they are executed: `machine` runs the machine code for compute capability 9.0 of the
first blocks (a cluster, where there are clusters) with the parameters that the planner makes for the layer. An
instruction of a warp counts as 32, however many of its lanes are there; the sum over the blocks is divided by the
elements that these read. So partial tiles, torn octets, merges and idle lanes are in it. Where blocks take tickets, a
few do the first group of channels, all there is to do. Error: a device may take more turns where lanes of a warp part;
other blocks may have fewer elements.

Needs nvidia-cuda-nvrtc and, but for plans, nvidia-cuda-nvdisasm.
"""

import argparse
import functools
import itertools
import json
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cubn import _ahead as ahead
from cubn._types import ITEMSIZE
from cubn.backends.cuda import planned
from cubn.backends.cuda.backend import CudaBackend
from cubn.backends.cuda.plan import Launch
from cubn.backends.cuda.source import translation_unit
from cubn.cli.warm_up_network import kinds
from tests.cuda import nvrtc
from tests.cuda.machine.listing import Code, disassembled, parsed
from tests.cuda.machine.machine import Counts, Machine
from tests.cuda.machine.memory import Memory
from tests.cuda.resnet50 import (
    BATCHES,
    DEVICES,
    FLOOR,
    LAYERS,
    LAYOUTS,
    OPERATIONS,
    PASSES,
    Device,
    Launched,
    Layer,
    apart,
    contents,
    is_resident,
    launches,
    moved,
    of_one_group,
    on_chip,
    over_elements,
    takes_tickets,
)

BEFORE = Path(__file__).with_name("before.json")  # what this printed for the kernels of commit b2c6def
DOCS = Path(__file__).parents[2] / "docs"
ARCHITECTURE = 90  # of the code that is executed
ROWS = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))
DTYPES = ("bfloat16", "float32")
COPY = 0.9  # of a data sheet's bandwidth that a copy reaches
ISSUED = 128  # lanes of instructions that a multiprocessor begins in a cycle
REGISTERS = 65536  # of a multiprocessor
TOGETHER = 16  # blocks that take tickets
SMALL = 0.1  # of a kernel's instructions, below which a phase is not one of its main ones


# --- instructions -----------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Instructions of a lane for an element."""

    reduce: float  # to the end of the phase with most of them, but for the last
    rest: float  # merges, coefficients
    apply: float
    double: float  # of all

    @property
    def all(self) -> float:
        return self.reduce + self.rest + self.apply


@functools.lru_cache(64)
def code_of(source: str, kernel: str, options: tuple[str, ...]) -> Code:
    return parsed(disassembled(nvrtc.cubin(translation_unit(source), options, ARCHITECTURE)), kernel)


def executed(layer: Layer, launched: Launched) -> Cost:
    """Of the first blocks."""
    launch = launched.launch
    parameters, bases = apart(launched.parameters)
    memory = Memory(contents(layer, bases), bases["x.pointer"], bases.get("y.pointer", 0))
    code = code_of(launch.source, launch.kernel, launch.options)
    if takes_tickets(launch):
        parameters, blocks = of_one_group(parameters), TOGETHER
    else:
        blocks = launch.cluster
    try:
        counts = Machine(code, launch, parameters, memory, 0, blocks).run()
    except Exception as error:
        error.add_note(f"{launch.kernel} for {layer}")
        raise
    parts = by_touch(counts) if takes_tickets(launch) else by_order(counts, applies(launch))
    of_element = 32 * ITEMSIZE[layer.dtype] / memory.bytes_read()
    return Cost(*(of_element * part for part in (*parts, counts.double.sum())))


def by_order(counts: Counts, applies: bool) -> tuple[int, int, int]:
    """Of reducing, of what is between, of applying: where each phase is the same of all blocks."""
    phases = counts.all.sum(axis=(0, 1))
    main = np.flatnonzero(phases >= SMALL * phases.sum())
    last = main[-1] if applies and main[-1] else len(phases)
    most = int(np.argmax(phases[:last])) + 1
    return phases[:most].sum(), phases[most:last].sum(), phases[last:].sum()


def by_touch(counts: Counts) -> tuple[int, int, int]:
    """The same, where blocks take turns: phases that only read elements, that touch none, that write some."""
    phases = counts.all.sum(axis=1)
    reduces, applies = counts.reads & ~counts.writes, counts.writes
    return phases[reduces].sum(), phases[~reduces & ~applies].sum(), phases[applies].sum()


def applies(launch: Launch) -> bool:
    """Whether a kernel reduces first and writes elements then."""
    return any(option.startswith("-DOPERATION=") for option in launch.options)


class Planned(NamedTuple):
    """A layer as it is planned for the first device, or in several passes."""

    layer: Layer
    in_passes: bool

    @property
    def launched(self) -> list[Launched]:
        """What goes over all elements."""
        limits = PASSES if self.in_passes else next(iter(DEVICES.values())).limits
        return over_elements(launches(self.layer, limits))


_found: dict[Planned, tuple[Cost, ...]] = {}


def costs(planned: Planned) -> tuple[Cost, ...]:
    """Of each launch over all elements."""
    if planned not in _found:
        _found[planned] = tuple(executed(planned.layer, each) for each in planned.launched)
    return _found[planned]


def find(wanted: Iterable[Planned]) -> None:
    """The costs of many, on all cores."""
    missing = sorted(set(wanted) - set(_found))
    with ProcessPoolExecutor() as pool:
        _found.update(zip(missing, pool.map(costs, missing), strict=True))


def instructions(arguments) -> list[str]:
    """For each layout and dtype, before and after."""
    layers = {
        (layout, dtype): [
            Layer(BATCHES[0], C, side, layout, dtype, operation) for C, side in ROWS for operation in OPERATIONS
        ]
        for layout in arguments.layout
        for dtype in arguments.dtype
    }
    find(itertools.chain(*(of_both(layer) for layer in itertools.chain(*layers.values()))))
    before = json.loads(BEFORE.read_text(encoding="utf-8"))
    lines = []
    for (layout, dtype), some in layers.items():
        lines += [
            "",
            f"{layout}, {dtype}, batch {BATCHES[0]}, by the compiler of CUDA {nvrtc.version(13)}:",
            "",
            "| rows | operation | one kernel: reduce | merges | apply | all | float64 | passes: reduce | apply |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for layer in some:
            then = before[f"{layout}, {dtype}, {layer.side}, {layer.operation}"]
            one, passes = of_both(layer)
            tickets = "" if one.in_passes or not takes_tickets(one.launched[0].launch) else ", tickets"
            now = [*(figures(None) if one.in_passes else figures(*costs(one))), *(cost.all for cost in costs(passes))]
            cells = " | ".join(map(change, then, now))
            lines.append(f"| {layer.side}² | {layer.operation}{tickets} | {cells} |")
    return lines[1:]


def of_both(layer: Layer) -> tuple[Planned, Planned]:
    """In one kernel, if that is how it is planned, and in passes."""
    in_passes = Planned(layer, True)
    found = Planned(layer, False)
    return (found if len(found.launched) == 1 else in_passes), in_passes


def figures(cost: Cost | None) -> tuple[float | None, ...]:
    return (cost.reduce, cost.rest, cost.apply, cost.all, cost.double) if cost else (None,) * 5


def change(before: float | None, after: float | None) -> str:
    """A figure, or both where they differ."""
    then, now = ("–" if value is None else f"{value:.1f}" for value in (before, after))
    return now if then == now else f"{then} → {now}"


# --- plans ------------------------------------------------------------------------------------------------------------


def path(layer: Layer, device: Device) -> str:
    """On chip or in passes; blocks and threads of each launch over all elements; bytes moved."""
    found = launches(layer, device.limits)
    grids = ", ".join(f"{each.launch.grid} × {each.launch.threads}" for each in over_elements(found))
    shared = max(each.launch.shared_bytes for each in over_elements(found)) / 1024
    first = over_elements(found)[0].launch
    alone = f"chip/{first.cluster}" if on_chip(found) else first.kernel
    how = alone if is_resident(found) else "passes"
    return f"{how}: {grids}; {shared:.0f} KiB; {moved(layer, found)} S"


def layers_table(arguments, cell) -> list[str]:
    """A table for each layout and operation: a row for each layer, a column for each device."""
    lines = []
    for layout in arguments.layout:
        for operation in OPERATIONS:
            lines += [
                "",
                f"{operation}, {layout}, {arguments.dtype[0]}; at least {FLOOR[operation]} S move:",
                "",
                f"| layer | {' | '.join(arguments.device)} |",
                f"|---|{'---|' * len(arguments.device)}",
            ]
            for C, side in LAYERS:
                for N in BATCHES:
                    layer = Layer(N, C, side, layout, arguments.dtype[0], operation)
                    cells = " | ".join(cell(layer, DEVICES[name]) for name in arguments.device)
                    lines.append(f"| {C} @ {side}² × {N} | {cells} |")
    return lines[1:]


def plans(arguments) -> list[str]:
    return layers_table(arguments, path)


# --- first calls ---


def first_calls(arguments) -> list[str]:
    """Kernels that a ResNet-50's training compiles, without and with residuals and ReLUs fused."""
    columns = list(itertools.product(BATCHES, LAYOUTS))
    lines = [
        f"| device | {' | '.join(f'batch {N}, {layout}' for N, layout in columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for name, capability in (("A100", (8, 0)), ("H100", (9, 0)), ("RTX 5090", (12, 0))):
        cells = [
            ", ".join(str(kernels(capability, N, layout, fuse)) for fuse in (False, True)) for N, layout in columns
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def kernels(capability: tuple[int, int], N: int, layout: str, fuse: bool) -> int:
    """How many `python -m cubn warm-up resnet50` compiles, but for those of inference alone."""

    def prepare(backend: CudaBackend) -> None:
        for shape, dtype, channels_last, *fused in kinds("resnet50", N, 224, ["bfloat16"], layout == "nhwc", fuse):
            ahead.prepare(backend, [ahead.layer(shape, 1, channels_last, dtype)], ahead.Calls(*fused, inference=False))

    launched = planned.launches_of(planned.USUAL[capability], prepare)
    return len({(launch.source, launch.kernel, launch.options) for launch in launched})


# --- what a multiprocessor has room for -------------------------------------------------------------------------------


@functools.cache
def compiled(source: str, kernel: str, options: tuple[str, ...], architecture: int) -> nvrtc.Kernel:
    return nvrtc.compile(translation_unit(source), options, architecture)[kernel]


def blocks_at_once(launch: Launch, device: Device) -> int:
    """Of a multiprocessor."""
    kernel = compiled(launch.source, launch.kernel, launch.options, device.architecture)
    registers = -(-kernel.registers // 8) * 8 * launch.threads
    shared = launch.shared_bytes + kernel.shared_bytes + device.reserved_bytes
    of_threads = device.threads // launch.threads
    return min(REGISTERS // registers, of_threads, device.blocks, device.shared_bytes // max(shared, 1))


def room(layer: Layer, device: Device) -> str:
    """Blocks of a multiprocessor, and waves, of each launch over all elements."""
    found = []
    for each in over_elements(launches(layer, device.limits)):
        blocks = blocks_at_once(each.launch, device)
        waves = each.launch.grid / (blocks * device.limits.multiprocessors)
        found.append(f"{blocks} ({waves:.1f})")
    return ", ".join(found)


def occupancy(arguments) -> list[str]:
    return layers_table(arguments, room)


# --- predicted --------------------------------------------------------------------------------------------------------


def share(layer: Layer, device: Device) -> str:
    """Of a copy's speed on the bytes that must move, and what limits it."""
    found = launches(layer, device.limits)
    N, C, S = layer.extents
    elements, item = N * C * S, ITEMSIZE[layer.dtype]
    cycles = device.limits.multiprocessors * device.gigahertz * 1e9
    of_copy = COPY * device.terabytes * 1e12
    taken, limits = 0.0, []
    of_each = costs(alike(layer, device))
    reads = [FLOOR[layer.operation] - each.launch.kernel.startswith("reduce") for each in over_elements(found)]
    if len(of_each) != len(reads):  # one kernel does what several do there
        of_each = (Cost(*map(sum, zip(*of_each, strict=True))),)
    for cost, arrays in zip(of_each, reads, strict=True):
        times = {
            "memory": arrays * elements * item / of_copy,
            "instructions": cost.all * elements / (cycles * ISSUED),
            "float64": cost.double * elements / (cycles * device.doubles),
        }
        limits.append(max(times, key=times.__getitem__))
        taken += max(times.values())
    least = FLOOR[layer.operation] * elements * item / of_copy
    return f"{100 * least / taken:.0f} % {'/'.join(dict.fromkeys(limits))}"


def alike(layer: Layer, device: Device) -> Planned:
    """Whose instructions for an element are about as many: of the smaller batch, on chip or in passes."""
    return Planned(layer._replace(N=BATCHES[0]), not on_chip(launches(layer, device.limits)))


def predicted(arguments) -> list[str]:
    find(
        alike(Layer(N, C, side, layout, arguments.dtype[0], operation), DEVICES[device])
        for layout in arguments.layout
        for operation in OPERATIONS
        for C, side in LAYERS
        for N in BATCHES
        for device in arguments.device
    )
    return layers_table(arguments, share)


# --- the page ---------------------------------------------------------------------------------------------------------

TABLES = {
    "first calls": first_calls,
    "instructions": instructions,
    "plans": plans,
    "occupancy": occupancy,
    "predicted": predicted,
}


def marks(table: str) -> tuple[str, str]:
    """What a table is between, in the page."""
    return f"<!-- table: {table} -->\n", "<!-- end of table -->\n"


def page(table: str) -> Path:
    return DOCS / ("gpu.md" if table in ("first calls", "instructions") else "gpu_layers.md")


def of_page(table: str) -> str:
    begin, end = marks(table)
    _, _, rest = page(table).read_text(encoding="utf-8").partition(begin)
    return rest.partition(end)[0].strip("\n")


def put_into_page(table: str, text: str) -> None:
    begin, end = marks(table)
    before, _, rest = page(table).read_text(encoding="utf-8").partition(begin)
    assert rest, f"{page(table).name} has no place for {table}"
    after = rest.partition(end)[2]
    page(table).write_text(f"{before}{begin}\n{text}\n\n{end}{after}", encoding="utf-8")


def parsed_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--table", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", nargs="+", choices=DEVICES, default=["H200", "A100", "RTX 4090", "T4"])
    parser.add_argument("--write", action="store_true", help="into the pages")
    return parser.parse_args(given)


def main() -> None:
    arguments = parsed_arguments()
    for table in arguments.table:
        text = "\n".join(TABLES[table](arguments))
        if arguments.write:
            put_into_page(table, text)
        else:
            print(f"\n{table}\n\n{text}", flush=True)


if __name__ == "__main__":
    main()
