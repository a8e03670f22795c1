"""Parts and arguments put together to a launch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from cubn._types import Operands, Statistics
from cubn.backends.cpu import plan, pool, relayout, relu_mask
from cubn.backends.cpu.launch import ALIGNMENT, Launch
from cubn.backends.cpu.parameters import BLOCK, FIELDS, OFFSET, Fields, of_operand
from cubn.backends.cpu.pool import Stage
from cubn.backends.cpu.stages import Arrays, Elements, Part, coefficients

Names = tuple[str, ...]

STATISTICS = ("count", "mean", "m2", "var", "invstd")


class Arguments(NamedTuple):
    """Fields of the block that a call gives, in its order, and those that lie in the statistics."""

    integers: Names
    floats: Names = ()
    statistics: Fields = {}  # noqa: RUF012  # offsets


class Copies(NamedTuple):
    """Whether statistics have copies of gamma and beta."""

    gamma: bool
    beta: bool


def in_statistics(C: int, names: Iterable[str] = STATISTICS) -> Fields:
    """Where fields are among the statistics."""
    return {name: 8 * Statistics.offset(name.removeprefix("kept_"), C) for name in names}


def launch(run: Iterable[Part], arguments: Arguments, fields: Fields, work: int, strided: Operands | None) -> Launch:
    """All parts one after the other; what they write and nobody else has is in the workspace.

    `work` is what is read, in bytes. Of strided operands position tables are looked up.
    """
    stages: tuple[Stage, ...] = ()
    keeps: Arrays = ()
    room: Fields = {}
    values = dict.fromkeys(FIELDS, 0) | fields
    for part in run:
        stages += part.stages
        keeps += part.keeps
        room |= part.room
        values |= part.fields
    assert len(values) == len(FIELDS), values.keys() - set(FIELDS)
    in_workspace, size = [], 0
    for name, nbytes in room.items():
        if name not in arguments.integers and name not in arguments.statistics:
            in_workspace.append((OFFSET[name], size))
            size += -(-nbytes // ALIGNMENT) * ALIGNMENT
    tabulated = {f"{name}_offsets": o for name, o in strided._asdict().items() if o} if strided else {}
    program = pool.Program(
        stages,
        (*values.values(), *[0] * (BLOCK - len(values))),
        [OFFSET[name] for name in (*tabulated, *arguments.integers)],
        [OFFSET[name] for name in arguments.floats],
        in_workspace,
        [(OFFSET[name], offset) for name, offset in arguments.statistics.items()],
        detaches=work >= plan.SERIAL_BYTES or any(stage.threads > 1 for stage in stages),
    )
    return Launch(program, size, tuple(tabulated.values()), keeps)


def over_elements(
    run: Iterable[Part], elements: Elements, arguments: Arguments, fields: Fields, *, strided: bool
) -> Launch:
    """A launch that has a coefficient table."""
    extents, operands = elements.extents, elements.operands
    fields = fields | dict(zip(("samples", "channels", "positions"), extents, strict=True))
    for name, operand in operands._asdict().items():
        if operand:
            fields |= of_operand(name, operand)
    if elements.relu_mask:
        fields |= relu_mask.fields(extents, elements.relu_mask)
    table = coefficients(extents.C, elements.dtype)
    given = {name: f"{name}_given" for name, _ in elements.relaid}
    arguments = arguments._replace(integers=tuple(given.get(name, name) for name in arguments.integers))
    before, after = relayout.copies(elements)
    return launch((before, table, *run, after), arguments, fields, elements.nbytes, operands if strided else None)


def over_channels(run: Part, C: int, arguments: Arguments, fields: Fields) -> Launch:
    return launch((run,), arguments, {"channels": C, **fields}, 8 * C, None)
