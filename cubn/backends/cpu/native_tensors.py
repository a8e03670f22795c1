"""`read`, native code that reads tensors through the C interface that their library offers (DLPack's exchange API).

It is a builtin function of Python (builtin.py). Called with tensors, or None for what is absent, it returns their
layouts as bytes, equal for tensors of equal layouts and remainders of the address, and then their addresses; None where
one of them is no plain tensor, has too many axes, or the library would rather not say.
"""

from __future__ import annotations

from cubn.backends.cpu.native import call, on_stack
from cubn.backends.cpu.simd import I64, Value, get, instruction, put

TENSORS, AXES = 10, 8
"""At most."""

DESCRIBE, CLEAR, NEW_BYTES, NEW_TUPLE, NEW_INTEGER, KEEP, NONE = (8 * i for i in range(7))
"""Of what `read` is given first, behind the header of a bytes object: functions of the library and of Python."""

PROGRAM = bytes.__basicsize__ - 1
ITEMS = tuple.__basicsize__

DATA, DEVICE, AXES_AND_DTYPE, SHAPE, STRIDES, OFFSET, DLTENSOR = 0, 8, 16, 24, 32, 40, 48
"""Where a DLTensor has its fields, and its size."""

ALIGNMENT = 16

new_layouts = instruction(I64)(on_stack(8 * TENSORS * (3 + 2 * AXES), 16))
new_tensor = instruction(I64)(on_stack(DLTENSOR, 16))
new_addresses = instruction(I64)(on_stack(8 * TENSORS, 16))


@instruction(I64)
def low_word(word: Value) -> Value:
    """Of two int32, the first."""
    b = word.b
    return Value(b, b.and_(word.v, I64(0xFFFFFFFF)))


def read(words_object, arguments, count):  # type: ignore[no-untyped-def]
    """Layouts and addresses of `count` Python objects."""
    words, layouts, addresses = words_object + PROGRAM, new_layouts(arguments), new_addresses(arguments)
    tensor, none, at, known = new_tensor(arguments), get(words + NONE), layouts, count
    if count > TENSORS:
        known = 0
    for i in range(known):
        of, address = get(arguments + 8 * i), 0
        put(at, 0)
        if of != none and known:
            failed, axes = low_word(call(get(words + DESCRIBE), of, tensor)), 0
            if failed:
                call(get(words + CLEAR), 0, 0)
            else:
                axes = low_word(get(tensor + AXES_AND_DTYPE))
                address = get(tensor + DATA) + get(tensor + OFFSET)
            if failed or axes > AXES or address == 0:
                known, axes = 0, 0
            put(at, get(tensor + AXES_AND_DTYPE))
            put(at + 8, get(tensor + DEVICE))
            put(at + 16, address % ALIGNMENT)
            at += 16
            for axis in range(axes):
                put(at + 8, get(get(tensor + SHAPE) + 8 * axis))
                put(at + 16, get(get(tensor + STRIDES) + 8 * axis))
                at += 16
        at += 8
        put(addresses + 8 * i, address)
    if known == 0:
        call(get(words + KEEP), none, 0)
        return none
    of_all = call(get(words + NEW_BYTES), layouts, at - layouts)
    result = call(get(words + NEW_TUPLE), count + 1, 0)
    put(result + ITEMS, of_all)
    for i in range(count):
        put(result + ITEMS + 8 + 8 * i, call(get(words + NEW_INTEGER), get(addresses + 8 * i), 0))
    return result
