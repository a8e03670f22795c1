"""Before and after in one run: a script of this folder measures several source trees in turns.

Each turn is a process of its own that imports cubn from its tree; the scripts are always those of this folder.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import cubn

Row = dict[str, object]


def tree() -> Path:
    """Where cubn is imported from."""
    return Path(cubn.__file__).parents[1]


def print_rows(rows: list[Row]) -> None:
    """What a script prints for `in_turns`."""
    print(json.dumps({"tree": str(tree()), "rows": rows}))


def in_turns(script: str, arguments: Sequence[str], other: Path, count: int) -> Iterator[tuple[list[Row], list[Row]]]:
    """The rows of this tree and of the other, `count` times, each beginning every second time."""
    trees = (tree(), other.resolve())
    for turn in range(count):
        order = (0, 1) if turn % 2 == 0 else (1, 0)
        rows = {i: rows_of(script, arguments, trees[i]) for i in order}
        yield rows[0], rows[1]


def rows_of(script: str, arguments: Sequence[str], of: Path) -> list[Row]:
    """The rows that a script prints in a process that imports cubn from a tree."""
    command = [sys.executable, script, "--json", *arguments]
    environment = os.environ | {"PYTHONPATH": str(of)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    printed = json.loads(done.stdout)
    if printed["tree"] != str(of):
        raise SystemExit(f"{of}: there is no cubn in this tree, {printed['tree']} was measured")
    return printed["rows"]
