"""Counted cycles as tables: of docs/cpu.md, and of the decision on what other contracts would take."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from machine import RESULTS
from throughput import PROCESSORS
from trees import Row

DOCUMENTS = Path(__file__).parents[1] / "docs"
CPU, CONTRACT = DOCUMENTS / "cpu.md", DOCUMENTS / "decisions" / "0012-what-the-contract-costs.md"

PLAIN = "plain loop"
"""In a row, in place of an array."""

TODAY = "today's"
"""The contract of docs/numerics.md."""

STEPS = {
    "moments": ("moments",),
    "sums": ("sums",),
    "normalize": ("normalize",),
    "input_gradient": ("input_gradient",),
    "train_slab": ("moments", "normalize"),
    "backward_slab": ("sums", "input_gradient"),
}
"""Kernels, and the plain loops that do the same."""

SHOWN = {
    "moments": "statistics",
    "sums": "sums of the backward",
    "normalize": "normalise",
    "input_gradient": "dx",
    "train_slab": "training step",
    "backward_slab": "backward",
}
DETAILED = ("znver4", "sapphirerapids")
"""Processors of which the tables show more than cycles, and for which other contracts are counted."""


def title(kernel: str, layout: str, array: str) -> str:
    return f"{kernel} {layout} {array}"


@contextmanager
def replaced_in(document: Path, table_of: Callable[[Path], str], file: str) -> Iterator[None]:
    """A document with the table of the result file that is written within, in the place of the one before."""
    text = document.read_text()
    old = "".join(table_of(path) for path in RESULTS.glob(file)) or f"(No {Path(file).name} yet.)"
    yield
    (path,) = RESULTS.glob(file)
    document.write_text(text.replace(old, table_of(path)))


def called(r: Row) -> str:
    return title(r["kernel"], r["layout"], r["array"])


def line(r: Row) -> str:
    figures = ", ".join(f"{r[key]:.3f} {key}" for key in ("cycles", "instructions", "uops", "loads", "stores", "stack"))
    return f"{r['processor']:<15} {called(r):<38} {figures}; {r['bottleneck']} {r['bound']:.3f}"


def times_plain(rows: list[Row]) -> Iterator[tuple[Row, float]]:
    """Rows of kernels, with their cycles as a multiple of the plain loops'."""
    plain = {(r["processor"], r["kernel"], r["layout"]): r["cycles"] for r in rows if r["array"] == PLAIN}
    for r in rows:
        if r["array"] != PLAIN:
            layout = "nchw" if r["layout"].startswith("nchw") else "nhwc"
            yield r, r["cycles"] / sum(plain[r["processor"], loop, layout] for loop in STEPS[r["kernel"]])


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines)).replace(
        " --- ", "---"
    )


def tables(path: Path) -> str:
    content = json.loads(path.read_text())
    rows = sorted(content["rows"], key=lambda r: list(STEPS).index(r["kernel"]))
    return of_contracts(rows) if "contract" in rows[0] else cycles_and_more(rows, content["processors"])


def cycles_and_more(rows: list[Row], names: Sequence[str]) -> str:
    """Cycles on every processor, in parentheses as a multiple of the plain loop's; what they are spent on on some."""
    cells: dict[tuple[str, str, str], list[str]] = {}
    for r, times in times_plain(rows):
        kernel = SHOWN[r["kernel"]], r["layout"], r["array"]
        cells.setdefault(kernel, []).append(f"{r['cycles']:.2f} ({times:.1f}×)")
    heads = ("what", "reading", "array")
    first = markdown([*heads, *(PROCESSORS[name].shown for name in names)], [[*key, *of] for key, of in cells.items()])
    figures = ("instructions", "uops", "cycles", "bound", "loads", "stores", "stack")
    lines = [
        [PROCESSORS[r["processor"]].shown, SHOWN[r["kernel"]], r["layout"], r["array"]]
        + [f"{r[figure]:.2f}" for figure in figures]
        + [r["bottleneck"]]
        for name in DETAILED
        for r in rows
        if r["processor"] == name
    ]
    return f"{first}\n\n{markdown(['processor', *heads, *figures, 'busiest'], lines)}"


def of_contracts(rows: list[Row]) -> str:
    """Cycles today, and as a multiple of these under other contracts."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for r in rows:
        found.setdefault((r["kernel"], r["layout"], r["array"], r["processor"]), {})[r["contract"]] = r
    contracts = list(dict.fromkeys(r["contract"] for r in rows))
    lines = []
    for (kernel, layout, _, name), of in found.items():
        now = of[TODAY]["cycles"]
        others = [f"{of[c]['cycles'] / now:.2f}" if c in of else "" for c in contracts[1:]]
        lines.append([PROCESSORS[name].shown, SHOWN[kernel], layout, f"{now:.2f}", *others])
    return markdown(["processor", "what", "reading", *contracts], lines)
