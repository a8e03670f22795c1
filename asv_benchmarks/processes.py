"""For scripts of this folder that measure each case in a process of its own: its threads are nobody else's."""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence

from trees import Row

from cubn.cli.info import info


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, write nothing")
    parser.add_argument("--here", action="store_true", help="measure the one case in this process")
    parser.add_argument(
        "--threading",
        choices=("auto", "openmp", "own"),
        default=os.environ.get("CUBN_THREADING", "auto"),
        help="CUBN_THREADING; by default as it is",
    )


def measured(script: str, arguments: Sequence[str], threading: str, **environment: str) -> Row:
    """The row that a script measures in a new process."""
    done = subprocess.run(
        [sys.executable, script, "--here", *arguments],
        env=os.environ | {"CUBN_THREADING": threading} | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    (row,) = json.loads(done.stdout)["rows"]
    return row


def threads() -> str:
    """What `python -m cubn info` says about threads in this process, without this machine's folders."""
    (line,) = (line for line in info().splitlines() if line.split()[:1] == ["threads"])
    return re.sub(r"/\S*/site-packages/", "", line.split(maxsplit=1)[1])
