"""Result files: where they are, and what they say of where and with what they were measured; no host's name."""

import json
import os
import platform
import re
from importlib import metadata
from pathlib import Path

import cubn

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The processor as it calls itself, with its family and model where that is no more than a brand."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    name, family, model = (
        found and found[1]
        for key in ("model name", "cpu family", "model")
        for found in [re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)]
    )
    if name and family and not re.search(r"\d", name):
        return f"{name} (family {family}, model {model})"
    return name or platform.processor() or platform.machine()


def machine() -> str:
    """A folder name: processor and number of CPUs."""
    name = re.sub(r"\((R|TM)\)", "", f"{processor()} {os.cpu_count()} cpus")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(name: str, options: dict[str, object], rows: list[dict[str, object]], folder: str = "") -> Path:
    """Write results/<machine>/<name>, one row a line, and return its path; another folder where no machine matters."""
    header = {
        "processor": processor(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "cubn": cubn.__version__,
        **{package: metadata.version(package) for package in ("numpy", "numba", "llvmlite", "torch")},
        **options,
    }
    path = RESULTS / (folder or machine()) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    body = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in rows)
    path.write_text(f'{json.dumps(header, indent=2)[:-2]},\n  "rows": [\n{body}\n  ]\n}}\n')
    return path
