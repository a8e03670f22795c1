"""What the instructions of NVIDIA's machine code do, for many threads at once: enough of them for cubn's kernels.

As `nvdisasm -c` prints them for compute capability 9.0. An instruction becomes a function of the registers and of the
threads that execute it. Not as on a device: approximate reciprocals are correctly rounded, and directed rounding is to
nearest (the only code with it is behind a division or root of extreme numbers). Copies are done at once.
"""

import ctypes
import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

LOW = np.uint64(0xFFFFFFFF)
CARRY = np.uint64(1 << 32)
LOCAL = 4096  # bytes of a thread's own memory, below the address 0
SHARED_WINDOW = 0x7F00  # high word of a generic address of shared memory
SHARED_OFFSET = 0x400  # where a block's memory begins in it

_LABEL = re.compile(r"^(\.L_x_\d+|\S*__internal_\S+):$")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
_NOTE = re.compile(r"\s*\(\*.*?\*\)")
_TARGET = re.compile(r"`\((.+)\)")
_PREDICATE = re.compile(r"!?U?P[0-6T]$")
_REGISTER = re.compile(r"(U?R)(\d+|Z)$")
_CONSTANT = re.compile(r"c\[0x0\]\[(?:(U?R(?:\d+|Z))\+?)?(?:0x([0-9a-f]+))?\]$")

Lanes = np.ndarray | slice
Read = Callable[["Registers", Lanes], np.ndarray]


class Unknown(Exception):
    """An instruction that is not known here."""


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


class Registers:
    """Those of all threads; what warps have in common is kept by every thread."""

    def __init__(self, threads: int, constants: bytes, special: dict[str, np.ndarray]) -> None:
        self.words = {"R": np.zeros((256, threads), np.uint32), "UR": np.zeros((64, threads), np.uint32)}
        self.predicates = {"P": np.zeros((8, threads), bool), "UP": np.zeros((8, threads), bool)}
        for found in self.predicates.values():
            found[7] = True
        self.constants = constants
        self.special = special
        self.threads = threads
        self.local = np.zeros((threads, LOCAL), np.uint8)


# --- operands ---------------------------------------------------------------------------------------------------------


def register(text: str) -> tuple[str, int | None]:
    """Which file, which one; None is the one of zeros."""
    found = _REGISTER.match(text)
    if not found:
        raise Unknown(f"register {text}")
    return found[1], None if found[2] == "Z" else int(found[2])


def predicate(text: str) -> Read:
    inverted, name = text.startswith("!"), text.lstrip("!")
    file, index = name[:-1], 7 if name[-1] == "T" else int(name[-1])
    if inverted:
        return lambda s, a: ~s.predicates[file][index][a]
    return lambda s, a: s.predicates[file][index][a]


def _raw(text: str, words: int) -> Read:
    """A register, pair or constant, as unsigned numbers of 32 or 64 bits."""
    if found := _CONSTANT.match(text):
        offset, width = int(found[2] or "0", 16), 4 * words
        if not found[1] or found[1].endswith("Z"):
            return lambda s, a: np.uint64(int.from_bytes(s.constants[offset : offset + width], "little"))
        by = _raw(found[1], 1)

        def indexed(s: Registers, a: Lanes) -> np.ndarray:
            where = (by(s, a).astype(np.int64) + offset)[:, None] + np.arange(width)
            found = np.frombuffer(s.constants, np.uint8)[where].view(f"<u{width}")[:, 0]
            return found.astype(np.uint64)

        return indexed
    file, index = register(text)
    if index is None:
        return lambda s, a: np.uint64(0)
    if words == 1:
        return lambda s, a: s.words[file][index][a].astype(np.uint64)

    def pair(s: Registers, a: Lanes) -> np.ndarray:
        found = s.words[file]
        return found[index][a].astype(np.uint64) | found[index + 1][a].astype(np.uint64) << np.uint64(32)

    return pair


def word(text: str, words: int = 1) -> Read:
    """An integer operand. The negative of 0 carries, as that of a number that is subtracted does."""
    if re.match(r"-?[0-9]", text):
        value = np.uint64(int(text, 0) & (1 << 32 * words) - 1)
        return lambda s, a: value
    sign, name = (text[0], text[1:]) if text[0] in "-~" else ("", text)
    absolute = name.startswith("|")
    name, _, half = name.strip("|").partition(".")
    read = _raw(name if "[" not in text else text.lstrip("-~"), words)
    if absolute or half not in ("", "64"):
        raise Unknown(f"operand {text}")
    if sign == "-":
        return lambda s, a: CARRY - read(s, a)
    if sign == "~":
        return lambda s, a: read(s, a) ^ LOW
    return read


def number(text: str, double: bool = False) -> Read:
    """A floating-point operand."""
    negative, name = text.startswith("-"), text.lstrip("-+")
    absolute = name.startswith("|")
    name = name.strip("|")
    kind, words = (np.float64, 2) if double else (np.float32, 1)
    if re.match(r"[0-9]|INF|QNAN", name):
        value = kind(name.replace("QNAN", "nan")) * (-1 if negative else 1)
        return lambda s, a: value
    read = _raw(name, words)
    bits = np.uint64 if double else np.uint32

    def find(s: Registers, a: Lanes) -> np.ndarray:
        value = np.atleast_1d(np.asarray(read(s, a)).astype(bits)).view(kind)
        value = np.abs(value) if absolute else value
        return -value if negative else value

    return find


def signed(values: np.ndarray, bits: int = 32) -> np.ndarray:
    values = np.asarray(values).astype(np.uint64) & (LOW if bits == 32 else np.uint64(0xFFFFFFFFFFFFFFFF))
    return values.astype(np.uint32).view(np.int32).astype(np.int64) if bits == 32 else values.view(np.int64)


def _put(text: str, words: int = 1) -> Callable[[Registers, Lanes, np.ndarray], None]:
    file, index = register(text)

    def put(s: Registers, a: Lanes, values: np.ndarray) -> None:
        if index is None:
            return
        for i in range(words):
            s.words[file][index + i][a] = (values >> np.uint64(32 * i)) & LOW

    return put


def _put_number(text: str, double: bool = False) -> Callable[[Registers, Lanes, np.ndarray], None]:
    put = _put(text, 2 if double else 1)
    kind, bits = (np.float64, np.uint64) if double else (np.float32, np.uint32)
    return lambda s, a, values: put(s, a, np.atleast_1d(values).astype(kind).view(bits).astype(np.uint64))


def _put_predicate(text: str) -> Callable[[Registers, Lanes, np.ndarray], None]:
    file, index = text[:-1], text[-1]
    if index == "T":
        return lambda s, a, values: None

    def put(s: Registers, a: Lanes, values: np.ndarray) -> None:
        s.predicates[file][int(index)][a] = values

    return put


def _take_predicates(operands: list[str]) -> list[str]:
    """Those that an instruction begins to write to, but for its result."""
    found = []
    while operands and _PREDICATE.match(operands[0]):
        found.append(operands.pop(0))
    return found


# --- integers ---------------------------------------------------------------------------------------------------------


def _sum(name: str, operands: list[str], terms: Callable[[list[str]], tuple[Read, int]]):
    """Of a result, predicates of its carries, terms, and predicates that are carried in."""
    put = _put(operands.pop(0))
    carries = [_put_predicate(p) for p in _take_predicates(operands)]
    total, taken = terms(operands)
    carried = [predicate(p) for p in operands[taken:]]

    def act(s: Registers, a: Lanes) -> None:
        value = total(s, a) + sum((p(s, a).astype(np.uint64) for p in carried), np.uint64(0))
        put(s, a, value)
        for i, carry in enumerate(carries):
            carry(s, a, value >> np.uint64(32) > np.uint64(i))

    return act


def _iadd(name, operands):
    def terms(given):
        reads = [word(text) for text in given[:3] if not _PREDICATE.match(text)]
        return lambda s, a: sum((read(s, a) for read in reads), np.uint64(0)), len(reads)

    return _sum(name, operands, terms)


def _imad(name, operands):
    parts = name.split(".")
    wide, high, unsigned = "WIDE" in parts, "HI" in parts, "U32" in parts
    put = _put(operands.pop(0), 2 if wide else 1)
    carry = [_put_predicate(p) for p in _take_predicates(operands)]
    left, right = word(operands[0]), word(operands[1])
    third = word(operands[2], 2 if wide or high else 1)
    carried = [predicate(p) for p in operands[3:]]

    def act(s, a):
        x, y, z = left(s, a), right(s, a), third(s, a)
        if wide or high:
            product = (x & LOW) * (y & LOW) if unsigned else (signed(x) * signed(y)).astype(np.uint64)
        else:
            product = x * y
        value = product + z + sum((p(s, a).astype(np.uint64) for p in carried), np.uint64(0))
        for p in carry:
            p(s, a, value < z)
        put(s, a, value >> np.uint64(32) if high else value)

    return act


def _lea(name, operands):
    parts = name.split(".")
    high, extends = "HI" in parts, "SX32" in parts

    def terms(given):
        first, second = word(given[0].lstrip("-")), word(given[1])
        negative = given[0].startswith("-")
        third = word(given[2]) if high and not extends else None
        at = 3 if third else 2
        shift = np.uint64(int(given[at], 0))

        def total(s, a):
            x = first(s, a)
            if high:
                upper = third(s, a) if third else (signed(x) >> 63).astype(np.uint64) & LOW
                shifted = ((upper << np.uint64(32) | x) << shift) >> np.uint64(32)
            else:
                shifted = (x << shift) & LOW
            return (CARRY - shifted if negative else shifted) + second(s, a)

        return total, at + 1

    return _sum(name, operands, terms)


def _shift(name, operands):
    parts = name.split(".")
    put = _put(operands[0])
    low, by, high = (word(text) for text in operands[1:])
    kind, upper, wraps = parts[2], "HI" in parts, "W" in parts
    widest = 63 if kind in ("U64", "S64") or (upper and parts[1] == "L") else 32

    def act(s, a):
        n = by(s, a) & LOW
        n = n & np.uint64(31) if wraps else np.minimum(n, np.uint64(widest))
        if parts[1] == "L":
            pair = (high(s, a) << np.uint64(32) | low(s, a)) << n
            value = pair >> np.uint64(32) if upper else np.where(n > 31, np.uint64(0), low(s, a) << n)
        elif upper:
            value = (signed(high(s, a)) >> n.astype(np.int64)).astype(np.uint64) if kind == "S32" else high(s, a) >> n
        else:
            pair = high(s, a) << np.uint64(32) | low(s, a)
            value = (
                (np.asarray(pair).view(np.int64) >> n.astype(np.int64)).view(np.uint64) if kind == "S64" else pair >> n
            )
        put(s, a, value)

    return act


def _looked_up(table: int, x, y, z, ones):
    """By bit 4 x + 2 y + z of the table, everywhere."""
    found = ones ^ ones
    for i in range(8):
        if table >> i & 1:
            found = found | (x if i & 4 else x ^ ones) & (y if i & 2 else y ^ ones) & (z if i & 1 else z ^ ones)
    return found


def _lop3(name, operands):
    before = _take_predicates(operands)
    put = _put(operands.pop(0))
    reads = [word(text) for text in operands[:3]]
    table = int(operands[3], 0)
    also = predicate(operands[4]) if operands[4:] else None

    def act(s, a):
        value = _looked_up(table, *(read(s, a) for read in reads), LOW)
        put(s, a, value)
        for p in before:
            _put_predicate(p)(s, a, (value != 0) | also(s, a))

    return act


def _plop3(name, operands):
    first, second = map(_put_predicate, operands[:2])
    reads = [predicate(text) for text in operands[2:5]]
    tables = [int(text, 0) for text in operands[5:7]]

    def act(s, a):
        given = [read(s, a) for read in reads]
        first(s, a, _looked_up(tables[0], *given, np.True_))
        second(s, a, _looked_up(tables[1], *given, np.True_))

    return act


_COMPARE = {
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
}
_COMBINE = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}


def _isetp(name, operands):
    parts = name.split(".")
    compare, combine = _COMPARE[parts[1]], _COMBINE[next(part for part in parts[2:] if part in _COMBINE)]
    unsigned, extends = "U32" in parts, "EX" in parts
    first, second = map(_put_predicate, operands[:2])
    left, right = word(operands[2]), word(operands[3])
    rest = [predicate(text) for text in operands[4:]]
    strict = {"LE": np.less, "GE": np.greater}.get(parts[1], compare)

    def act(s, a):
        x, y = left(s, a) & LOW, right(s, a) & LOW
        if not unsigned:
            x, y = signed(x), signed(y)
        if extends:
            below = rest[1](s, a)
            found = np.where(x == y, below, np.not_equal(x, y) if parts[1] == "NE" else strict(x, y))
        else:
            found = compare(x, y)
        given = rest[0](s, a)
        first(s, a, combine(found, given))
        second(s, a, combine(~found, given))

    return act


def _select(name, operands):
    put, choose = _put(operands[0]), predicate(operands[3])
    if name.startswith("FSEL"):
        left, right, put = number(operands[1]), number(operands[2]), _put_number(operands[0])
        return lambda s, a: put(s, a, np.where(choose(s, a), left(s, a), right(s, a)))
    left, right = word(operands[1]), word(operands[2])
    return lambda s, a: put(s, a, np.where(choose(s, a), left(s, a), right(s, a)))


def _extreme(name, operands):
    put = _put(operands.pop(0))
    least = predicate(operands.pop())
    reads = [word(text) for text in operands]
    convert = (lambda v: v & LOW) if ".U32" in name else signed

    def act(s, a):
        *terms, last = (read(s, a) for read in reads)
        x, y = convert(sum(terms, np.uint64(0))), convert(last)
        put(s, a, np.where(least(s, a), np.minimum(x, y), np.maximum(x, y)).astype(np.uint64))

    return act


def _prmt(name, operands):
    put = _put(operands[0])
    low, selector, high = (word(text) for text in operands[1:])

    def act(s, a):
        pair, choice = high(s, a) << np.uint64(32) | low(s, a), selector(s, a)
        value = np.uint64(0)
        for i in range(4):
            nibble = choice >> np.uint64(4 * i) & np.uint64(15)
            byte = pair >> (np.uint64(8) * (nibble & np.uint64(7))) & np.uint64(255)
            sign = np.where(byte > 127, np.uint64(255), np.uint64(0))
            value = value | np.where(nibble > 7, sign, byte) << np.uint64(8 * i)
        put(s, a, value)

    return act


def _iabs(name, operands):
    put, read = _put(operands[0]), word(operands[1])
    return lambda s, a: put(s, a, np.abs(signed(read(s, a))).astype(np.uint64))


def _popc(name, operands):
    put, read = _put(operands[0]), word(operands[1])
    return lambda s, a: put(s, a, np.array([int(v).bit_count() for v in np.atleast_1d(read(s, a) & LOW)], np.uint64))


def _flo(name, operands):
    put, read = _put(operands[0]), word(operands[1])
    return lambda s, a: put(
        s, a, np.array([(int(v).bit_length() - 1) & 0xFFFFFFFF for v in np.atleast_1d(read(s, a) & LOW)], np.uint64)
    )


def _move(name, operands):
    words = 2 if ".64" in name else 1
    put, read = _put(operands[0], words), word(operands[1], words)
    if ".U8" in name:
        return lambda s, a: put(s, a, read(s, a) & np.uint64(255))
    return lambda s, a: put(s, a, read(s, a))


def _special(name, operands):
    which = operands[1]
    put = _put(operands[0], 2 if name == "CS2R" else 1)
    if which == "SRZ":
        return lambda s, a: put(s, a, np.uint64(0))
    return lambda s, a: put(s, a, s.special[which][a])


def _p2r(name, operands):
    put, kept, mask = _put(operands[0]), word(operands[2]), int(operands[3], 0)

    def act(s, a):
        bits = sum(s.predicates["P"][i][a].astype(np.uint64) << np.uint64(i) for i in range(7) if mask >> i & 1)
        put(s, a, kept(s, a) & np.uint64(~mask & 0xFFFFFFFF) | bits)

    return act


def _r2p(name, operands):
    read, mask = word(operands[1]), int(operands[2], 0)

    def act(s, a):
        bits = read(s, a)
        for i in range(7):
            if mask >> i & 1:
                s.predicates["P"][i][a] = bits >> np.uint64(i) & np.uint64(1)

    return act


# --- floating point ---------------------------------------------------------------------------------------------------

_libm = ctypes.CDLL("libm.so.6")
_libm.fma.restype, _libm.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
_libm.fmaf.restype, _libm.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3


def _fused(double: bool, *given):
    function, kind = (_libm.fma, np.float64) if double else (_libm.fmaf, np.float32)
    return np.array([function(*map(float, each)) for each in np.broadcast(*given)], kind)


def _arithmetic(name, operands):
    double, operation = name.startswith("D"), name[1:4]
    put = _put_number(operands[0], double)
    reads = [number(text, double) for text in operands[1:]]
    flushes = ".FTZ" in name
    function = {"ADD": np.add, "MUL": np.multiply, "FMA": lambda *given: _fused(double, *given)}[operation]
    saturates = ".SAT" in name
    if saturates:
        raise Unknown(name)

    def flushed(v):
        return np.where(np.abs(v) < np.float32(2.0**-126), np.copysign(np.float32(0), v), v) if flushes else v

    return lambda s, a: put(s, a, flushed(function(*(flushed(read(s, a)) for read in reads))))


def _compare_numbers(name, operands):
    parts = name.split(".")
    double, kind, combine = name.startswith("D"), parts[1], _COMBINE[parts[-1]]
    first, second = map(_put_predicate, operands[:2])
    left, right = number(operands[2], double), number(operands[3], double)
    also = predicate(operands[4])

    def act(s, a):
        x, y = np.broadcast_arrays(left(s, a), right(s, a))
        unordered = np.isnan(x) | np.isnan(y)
        if kind == "NAN":
            found = unordered
        elif kind == "NUM":
            found = ~unordered
        elif kind.endswith("U"):
            found = _COMPARE[kind[:-1]](x, y) | unordered
        else:
            found = _COMPARE[kind](x, y) & ~unordered
        given = also(s, a)
        first(s, a, combine(found, given))
        second(s, a, combine(~found, given))

    return act


def _least_number(name, operands):
    put, left, right, least = _put_number(operands[0]), number(operands[1]), number(operands[2]), predicate(operands[3])
    lower, upper = (np.minimum, np.maximum) if ".NAN" in name else (np.fmin, np.fmax)

    def act(s, a):
        x, y = left(s, a), right(s, a)
        put(s, a, np.where(least(s, a), lower(x, y), upper(x, y)))

    return act


def _needs_care(name, operands):
    """FCHK: whether a division is of numbers for which its fast path is not right."""
    put = _put_predicate(operands[0])
    left, right = number(operands[1]), number(operands[2])

    def act(s, a):
        x, y = np.broadcast_arrays(left(s, a), right(s, a))
        of_x, of_y = ((np.ascontiguousarray(v).view(np.uint32) >> 23 & 255).astype(np.int64) for v in (x, y))
        usual = (of_x > 24) & (of_x < 255) & (of_y > 0) & (of_y < 253) & (abs(of_x - of_y) < 125)
        put(s, a, ~usual)

    return act


def _approximate(name, operands):
    kind = name.split(".")[1]
    function = {"RCP": lambda v: 1 / v, "RSQ": lambda v: 1 / np.sqrt(v)}[kind[:3]]
    if kind.endswith("64H"):  # of the high word of a number
        put, read = _put(operands[0]), word(operands[1])

        def act(s, a):
            value = np.atleast_1d(read(s, a) << np.uint64(32)).view(np.float64)
            put(s, a, np.atleast_1d(function(value)).view(np.uint64) >> np.uint64(32))

        return act
    put, read = _put_number(operands[0]), number(operands[1])
    return lambda s, a: put(s, a, function(read(s, a)).astype(np.float32))


def _float_to_float(name, operands):
    _, to, source = (part for part in name.split(".") if part not in ("FTZ", "RM", "RP", "RZ"))
    put, read = _put_number(operands[0], to == "F64"), number(operands[1], source == "F64")
    return lambda s, a: put(s, a, read(s, a))


def _packed(name, operands):
    put, high, low = _put(operands[0]), number(operands[1]), number(operands[2])
    bfloat, clamps = "BF16" in name, "RELU" in name

    def bits(values):
        values = np.atleast_1d(values).astype(np.float32)
        if clamps:
            values = np.where(values > 0, values, np.where(np.isnan(values), values, np.float32(0)))
        if not bfloat:
            return np.where(np.isnan(values), np.uint64(0x7FFF), values.astype(np.float16).view(np.uint16))
        word = values.view(np.uint32).astype(np.uint64)
        rounded = (word + np.uint64(0x7FFF) + (word >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
        return np.where(np.isnan(values), np.uint64(0x7FFF), rounded)

    def act(s, a):
        upper, lower = (bits(read(s, a)).astype(np.uint64) for read in (high, low))
        put(s, a, upper << np.uint64(16) | lower)

    return act


def _half_to_float(name, operands):
    name, _, which = operands[2].partition(".")
    put, read, shift = _put_number(operands[0]), word(name), np.uint64(16 if which == "H1_H1" else 0)
    return lambda s, a: put(s, a, np.atleast_1d(read(s, a) >> shift).astype(np.uint16).view(np.float16))


def _two_halves(name, operands):
    """A constant, in disguise."""
    if [text.lstrip("-") for text in operands[1:3]] != ["RZ", "RZ"]:
        raise Unknown(name)
    high, low = (int(np.float16(text.replace("QNAN", "nan")).view(np.uint16)) for text in operands[3:])
    put, value = _put(operands[0]), np.uint64(high << 16 | low)
    return lambda s, a: put(s, a, value)


def _integer_to_float(name, operands):
    parts = name.split(".")
    wide, double, unsigned = bool({"S64", "U64"} & set(parts)), "F64" in parts, bool({"U32", "U64"} & set(parts))
    put, read = _put_number(operands[0], double), word(operands[1], 2 if wide else 1)
    up = "RP" in parts

    def act(s, a):
        value = np.atleast_1d(read(s, a))
        value = value if unsigned else signed(value, 64 if wide else 32)
        found = value.astype(np.float64 if double else np.float32)
        if up:  # of a divisor
            below = found.astype(np.float64) < value.astype(np.float64)
            found = np.where(below, np.nextafter(found, found.dtype.type(np.inf)), found)
        put(s, a, found)

    return act


def _float_to_integer(name, operands):
    wide = "U64" in name
    put, read = _put(operands[0], 2 if wide else 1), number(operands[1])
    return lambda s, a: put(
        s, a, np.clip(read(s, a).astype(np.float64), 0, 2.0**63 if wide else 2.0**32 - 1).astype(np.uint64)
    )


# --- memory -----------------------------------------------------------------------------------------------------------


def bytes_of(name: str) -> int:
    found = re.search(r"\.([US]?)(8|16|64|128)(?:\.|$)", name)
    return int(found[2]) // 8 if found else 4


def address(text: str) -> Read:
    """What is inside the last brackets."""
    inside = re.search(r"\[([^\[\]]*)\]$", text)[1]
    terms = []
    for part in re.findall(r"-?[^+\-]+", inside):
        name, _, how = part.partition(".")
        if how.startswith("X"):
            scale, read_ = np.uint64(int(how[1:])), word(name)
            terms.append(lambda s, a, read_=read_, scale=scale: read_(s, a) * scale)
        elif re.match(r"-?0x", name):
            value = np.uint64(int(name, 0) & 0xFFFFFFFFFFFFFFFF)
            terms.append(lambda s, a, value=value: value)
        else:
            wide = how == "64" or (name.startswith("UR") and ".64" in inside and name != "URZ")
            terms.append(word(name, 2 if wide else 1))

    def total(s: Registers, a: Lanes) -> np.ndarray:
        with np.errstate(over="ignore"):
            value = sum((term(s, a) for term in terms), np.uint64(0))
        return np.broadcast_to(value, _count(s, a))

    return total


def _count(s: Registers, a: Lanes) -> tuple[int]:
    return (s.threads if isinstance(a, slice) else len(a),)


def words_of(text: str, size: int) -> Read:
    """As bytes, what is stored."""
    file, index = register(text)

    def read(s, a):
        count = -(-size // 4)
        if index is None:
            return np.zeros((*_count(s, a), size), np.uint8)
        found = np.ascontiguousarray(s.words[file][index : index + count][:, a].T)
        return found.view(np.uint8)[:, :size]

    return read


def put_words(text: str, name: str):
    """Of bytes that were loaded."""
    size = bytes_of(name)
    file, index = register(text)

    def put(s, a, loaded):
        if index is None:
            return
        if size < 4:
            values = loaded.view(np.uint8 if size == 1 else np.uint16)[:, 0].astype(np.uint32)
            if re.search(r"\.S(8|16)", name):
                values = (values ^ np.uint32(1 << 8 * size - 1)) - np.uint32(1 << 8 * size - 1)
            s.words[file][index][a] = values
            return
        words = loaded.view(np.uint32)
        for i in range(size // 4):
            s.words[file][index + i][a] = words[:, i]

    return put


DO = {
    "IADD3": _iadd,
    "VIADD": _iadd,
    "UIADD3": _iadd,
    "IMAD": _imad,
    "UIMAD": _imad,
    "LEA": _lea,
    "ULEA": _lea,
    "SHF": _shift,
    "USHF": _shift,
    "LOP3": _lop3,
    "ULOP3": _lop3,
    "PLOP3": _plop3,
    "UPLOP3": _plop3,
    "ISETP": _isetp,
    "UISETP": _isetp,
    "SEL": _select,
    "USEL": _select,
    "FSEL": _select,
    "VIMNMX": _extreme,
    "VIADDMNMX": _extreme,
    "IMNMX": _extreme,
    "PRMT": _prmt,
    "UPRMT": _prmt,
    "IABS": _iabs,
    "POPC": _popc,
    "UPOPC": _popc,
    "FLO": _flo,
    "MOV": _move,
    "UMOV": _move,
    "LDC": _move,
    "ULDC": _move,
    "R2UR": _move,
    "S2R": _special,
    "S2UR": _special,
    "CS2R": _special,
    "P2R": _p2r,
    "R2P": _r2p,
    "FADD": _arithmetic,
    "FMUL": _arithmetic,
    "FFMA": _arithmetic,
    "DADD": _arithmetic,
    "DMUL": _arithmetic,
    "DFMA": _arithmetic,
    "FSETP": _compare_numbers,
    "DSETP": _compare_numbers,
    "FMNMX": _least_number,
    "FCHK": _needs_care,
    "MUFU": _approximate,
    "F2F": _float_to_float,
    "F2FP": _packed,
    "HADD2": _half_to_float,
    "HFMA2": _two_halves,
    "I2F": _integer_to_float,
    "I2FP": _integer_to_float,
    "F2I": _float_to_integer,
}
"""Instructions that only change registers of the thread itself, by the beginning of their names."""

NOTHING = {"NOP", "LDGDEPBAR", "DEPBAR", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "UCGABAR_ARV", "ENDCOLLECTIVE"}
"""Those that order what is done in order here."""
