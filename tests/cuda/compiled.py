"""Compile every specialisation for every architecture with every CUDA version, and record what came of it.

    python -m tests.cuda.compiled                                all of it, and into compiled.json
    python -m tests.cuda.compiled --cuda 13 --architectures 75 90     some columns of it
    python -m tests.cuda.compiled --every 40                     one in forty, others in every column
    python -m tests.cuda.compiled --processes 16 --log FOLDER

A column is a CUDA version and an architecture. Its log has a line for each specialisation: its source's digest,
registers, bytes of stack and of spills, and "fine", or what is wrong. A run that was stopped goes on where it was: what
is in the logs, of the same source and compiler, is not compiled again. A column is recorded by the digest of its
log, and by how many of all are in it.
"""

import argparse
import functools
import hashlib
import itertools
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from cubn.backends.cuda.source import translation_unit
from tests.cuda import nvrtc
from tests.cuda.specialisations import Specialisation, specialisations
from tests.cuda.test_compiler import ARCHITECTURES, check_exact, check_registers, check_vectors

RECORD = Path(__file__).with_suffix(".json")
CHUNK = 8  # specialisations a process compiles at a time


def digest(lines) -> str:
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


@functools.cache
def source_of(name: str) -> str:
    """A digest of a kernel's text."""
    return digest([translation_unit(name)])[:12]


def sources() -> str:
    """A digest of what is compiled."""
    return digest(map(source_of, sorted({s.source for s in specialisations()})))


def start_of(specialisation: Specialisation) -> str:
    """Of its line in a log."""
    return f"{specialisation} {source_of(specialisation.source)}"


def set_of_names() -> str:
    """A digest of which specialisations there are."""
    return digest(map(str, specialisations()))


def stale() -> str:
    """Why the record is not of the present kernels; empty where it is."""
    if not RECORD.exists():
        return "there is no record of compiled kernels"
    record = json.loads(RECORD.read_text())
    if record["specialisations"] != set_of_names():
        return "the record is of other specialisations"
    if record["sources"] != sources():
        return "the record is of other sources"
    whole = {name for name, column in record["columns"].items() if column["kernels"] == column["of"]}
    missing = {column_name(*column) for column in itertools.product(nvrtc.PLACES, ARCHITECTURES)} - whole
    return f"the record lacks all or some of {'; '.join(sorted(missing))}" if missing else ""


def column_name(cuda: int, architecture: int) -> str:
    return f"CUDA {cuda}, sm_{architecture}"


def line_of(specialisation: Specialisation, architecture: int, cuda: int) -> str:
    """Of the log."""
    try:
        source = translation_unit(specialisation.source)
        kernel = nvrtc.compile(source, specialisation.options, architecture, cuda)[specialisation.kernel]
    except nvrtc.CompileError as error:
        return f"{start_of(specialisation)} not compiled: {' '.join(str(error).split())}"
    wrong = []
    for check in (check_exact, check_registers, functools.partial(check_vectors, specialisation)):
        try:
            check(kernel)
        except AssertionError as error:
            wrong.append(str(error).partition("\n")[0])
    found = f"{kernel.registers} registers {kernel.stack_bytes} stack {kernel.spill_bytes} spills"
    return f"{start_of(specialisation)} {found} {'; '.join(wrong) or 'fine'}"


def lines_of(indices: list[int], architecture: int, cuda: int) -> list[str]:
    every = specialisations()
    return [line_of(every[i], architecture, cuda) for i in indices if every[i].fits(architecture)]


def by_start(lines: list[str]) -> dict[str, str]:
    return {" ".join(line.split(" ", 2)[:2]): line for line in lines}


def compile_column(
    cuda: int, architecture: int, folder: Path, pool: ProcessPoolExecutor, every: int = 1, first: int = 0
) -> list[str]:
    """The log, in order; kept as it grows. What it lacks is compiled, or one in `every` of that."""
    name = column_name(cuda, architecture)
    log = folder / f"cuda{cuda}_sm{architecture}.log"
    header = f"# CUDA {nvrtc.version(cuda)}"
    wanted = [(i, start_of(s)) for i, s in enumerate(specialisations()) if s.fits(architecture)]
    known: dict[str, str] = {}
    if log.exists():
        lines = log.read_text().split("\n")[:-1]  # the last is empty, or was cut
        if lines[:1] == [header]:
            known = by_start(lines[1:])
            known = {start: known[start] for _, start in wanted if start in known}
    left = [i for i, of in wanted[first % every :: every] if of not in known]
    begin, done = time.monotonic(), 0
    with log.open("w") as file:
        file.write("".join(f"{line}\n" for line in (header, *known.values())))
        file.flush()
        chunks = [left[i : i + CHUNK] for i in range(0, len(left), CHUNK)]
        for future in as_completed([pool.submit(lines_of, chunk, architecture, cuda) for chunk in chunks]):
            found = future.result()
            file.write("".join(f"{line}\n" for line in found))
            file.flush()
            known |= by_start(found)
            done += len(found)
            minutes = (time.monotonic() - begin) / 60 * (len(left) - done) / done
            print(f"\r{name}: {done} of {len(left)}, {minutes:.0f} min ", end="", flush=True)
    lines = [known[of] for _, of in wanted if of in known]
    wrong = [line for line in lines if not line.endswith(" fine")]
    print(f"\r{name}: {len(lines)}, of which {len(wrong)} are wrong      ")
    for line in wrong:
        print(f"  {line}")
    return lines


def recorded(cuda: int, architecture: int, lines: list[str]) -> dict[str, object]:
    """Of a column."""
    return {
        "compiler": nvrtc.version(cuda),
        "kernels": len(lines),
        "of": sum(s.fits(architecture) for s in specialisations()),
        "wrong": [line for line in lines if not line.endswith(" fine")],
        "sha256": digest(lines),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cuda", type=int, nargs="+", choices=tuple(nvrtc.PLACES), default=list(nvrtc.PLACES))
    parser.add_argument("--architectures", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--every", type=int, default=1, help="compile one in so many")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir(), f"cubn_compiled_{os.getuid()}"))
    parser.add_argument("--no-record", action="store_true", help="leave compiled.json as it is")
    arguments = parser.parse_args()
    arguments.log.mkdir(exist_ok=True)
    specialisations()  # before processes are made, which then have them
    record = {
        "command": "python -m tests.cuda.compiled",
        "specialisations": set_of_names(),
        "sources": sources(),
        "columns": {},
    }
    if RECORD.exists():
        before = json.loads(RECORD.read_text())
        if all(before[name] == record[name] for name in ("specialisations", "sources")):
            record["columns"] = before["columns"]
    with ProcessPoolExecutor(arguments.processes) as pool:
        for first, (cuda, architecture) in enumerate(itertools.product(arguments.cuda, arguments.architectures)):
            lines = compile_column(cuda, architecture, arguments.log, pool, arguments.every, first)
            record["columns"][column_name(cuda, architecture)] = recorded(cuda, architecture, lines)
            if not arguments.no_record:
                RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
