"""Instructions on integers, predicates and bits: each becomes a function of the registers and of the threads in it."""

from collections.abc import Callable

import numpy as np

from tests.cuda.machine.registers import (
    CARRY,
    COMBINE,
    COMPARE,
    LOW,
    PREDICATE,
    Act,
    Lanes,
    Read,
    Registers,
    number,
    predicate,
    put_number,
    put_predicate,
    put_word,
    signed,
    take_predicates,
    word,
)


def _sum(name: str, operands: list[str], terms: Callable[[list[str]], tuple[Read, int]]):
    """Of a result, predicates of its carries, terms, and predicates that are carried in."""
    put = put_word(operands.pop(0))
    carries = [put_predicate(p) for p in take_predicates(operands)]
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
        reads = [word(text) for text in given[:3] if not PREDICATE.match(text)]
        return lambda s, a: sum((read(s, a) for read in reads), np.uint64(0)), len(reads)

    return _sum(name, operands, terms)


def _imad(name, operands):
    parts = name.split(".")
    wide, high, unsigned = "WIDE" in parts, "HI" in parts, "U32" in parts
    put = put_word(operands.pop(0), 2 if wide else 1)
    carry = [put_predicate(p) for p in take_predicates(operands)]
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
    put = put_word(operands[0])
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
    before = take_predicates(operands)
    put = put_word(operands.pop(0))
    reads = [word(text) for text in operands[:3]]
    table = int(operands[3], 0)
    also = predicate(operands[4]) if operands[4:] else None

    def act(s, a):
        value = _looked_up(table, *(read(s, a) for read in reads), LOW)
        put(s, a, value)
        for p in before:
            put_predicate(p)(s, a, (value != 0) | also(s, a))

    return act


def _plop3(name, operands):
    first, second = map(put_predicate, operands[:2])
    reads = [predicate(text) for text in operands[2:5]]
    tables = [int(text, 0) for text in operands[5:7]]

    def act(s, a):
        given = [read(s, a) for read in reads]
        first(s, a, _looked_up(tables[0], *given, np.True_))
        second(s, a, _looked_up(tables[1], *given, np.True_))

    return act


def _isetp(name, operands):
    parts = name.split(".")
    compare, combine = COMPARE[parts[1]], COMBINE[next(part for part in parts[2:] if part in COMBINE)]
    unsigned, extends = "U32" in parts, "EX" in parts
    first, second = map(put_predicate, operands[:2])
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
    put, choose = put_word(operands[0]), predicate(operands[3])
    if name.startswith("FSEL"):
        left, right, put = number(operands[1]), number(operands[2]), put_number(operands[0])
        return lambda s, a: put(s, a, np.where(choose(s, a), left(s, a), right(s, a)))
    left, right = word(operands[1]), word(operands[2])
    return lambda s, a: put(s, a, np.where(choose(s, a), left(s, a), right(s, a)))


def _extreme(name, operands):
    put = put_word(operands.pop(0))
    least = predicate(operands.pop())
    reads = [word(text) for text in operands]
    convert = (lambda v: v & LOW) if ".U32" in name else signed

    def act(s, a):
        *terms, last = (read(s, a) for read in reads)
        x, y = convert(sum(terms, np.uint64(0))), convert(last)
        put(s, a, np.where(least(s, a), np.minimum(x, y), np.maximum(x, y)).astype(np.uint64))

    return act


def _prmt(name, operands):
    put = put_word(operands[0])
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
    put, read = put_word(operands[0]), word(operands[1])
    return lambda s, a: put(s, a, np.abs(signed(read(s, a))).astype(np.uint64))


def _popc(name, operands):
    put, read = put_word(operands[0]), word(operands[1])
    return lambda s, a: put(s, a, np.array([int(v).bit_count() for v in np.atleast_1d(read(s, a) & LOW)], np.uint64))


def _flo(name, operands):
    put, read = put_word(operands[0]), word(operands[1])
    return lambda s, a: put(
        s, a, np.array([(int(v).bit_length() - 1) & 0xFFFFFFFF for v in np.atleast_1d(read(s, a) & LOW)], np.uint64)
    )


def _move(name, operands):
    words = 2 if ".64" in name else 1
    put, read = put_word(operands[0], words), word(operands[1], words)
    if ".U8" in name:
        return lambda s, a: put(s, a, read(s, a) & np.uint64(255))
    return lambda s, a: put(s, a, read(s, a))


def _special(name, operands):
    which = operands[1]
    put = put_word(operands[0], 2 if name == "CS2R" else 1)
    if which == "SRZ":
        return lambda s, a: put(s, a, np.uint64(0))
    return lambda s, a: put(s, a, s.special[which][a])


def _p2r(name, operands):
    put, kept, mask = put_word(operands[0]), word(operands[2]), int(operands[3], 0)

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


INTEGERS: dict[str, Callable[[str, list[str]], Act]] = {
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
}
"""By the beginning of their names."""
