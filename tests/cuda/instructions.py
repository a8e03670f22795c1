"""Instructions that a GPU issues for each bfloat16 element, counted in the machine code of the kernels' hot loops.

python -m tests.cuda.instructions [ARCHITECTURE]       90 unless told; needs nvidia-cuda-nvrtc and nvidia-cuda-nvdisasm

Counted is the way through a loop with most accesses of a kind and, of these, fewest instructions: whole tiles and
octets. An element that is not there, in a warp's last lanes, costs as much as one that is.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from cubn.backends.cuda.plan import option
from cubn.backends.cuda.source import translation_unit
from tests.cuda import nvrtc

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")

WIDE = r"(LD[GS]|LDGSTS|ST[GS])\S*\.128"
READ = r"LDS\S*\.128"  # from shared memory
READ_ONE = r"LDS\.U16"
WRITE = r"STG\S*\.128"
CHANNELS = r"LDS\S*\.64"  # a lane's, from shared memory

NORMALIZE = {"OPERATION": "NORMALIZE", "RESIDUAL": 0, "RELU": 1, "KEEP_BITS": 0}
GRADIENT = {"OPERATION": "GRADIENT", "RESIDUAL": 0, "GATE": "GATE_NONE", "FROZEN": 0}
DENSE = {"CROSSING": 0, "INDEX": "unsigned"}
ODD = {"CROSSING": 2, "INDEX": "unsigned"}
LARGE = {"THREADS": 256, "CLUSTER": 1, "GROUPED": 0, "TILE_LANES": 32, "TILE_ROWS": 0, "TALL": 1, "ALIGNED": 1}
SMALL = {"THREADS": 256, "CLUSTER": 1, "GROUPED": 1, "TILE_LANES": 1, "TILE_ROWS": 1, "TALL": 0, "ALIGNED": 0}
SLICE = {"THREADS": 256, "CLUSTER": 1, "SLICE": 64, "TILE_ROWS": 1, "DEPTH": 4, "TILE_DEPTH": 8}

OCTET, TILE = 8, 64
"""Elements of a lane on one way through a loop."""
ROW = 49
"""Of a thread that has a row: all are read one by one, and its loop over octets goes round six times."""
LEAST = 40
"""Instructions, below which a loop does something else."""


class Loop(NamedTuple):
    """Those with so many accesses of a kind, and how often each goes round, for how many elements."""

    what: str
    kernel: str
    options: dict[str, object]
    access: str
    rounds: dict[int, int]
    elements: int


LOOPS = (
    Loop("normalise + ReLU, nchw", "apply_rows", NORMALIZE | DENSE, WIDE, {3: 1}, OCTET),
    Loop("normalise + ReLU, nchw, odd rows", "apply_rows", NORMALIZE | ODD, WIDE, {4: 1}, OCTET),
    Loop("input gradient, nchw", "apply_rows", GRADIENT | DENSE, WIDE, {4: 1}, OCTET),
    Loop("normalise + ReLU, nhwc", "apply_channels", NORMALIZE, WIDE, {2: 1}, OCTET),
    Loop("input gradient, nhwc", "apply_channels", GRADIENT, WIDE, {3: 1}, OCTET),
    Loop("training step on chip, reduce", "slab", LARGE | NORMALIZE, READ, {8: 1}, TILE),
    Loop("training step on chip, normalise", "slab", LARGE | NORMALIZE, WRITE, {1: 1}, OCTET),
    Loop("gradient on chip, add up", "slab", LARGE | GRADIENT, READ, {8: 1}, TILE // 2),  # four rows; then the merges
    Loop("gradient on chip, apply", "slab", LARGE | GRADIENT, WRITE, {1: 1}, OCTET),
    Loop("training step on chip, 7 x 7, reduce", "slab", SMALL | NORMALIZE, READ_ONE, {16: 1, 8: 5}, ROW),
    Loop("training step on chip, 7 x 7, normalise", "slab", SMALL | NORMALIZE, WRITE, {1: 1}, OCTET),
    Loop("gradient on chip, 7 x 7, add up", "slab", SMALL | GRADIENT, READ_ONE, {30: 1, 16: 5}, ROW),
    Loop("gradient on chip, 7 x 7, apply", "slab", SMALL | GRADIENT, WRITE, {1: 1}, OCTET),
    Loop("training step on chip, nhwc, reduce", "slab_channels", SLICE | NORMALIZE, CHANNELS, {8: 1}, 4 * OCTET),
    Loop("training step on chip, nhwc, normalise", "slab_channels", SLICE | NORMALIZE, WRITE, {1: 1}, OCTET),
    Loop("gradient on chip, nhwc, add up", "slab_channels", SLICE | GRADIENT, CHANNELS, {16: 1}, 4 * OCTET),
    Loop("gradient on chip, nhwc, apply", "slab_channels", SLICE | GRADIENT, WRITE, {1: 1}, OCTET),
)


class Code:
    """Instructions, which can follow which, and which are accesses of a kind."""

    def __init__(self, text: str, access: str) -> None:
        labels: dict[str, int] = {}
        lines: list[tuple[bool, str, str]] = []  # predicated, instruction, operands
        for line in text.splitlines():
            if label := _LABEL.match(line):
                labels[label[1]] = len(lines)
            elif found := _INSTRUCTION.match(line):
                lines.append((bool(found[1]), found[2], found[3]))
        self.is_access = [bool(re.match(access, instruction)) for _, instruction, _ in lines]
        self.next = [list(self._next(lines, labels, i)) for i in range(len(lines))]

    @staticmethod
    def _next(lines, labels, i):
        predicated, instruction, operands = lines[i]
        name = instruction.partition(".")[0]
        target = re.search(r"\.L_x_\d+", operands)
        if name == "BRA" and target:
            yield labels[target[0]]
            predicated = predicated or bool(re.match(r"\s*!?U?P\d", operands))
        if name not in ("BRA", "EXIT", "RET") or predicated:
            yield i + 1

    def loops(self):
        """(accesses, instructions) of the hottest way through each loop."""
        order, back = self._depth_first()
        for last, first in back:
            best: dict[int, tuple[int, int]] = {}
            for i in order:  # what follows comes before
                ahead = [best[j] for j in self.next[i] if (i, j) not in back and j in best]
                if i == last or ahead:
                    most, fewest = (0, 0) if i == last else max(ahead)
                    best[i] = (most + self.is_access[i], fewest - 1)
            if first in best:
                yield best[first][0], -best[first][1]

    def _depth_first(self):
        """Instructions in the order in which they are left, and the steps that lead back into a loop."""
        order, back, state = [], set(), [""] * len(self.next)
        path = [(0, iter(self.next[0]))]
        state[0] = "on the path"
        while path:
            i, following = path[-1]
            for j in following:
                if not state[j]:
                    state[j] = "on the path"
                    path.append((j, iter(self.next[j])))
                    break
                if state[j] == "on the path":
                    back.add((i, j))
            else:
                state[i] = "left"
                order.append(i)
                path.pop()
        return order, back


def disassembled(image: bytes) -> str:
    spec = importlib.util.find_spec("nvidia")
    places = [Path(folder, "cu13/bin/nvdisasm") for folder in (spec.submodule_search_locations if spec else ())]
    tool = next((str(place) for place in places if place.exists()), None) or shutil.which("nvdisasm")
    if tool is None:
        raise SystemExit("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def instructions(loop: Loop, architecture: int) -> float:
    """For each element."""
    options = option(ELEMENT="bfloat16", **loop.options)
    code = Code(disassembled(nvrtc.cubin(translation_unit(loop.kernel), options, architecture)), loop.access)
    found = [(most, count) for most, count in code.loops() if count >= LEAST]
    rounds = (times * min(count for most, count in found if most == n) for n, times in loop.rounds.items())
    return sum(rounds) / loop.elements


if __name__ == "__main__":
    for loop in LOOPS:
        print(f"| {loop.what} | {instructions(loop, int(sys.argv[1]) if sys.argv[1:] else 90):.1f} |")
