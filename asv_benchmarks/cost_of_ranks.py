"""What an exchange of `comm=` costs on many ranks, computed from what synchronised.py measured on two.

    python asv_benchmarks/cost_of_ranks.py --table FILE                               the table from a result file
    python asv_benchmarks/cost_of_ranks.py --table FILE --latency 2 --bandwidth 12    messages of a network instead

With s(n) the time of a Sendrecv of n bytes, m = 16 C + 8 the bytes of a node, P ranks and a node each:

    header    an allgather of 64 bytes
    gather    an allgather of m bytes, and the merges of P nodes on every rank: what cubn does
    tree      log2 P times: s(m) and the merge of two nodes (all ranks in pairs that double: each has the root then)
    allgather the less of log2 P messages that double, s(m) + s(2 m) + s(4 m) + ..., and P - 1 in a ring, (P - 1) s(m)

s and the time of a merge are interpolated between what was measured, and go on beyond it in a straight line.
"""

import argparse
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

RANKS = [2**i for i in range(3, 11)]
HEADER_BYTES = 64

Curve = Callable[[float], float]


def interpolated(points: list[tuple[float, float]]) -> Curve:
    """Through the points in straight lines, and on beyond the last."""
    pieces = list(pairwise(sorted(points)))

    def curve(x: float) -> float:
        (x0, y0), (x1, y1) = next((piece for piece in pieces if x <= piece[1][0]), pieces[-1])
        return y0 + (y1 - y0) * (max(x, pieces[0][0][0]) - x0) / (x1 - x0)

    return curve


def network(microseconds: float, gigabytes_a_second: float) -> Curve:
    return lambda nbytes: microseconds + nbytes / (1e3 * gigabytes_a_second)


def allgather(sendrecv: Curve, nbytes: int, ranks: int) -> float:
    doubling = sum(sendrecv(nbytes << step) for step in range(ranks.bit_length() - 1))
    return min(doubling, (ranks - 1) * sendrecv(nbytes))


def costs(sendrecv: Curve, merges: Curve, channels: int, ranks: int) -> tuple[float, float]:
    """Microseconds of a gather and of a tree."""
    node = 16 * channels + 8
    steps = ranks.bit_length() - 1
    return allgather(sendrecv, node, ranks) + merges(ranks), steps * (sendrecv(node) + merges(2))


def table(rows: list[dict[str, object]], sendrecv: Curve | None = None) -> str:
    sent = [(row["bytes"], row["us"]) for row in rows if row["what"] == "sendrecv" and row["ranks"] == 2]
    sendrecv = sendrecv or interpolated(sent)
    merged: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        if row["what"] == "merges":
            merged.setdefault(row["channels"], []).append((row["nodes"], row["us"]))
    curves = {channels: interpolated(points) for channels, points in merged.items()}
    names = [f"C = {channels}: {how}" for channels in curves for how in ("gather", "tree")]
    lines = [f"| ranks | header | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for ranks in RANKS:
        cells = [f"{allgather(sendrecv, HEADER_BYTES, ranks):.0f}"]
        for channels, merges in curves.items():
            gather, tree = costs(sendrecv, merges, channels, ranks)
            cells += [f"{gather:.0f}", f"**{tree:.0f}**" if tree < gather else f"{tree:.0f}"]
        lines.append(f"| {ranks} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, metavar="FILE", required=True)
    parser.add_argument("--latency", type=float, metavar="US", help="of a message, in microseconds")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="in each direction")
    options = parser.parse_args()
    given = options.latency is not None and options.bandwidth is not None
    messages = network(options.latency, options.bandwidth) if given else None
    print(table(json.loads(options.table.read_text())["rows"], messages))


if __name__ == "__main__":
    main()
