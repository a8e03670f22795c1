"""Basic blocks of a compiled module: which way a run takes through them, and through the machine code of any processor.

LLVM IR is text here. Every block gets a line number, which its instructions keep whatever becomes of them, and which
machine code names in `.loc`. For a run, every block gets instructions that note it.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_LABEL = re.compile(r'(?!\.L(tmp|func))[-\w.$"]+:')  # those of debug information are no ends of blocks
_PHI = re.compile(r"  \S+ = phi ")
_LOCATED = re.compile(r"\s+\.loc\s+\d+\s+(\d+)")
_INSTRUCTION = re.compile(r"\s+([a-z][\w.]*)(\s|$)")
_JUMP = re.compile(r"j\w+|ret\w*|b|b\.\w+|br|cbn?z|tbn?z")
"""Of x86-64 and AArch64."""


class MachineBlock(NamedTuple):
    """Machine instructions that run one after the other, and which block of the IR most of them are of, if any."""

    instructions: tuple[str, ...]
    block: int | None


class Way(NamedTuple):
    """Pieces of machine code, and the order in which they run."""

    pieces: tuple[tuple[str, ...], ...]
    order: tuple[int, ...]


def _in_blocks(text: str) -> Iterator[tuple[int | None, str]]:
    """The lines of a module; those of instructions with the number of their block."""
    block, inside, entered = -1, False, False
    for line in text.splitlines():
        if line.startswith("define "):
            block, inside, entered = block + 1, True, False
        elif line == "}":
            inside = False
        elif inside and _LABEL.match(line):  # a function's first block may have a label or none
            block, entered = block + entered, True
        elif inside and line.startswith("  "):
            entered = True
            yield block, line
            continue
        yield None, line


def located(text: str) -> str:
    """The module with a line number for every instruction: its block's, from 1 on."""
    number = 1 + max((int(given) for given in re.findall(r"^!(\d+) = ", text, re.MULTILINE)), default=-1)
    unit, file, flags, types = range(number, number + 4)
    found = []
    added = [
        f"!llvm.dbg.cu = !{{!{unit}}}",
        f"!llvm.module.flags = !{{!{flags}}}",
        f"!{unit} = distinct !DICompileUnit(language: DW_LANG_C, file: !{file}, emissionKind: LineTablesOnly)",
        f'!{file} = !DIFile(filename: "kernel", directory: "")',
        f'!{flags} = !{{i32 2, !"Debug Info Version", i32 3}}',
        f"!{types} = !DISubroutineType(types: !{{}})",
    ]
    last, number, function = -1, number + 4, 0
    for block, line in _in_blocks(text):
        if line.startswith("define "):
            function, number = number, number + 1
            found.append(f"{line[:-1]}!dbg !{function} {{")
            added.append(
                f'!{function} = distinct !DISubprogram(name: "{function}", scope: !{file}, file: !{file}, '
                f"type: !{types}, spFlags: DISPFlagDefinition, unit: !{unit})"
            )
        elif block is None or line.endswith("[") or line.startswith("    "):  # a switch ends some lines further down
            found.append(line)
        else:
            if block > last:
                last, number = block, number + 1
                added.append(f"!{number - 1} = !DILocation(line: {block + 1}, scope: !{function})")
            found.append(f"{line}, !dbg !{number - 1}")
    return "\n".join([*found, *added, ""])


def noting(text: str, notes: int, room: int) -> str:
    """The module whose blocks note their numbers behind an int64 at address `notes`, which becomes how many did: the
    last `room` of them, a power of two.
    """
    found, last = [], -1
    for block, line in _in_blocks(text):
        if block is not None and block > last and not _PHI.match(line):
            last = block
            name, at = f"%noted.{block}", f"ptr inttoptr (i64 {notes} to ptr)"
            found += [
                f"  {name} = load i64, {at}",
                f"  {name}.place = and i64 {name}, {room - 1}",
                f"  {name}.at = getelementptr i64, ptr inttoptr (i64 {notes + 8} to ptr), i64 {name}.place",
                f"  store i64 {block}, ptr {name}.at",
                f"  {name}.next = add i64 {name}, 1",
                f"  store i64 {name}.next, {at}",
            ]
        found.append(line)
    return "\n".join([*found, ""])


def machine_blocks(assembly: str) -> list[MachineBlock]:
    """The basic blocks of a located module's assembly, of x86-64 (AT&T's syntax) or AArch64."""
    found: list[MachineBlock] = []
    instructions: list[str] = []
    votes: Counter[int] = Counter()
    line = 0

    def end() -> None:
        if instructions:
            found.append(MachineBlock(tuple(instructions), votes.most_common(1)[0][0] - 1 if votes else None))
        instructions.clear()
        votes.clear()

    for text in assembly.splitlines():
        if place := _LOCATED.match(text):
            line = int(place[1])
        elif _LABEL.match(text):
            end()
        elif instruction := _INSTRUCTION.match(text):
            instructions.append(text.strip())
            if line:
                votes[line] += 1
            if _JUMP.fullmatch(instruction[1]):
                end()
    end()
    return found


def way(assembly: str, blocks: Sequence[int]) -> Way:
    """The way through a located module's assembly, where blocks of the IR run in this order."""
    ran = set(blocks)
    found = [piece for piece in machine_blocks(assembly) if piece.block in ran]
    pieces_of: dict[int | None, list[int]] = {block: [] for block in ran}
    for i, piece in enumerate(found):
        pieces_of[piece.block].append(i)
    return Way(tuple(piece.instructions for piece in found), tuple(i for block in blocks for i in pieces_of[block]))
