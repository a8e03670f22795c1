"""Batch norm's share of a training step in real networks: by torch, by cubn, and by cubn with addition and ReLU in it.

    python asv_benchmarks/networks.py                     measure all, write results/<machine>/networks.json
    python asv_benchmarks/networks.py --network resnet20  one network, in all its layouts; prints, writes nothing
    python asv_benchmarks/networks.py --layout nhwc       one layout of those that have it; prints, writes nothing
    python asv_benchmarks/networks.py --compile           torch.compile of torch's network beside the others
    python asv_benchmarks/networks.py --threading own     with CUBN_THREADING=own
    python asv_benchmarks/networks.py --table FILE        the table from a result file

Each network and layout is a process of its own; that of the network in NumPy has no torch. A step is forward, loss and
backward. "share" is the step minus that of the same network without batch norm; "with ReLU" minus that of the network
without batch norm, additions and ReLUs. Contestants run in alternating blocks. A figure is the median over the blocks
of each one's median step, in brackets its 95 % interval; a "<=" holds unless the interval's lower end is above the
limit. "in calls" is the time inside a contestant's own calls, forward + backward, all layers of a step together; in
those "+ ReLU" are the additions, too.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.shares import (
    Blocks,
    Estimate,
    Step,
    TimedStep,
    alternate_blocks,
    difference,
    estimate,
    seconds_in_calls,
    share_ratio,
    step_time,
)
from machine import write
from processes import add_options, measured, threads
from trees import Row, print_rows

import cubn

LAYOUTS = {
    "resnet20": ("nchw", "nhwc"),
    "resnet50": ("nchw", "nhwc"),
    "tower": ("nchw", "nhwc"),
    "mlp": ("2-d",),
    "pointnet": ("nchw",),
    "numpy": ("2-d",),
}
LIMITS = {"share_ratio": 1.0, "share_ratio_with_relu": 0.7, "cubn_minus_reference_ms": 0.0}
DIGITS = 4


def contestants(
    network: str, layout: str, compiled: bool
) -> tuple[Callable[[], dict[str, Step]], Callable[[], dict[str, TimedStep]]]:
    """What makes the steps of a network, first those of whom cubn is compared with, and what makes the timed ones."""
    if network == "numpy":
        from benchmarks import numpy_loop

        return numpy_loop.steps, numpy_loop.timed_steps
    import torch
    from benchmarks import models

    torch.set_num_threads(cubn.get_num_threads())
    return partial(models.steps, network, layout, compiled), partial(models.timed_steps, network, layout)


def measure(network: str, layout: str, blocks: int, compiled: bool) -> Row:
    steps, timed_steps = contestants(network, layout, compiled)
    seconds = alternate_blocks(steps(), blocks)
    in_calls = seconds_in_calls(timed_steps(), max(3, blocks // 5))
    return {
        "network": network,
        "layout": layout,
        **estimates(seconds, next(iter(seconds))),
        "in_calls_ms": {name: [rounded(1e3 * part) for part in parts] for name, parts in in_calls.items()},
        "cubn_threads": threads(),
    }


def estimates(seconds: Blocks, reference: str) -> Row:
    """What a row says of the steps: [value, low, high] of each figure."""

    def shares(*names: str, without: str) -> Row:
        return {name: milliseconds(estimate(seconds, difference(name, without))) for name in names}

    others = {
        f"{name}_minus_{other}_ms": milliseconds(estimate(seconds, difference(name, seconds_of)))
        for other, seconds_of in (("reference", reference), ("compiled", "compiled"))
        for name in ("cubn", "fused")
        if seconds_of in seconds
    }
    return {
        "reference": reference,
        "step_ms": {name: milliseconds(estimate(seconds, step_time(name))) for name in seconds},
        "share_ms": shares(reference, "cubn", without="none"),
        "share_with_relu_ms": shares(reference, "cubn", "fused", without="bare"),
        "share_ratio": plain(estimate(seconds, share_ratio("cubn", reference, "none"))),
        "share_ratio_with_relu": plain(estimate(seconds, share_ratio("fused", reference, "bare"))),
        **others,
    }


def plain(figure: Estimate) -> list[float | None]:
    return [rounded(x) for x in figure]


def milliseconds(figure: Estimate) -> list[float | None]:
    return [rounded(1e3 * x) for x in figure]


def rounded(x: float) -> float | None:
    """None for what JSON has no number for."""
    return round(x, DIGITS) if abs(x) != float("inf") else None


def holds(figure: list[float | None], limit: float) -> bool:
    """Whether an "at most" is not refuted: the lower end of the interval decides."""
    return figure[1] is not None and figure[1] <= limit


def bracketed(figure: list[float | None], digits: int) -> str:
    value, low, high = ("lost in noise" if x is None else f"{x:.{digits}f}" for x in figure)
    return f"{value} [{low}, {high}]"


def text(row: Row) -> str:
    """A row for people."""
    reference, steps = row["reference"], row["step_ms"]
    lines = [f"{row['network']} {row['layout']}: cubn's threads: {row['cubn_threads']}"]
    lines.append("  step, ms:        " + ", ".join(f"{name} {bracketed(ms, 1)}" for name, ms in steps.items()))
    for title, key in (("share, ms:", "share_ms"), ("with ReLU, ms:", "share_with_relu_ms")):
        lines.append(f"  {title:<17}" + ", ".join(f"{name} {bracketed(ms, 1)}" for name, ms in row[key].items()))
    in_calls = (f"{name} {forward:.2f} + {backward:.2f}" for name, (forward, backward) in row["in_calls_ms"].items())
    lines.append("  in calls, ms:    " + ", ".join(in_calls))
    names = {
        "share_ratio": f"share, cubn / {reference}",
        "share_ratio_with_relu": f"with ReLU, fused / {reference}",
        "cubn_minus_reference_ms": f"step, cubn - {reference}, ms",
        "fused_minus_reference_ms": f"step, fused - {reference}, ms",
        "cubn_minus_compiled_ms": "step, cubn - torch.compile, ms",
        "fused_minus_compiled_ms": "step, fused - torch.compile, ms",
    }
    for key, name in names.items():
        if key in row:
            limit = LIMITS.get(key)
            verdict = (
                "" if limit is None else f"   <= {limit:g}: {'holds' if holds(row[key], limit) else 'DOES NOT HOLD'}"
            )
            lines.append(f"  {name:<32} {bracketed(row[key], 2)}{verdict}")
    return "\n".join(lines)


def table(rows: list[Row]) -> str:
    """Markdown."""
    columns = (
        "step: reference, cubn, fused, ms",
        "share, cubn / reference",
        "with ReLU, fused / reference",
        "step, cubn − reference, ms",
        "in calls: reference, cubn, ms",
        "with ReLU",
    )
    lines = [f"| network | layout | reference | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|"]
    for row in rows:
        reference = row["reference"]
        calls = {name: f"{sum(parts):.1f}" for name, parts in row["in_calls_ms"].items()}
        cells = (
            ", ".join(f"{row['step_ms'][name][0]:.1f}" for name in (reference, "cubn", "fused")),
            bracketed(row["share_ratio"], 2),
            bracketed(row["share_ratio_with_relu"], 2),
            bracketed(row["cubn_minus_reference_ms"], 1),
            f"{calls[reference]}, {calls['cubn']}",
            f"{calls[f'{reference} + ReLU']}, {calls['cubn + ReLU']}",
        )
        lines.append(f"| {row['network']} | {row['layout']} | {reference} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=LAYOUTS)
    parser.add_argument("--layout", choices=sorted({layout for some in LAYOUTS.values() for layout in some}))
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--threads", type=int, default=cubn.get_num_threads(), help="of cubn, torch and NumPy's BLAS")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--table", type=Path, metavar="FILE")
    add_options(parser)
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())["rows"]))
        return
    if options.here:
        print_rows([measure(options.network, options.layout, options.blocks, options.compile)])
        return
    of_all = [f"--blocks={options.blocks}", *(["--compile"] if options.compile else [])]
    number = str(options.threads)
    limits = {"CUBN_NUM_THREADS": number, "OPENBLAS_NUM_THREADS": number}
    rows = []
    for network, layouts in LAYOUTS.items():
        for layout in layouts:
            if options.network in (None, network) and options.layout in (None, layout):
                arguments = [f"--network={network}", f"--layout={layout}", *of_all]
                rows.append(measured(__file__, arguments, options.threading, **limits))
                if not options.json:
                    print(text(rows[-1]), flush=True)
    if options.json:
        print_rows(rows)
    elif not (options.network or options.layout):
        header = {"threads": options.threads, "threading": options.threading, "blocks": options.blocks}
        print("written:", write("networks.json", header, rows))


if __name__ == "__main__":
    main()
