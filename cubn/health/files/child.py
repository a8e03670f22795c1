"""Reading by a package, in a process of its own: what damage does to a package's native code ends there.

The programs are `by_h5py.py` and `by_tensorstore.py`, which get a path, and where in it the file begins and how many
bytes it has. They print a line of JSON about the arrays, and behind it the arrays as npz.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

from cubn.health.files import npz
from cubn.health.files.archive import Archive
from cubn.health.files.source import Held
from cubn.health.files.tensors import Tensor
from cubn.health.files.text import parsed
from cubn.health.files.unreadable import UnreadableFile

SECONDS = 60


def run(package: str, path: Path, begin: int = 0, length: int = 0) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the program of a package says about the arrays, and the arrays."""
    if importlib.util.find_spec(package) is None:
        raise UnreadableFile(f"reading it needs {package}. Install it with: pip install {package}")
    program = Path(__file__).with_name(f"by_{package}.py")
    command = [sys.executable, "-P", str(program), str(path.absolute()), str(begin), str(length)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise UnreadableFile(
            f"{package} needs more than {SECONDS} seconds for it: it is damaged, or too large"
        ) from error
    if done.returncode:
        reason = done.stderr.decode("utf-8", "replace").strip().splitlines()
        said = reason[-1][:200] if reason else f"it ended with status {done.returncode}"
        raise UnreadableFile(f"{package} cannot read it ({said}): it is damaged, or no checkpoint")
    line, _, data = done.stdout.partition(b"\n")
    about = parsed(line)
    return about, {
        entry.name: _typed(entry.value, about["dtypes"].get(entry.name))
        for entry in npz.of(Archive(Held(data, path)))
        if isinstance(entry.value, Tensor)
    }


def _typed(tensor: Tensor, dtype: str | None) -> Tensor:
    """With the type that npz has no name for: bfloat16, which comes as integers."""
    return Tensor(dtype, tensor.shape, tensor.load) if dtype else tensor
