"""Instructions that a GPU issues for each bfloat16 element, counted in the machine code of the kernels' hot loops.

python -m tests.cuda.instructions [ARCHITECTURE]       90 unless told; needs nvidia-cuda-nvrtc and nvidia-cuda-nvdisasm

Counted is the way through a loop with most accesses of 16 bytes (or to a lane's channels in shared memory) and, of
these, fewest instructions: whole tiles and octets, aligned. An element that is not there, in a warp's last lanes, costs
as much as one that is.
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
_WIDE = re.compile(r"^(?:LD[GS]|LDGSTS|ST[GS])\S*\.128")
_CHANNELS = re.compile(r"^LDS\S*\.64")  # a lane's, in shared memory

NORMALIZE = {"OPERATION": "NORMALIZE", "RESIDUAL": 0, "RELU": 1, "KEEP_BITS": 0}
GRADIENT = {"OPERATION": "GRADIENT", "RESIDUAL": 0, "GATE": "GATE_NONE", "FROZEN": 0}
DENSE = {"CROSSING": 0, "INDEX": "unsigned"}
ODD = {"CROSSING": 2, "INDEX": "unsigned"}
LARGE = {"THREADS": 256, "CLUSTER": 1, "GROUPED": 0, "TILE_LANES": 32, "TILE_ROWS": 8}
SMALL = {"THREADS": 256, "CLUSTER": 1, "GROUPED": 1, "TILE_LANES": 8, "TILE_ROWS": 1}
SLICE = {"THREADS": 256, "CLUSTER": 1, "SLICE": 64, "TILE_ROWS": 1, "DEPTH": 4, "TILE_DEPTH": 8}

OCTET, TILE = 8, 64
"""Elements of a lane on one way through a loop."""
LEAST = 5
"""Instructions for each element, below which a loop does something else."""


class Loop(NamedTuple):
    """What to look for: the loop whose hottest way has so many accesses, and the elements of a lane on it."""

    what: str
    kernel: str
    options: dict[str, object]
    accesses: int
    elements: int
    access: re.Pattern[str] = _WIDE


LOOPS = (
    Loop("normalise + ReLU, nchw", "apply_rows", NORMALIZE | DENSE, 3, OCTET),
    Loop("normalise + ReLU, nchw, odd rows", "apply_rows", NORMALIZE | ODD, 4, OCTET),
    Loop("input gradient, nchw", "apply_rows", GRADIENT | DENSE, 4, OCTET),
    Loop("normalise + ReLU, nhwc", "apply_channels", NORMALIZE, 2, OCTET),
    Loop("input gradient, nhwc", "apply_channels", GRADIENT, 3, OCTET),
    Loop("training step on chip, reduce", "slab", LARGE | NORMALIZE, 8, TILE),
    Loop("training step on chip, normalise", "slab", LARGE | NORMALIZE, 2, OCTET),
    Loop("gradient on chip, add up", "slab", LARGE | GRADIENT, 8, TILE // 2),  # four rows at a time; then the merges
    Loop("gradient on chip, apply", "slab", LARGE | GRADIENT, 3, OCTET),
    Loop("training step on chip, 7 x 7, reduce", "slab", SMALL | NORMALIZE, 1, OCTET),
    Loop("training step on chip, 7 x 7, normalise", "slab", SMALL | NORMALIZE, 4, OCTET),
    Loop("training step on chip, nhwc, reduce", "slab_channels", SLICE | NORMALIZE, 8, 4 * OCTET, _CHANNELS),
    Loop("training step on chip, nhwc, normalise", "slab_channels", SLICE | NORMALIZE, 2, OCTET),
    Loop("gradient on chip, nhwc, add up", "slab_channels", SLICE | GRADIENT, 16, 4 * OCTET, _CHANNELS),
    Loop("gradient on chip, nhwc, apply", "slab_channels", SLICE | GRADIENT, 3, OCTET),
)


class Code:
    """Instructions, and which can follow which."""

    def __init__(self, text: str, access: re.Pattern[str]) -> None:
        labels: dict[str, int] = {}
        lines: list[tuple[bool, str, str]] = []  # predicated, instruction, operands
        for line in text.splitlines():
            if label := _LABEL.match(line):
                labels[label[1]] = len(lines)
            elif found := _INSTRUCTION.match(line):
                lines.append((bool(found[1]), found[2], found[3]))
        self.counted = [bool(access.match(instruction)) for _, instruction, _ in lines]
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
                    accesses, fewest = (0, 0) if i == last else max(ahead)
                    best[i] = (accesses + self.counted[i], fewest - 1)
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
    found = (count / loop.elements for accesses, count in code.loops() if accesses == loop.accesses)
    return min(count for count in found if count >= LEAST)


if __name__ == "__main__":
    for loop in LOOPS:
        print(f"| {loop.what} | {instructions(loop, int(sys.argv[1]) if sys.argv[1:] else 90):.1f} |")
