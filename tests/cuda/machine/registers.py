"""Registers of many threads, and what instructions read of them and write there."""

import re
from collections.abc import Callable

import numpy as np

LOW = np.uint64(0xFFFFFFFF)
CARRY = np.uint64(1 << 32)
LOCAL = 4096  # bytes of a thread's own memory, below the address 0

PREDICATE = re.compile(r"!?U?P[0-6T]$")
_REGISTER = re.compile(r"(U?R)(\d+|Z)$")
_CONSTANT = re.compile(r"c\[0x0\]\[(?:(U?R(?:\d+|Z))\+?)?(?:0x([0-9a-f]+))?\]$")

COMPARE = {
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
}
COMBINE = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}

Lanes = np.ndarray | slice
Read = Callable[["Registers", Lanes], np.ndarray]
Act = Callable[["Registers", Lanes], None]


class Unknown(Exception):
    """An instruction that is not known here."""


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


# --- operands ---


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


def put_word(text: str, words: int = 1) -> Callable[[Registers, Lanes, np.ndarray], None]:
    file, index = register(text)

    def put(s: Registers, a: Lanes, values: np.ndarray) -> None:
        if index is None:
            return
        for i in range(words):
            s.words[file][index + i][a] = (values >> np.uint64(32 * i)) & LOW

    return put


def put_number(text: str, double: bool = False) -> Callable[[Registers, Lanes, np.ndarray], None]:
    put = put_word(text, 2 if double else 1)
    kind, bits = (np.float64, np.uint64) if double else (np.float32, np.uint32)
    return lambda s, a, values: put(s, a, np.atleast_1d(values).astype(kind).view(bits).astype(np.uint64))


def put_predicate(text: str) -> Callable[[Registers, Lanes, np.ndarray], None]:
    file, index = text[:-1], text[-1]
    if index == "T":
        return lambda s, a, values: None

    def put(s: Registers, a: Lanes, values: np.ndarray) -> None:
        s.predicates[file][int(index)][a] = values

    return put


def take_predicates(operands: list[str]) -> list[str]:
    """Those that an instruction begins to write to, but for its result."""
    found = []
    while operands and PREDICATE.match(operands[0]):
        found.append(operands.pop(0))
    return found
