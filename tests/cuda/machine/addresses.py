"""Where instructions access memory, and how many bytes."""

import re

import numpy as np

from tests.cuda.machine.registers import Lanes, Read, Registers, register, word


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
        return np.broadcast_to(value, count_of(s, a))

    return total


def count_of(s: Registers, a: Lanes) -> tuple[int]:
    return (s.threads if isinstance(a, slice) else len(a),)


def words_of(text: str, size: int) -> Read:
    """As bytes, what is stored."""
    file, index = register(text)

    def read(s, a):
        count = -(-size // 4)
        if index is None:
            return np.zeros((*count_of(s, a), size), np.uint8)
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
