"""Measure cycles an element on this machine, of copies and of the kernels that cycles.py counts, on one thread.

    python asv_benchmarks/cycles_here.py                  print; write results/<machine>/cycles_here.json, docs/cpu.md
    python asv_benchmarks/cycles_here.py --table FILE     the table of docs/cpu.md, from a result file

The clock is a chain of multiplications and additions, which take 3 cycles and 1 on every x86-64 processor of
cycles.py. Kernels: the difference between arrays of 16 and of 4 times as many samples as are counted, so that what a
call costs does not count. Each time is the least of many.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from cycle_tables import CPU, markdown, replaced_in
from machine import write
from trees import Row

COPIES = {"64 KiB": 1 << 16, "1 MiB": 1 << 20, "8 MiB": 8 << 20, "128 MiB": 128 << 20}
"""Bytes of the arrays that are copied."""
STEPS, STEP_CYCLES = 1 << 18, 4
REPEATS = 100


def least(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Seconds, of the quickest call."""
    found = []
    call()
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return min(found)


def hertz() -> float:
    """Cycles a second, now."""
    from cubn.backends.cpu.compile import compiled
    from cubn.backends.cpu.simd import get, put

    def chain(p, worker):  # type: ignore[no-untyped-def]
        found, factor, n = get(p), get(p + 8), get(p + 16)
        while n:
            found = found * factor + n
            n -= 1
        put(p, found)

    block = np.array([1, 3, STEPS])
    kernel = compiled("clock", lambda: chain)
    return STEPS * STEP_CYCLES / least(lambda: kernel.call(block.ctypes.data, 0))


def measured() -> Iterator[Row]:
    from counted import ARRAYS, operations

    import cubn

    cubn.set_num_threads(1)
    for name, size in COPIES.items():
        x = np.ones(size // 4, np.float32)
        copy = functools.partial(np.copyto, x.copy(), x)
        repeats = max(10, REPEATS * (8 << 20) // size)
        cycles = least(copy, repeats) * hertz() / x.size
        yield {"what": "copy", "layout": "", "array": name, "cycles": cycles}
    for array in ARRAYS:
        if array.slab:  # what the planner takes is measured: slabs, but for nhwc
            continue
        N, *rest = array.shape
        small, large = (array._replace(shape=(times * N, *rest)) for times in (4, 16))
        more = 12 * int(np.prod(array.shape))
        pairs = zip(operations(small, "float32"), operations(large, "float32"), strict=True)
        for what, (few, many) in zip(("forward", "forward_train", "backward"), pairs, strict=True):
            taken = (least(many) - least(few)) * hertz() / more
            yield {"what": what, "layout": array.layout, "array": array.name, "cycles": taken}


def table(path: Path) -> str:
    rows = json.loads(path.read_text())["rows"]
    return markdown(
        ("what", "reading", "array", "cycles"), [[*list(r.values())[:3], f"{r['cycles']:.2f}"] for r in rows]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.table:
        print(table(options.table))
        return
    rows = []
    for row in measured():
        rows.append(row | {"cycles": round(row["cycles"], 4)})
        print(*rows[-1].values(), flush=True)
    header: dict[str, object] = {"threads": 1, "dtype": "float32", "GHz": round(hertz() / 1e9, 2)}
    with replaced_in(CPU, table, "*/cycles_here.json"):
        print("written:", write("cycles_here.json", header, rows))


if __name__ == "__main__":
    main()
