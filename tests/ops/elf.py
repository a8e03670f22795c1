"""The names an ELF object file leaves to be found elsewhere."""

import struct

SECTION, SYMBOL = struct.Struct("<IIQQQQIIQQ"), struct.Struct("<IBBHQQ")
SYMBOL_TABLE = 2


def undefined(code):
    """Symbols of a 64-bit little-endian object file that it does not define."""
    assert code[:6] == b"\x7fELF\x02\x01"
    (start,), (size, count) = struct.unpack_from("<Q", code, 0x28), struct.unpack_from("<HH", code, 0x3A)
    sections = [SECTION.unpack_from(code, start + i * size) for i in range(count)]
    found = set()
    for _, kind, _, _, offset, length, names, *_ in sections:
        if kind != SYMBOL_TABLE:
            continue
        text = sections[names][4]
        for name, _, _, section, _, _ in SYMBOL.iter_unpack(code[offset : offset + length]):
            if name and not section:
                found.add(code[text + name : code.index(b"\0", text + name)].decode())
    return found
