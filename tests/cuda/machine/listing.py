"""What NVIDIA's disassembler prints: instructions in order, and where branches lead."""

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

_LABEL = re.compile(r"^(\.L_x_\d+|\S*__internal_\S+):$")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
_NOTE = re.compile(r"\s*\(\*.*?\*\)")
_TARGET = re.compile(r"`\((.+)\)")


@functools.cache
def disassembler() -> str:
    """NVIDIA's; FileNotFoundError where there is none."""
    spec = importlib.util.find_spec("nvidia")
    places = [Path(folder, "cu13/bin/nvdisasm") for folder in (spec.submodule_search_locations or () if spec else ())]
    tool = next((str(place) for place in places if place.exists()), None) or shutil.which("nvdisasm")
    if tool is None:
        raise FileNotFoundError("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    return tool


def disassembled(image: bytes) -> str:
    """The listing of a binary."""
    tool = disassembler()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


class Instruction(NamedTuple):
    """One line of the listing."""

    address: int
    guard: str  # a predicate, or nothing
    name: str
    operands: tuple[str, ...]

    @property
    def is_double(self) -> bool:
        """Whether the units of float64 execute it, of which there are fewer."""
        return bool(re.match(r"D(ADD|MUL|FMA|SETP)|(F2F|I2F|F2I)\S*64|MUFU\S*64H", self.name))


class Code(NamedTuple):
    """Instructions in order; where labels and addresses are."""

    instructions: list[Instruction]
    labels: dict[str, int]
    addresses: dict[int, int]


def parsed(listing: str, kernel: str) -> Code:
    """A kernel, of what nvdisasm printed."""
    _, _, listing = listing.partition(f"\n.text.{kernel}:")
    listing, _, _ = listing.partition("\n\t.section")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line.replace("$__", "__").replace("$", "_")):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            address, guard, name, rest = found.groups()
            rest = _NOTE.sub("", rest).replace(".reuse", "")
            operands = tuple(part.strip() for part in rest.split(",")) if rest else ()
            instructions.append(Instruction(int(address, 16), guard or "", name, operands))
    return Code(instructions, labels, {line.address: i for i, line in enumerate(instructions)})


def target(code: Code, instruction: Instruction) -> int:
    """Which instruction a branch leads to."""
    label = _TARGET.search(instruction.operands[-1])[1]
    return code.labels[label.replace("$__", "__").replace("$", "_")]
