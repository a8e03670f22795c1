"""A pickle read as data: no name in it is looked up, nothing is imported, nothing is called.

What a pickle would make by a call becomes an `Opaque`, which says what was to be called, with what. Those who know a
call give its meaning in a table of functions of their own; see `torch_objects`.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cubn.health.files.source import MOST, Stream
from cubn.health.files.unreadable import UnreadableFile

MOST_STEPS = 4_000_000
"""Of a machine, each for one opcode or one element moved: a hundred thousand tensors, in a few seconds."""

MOST_OF_INTEGER = 255
"""Bytes; generators of random numbers have states of some hundred bits."""

ATTACKS = frozenset(
    {"os", "posix", "nt", "subprocess", "sys", "shutil", "runpy", "pty", "commands", "code", "ctypes", "importlib"}
    | {"pickle", "_pickle", "socket", "asyncio", "multiprocessing", "webbrowser", "urllib", "http", "requests"}
)
"""Modules that no checkpoint calls. Calling is impossible here; a file that asks for it is not to be trusted at all."""

ATTACKS_OF_BUILTINS = frozenset(
    {"eval", "exec", "execfile", "compile", "open", "__import__", "input", "breakpoint", "exit", "quit"}
)


@dataclass(frozen=True)
class Global:
    """A name in a module: only the name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Opaque:
    """What a call would have made, and the attributes it would have been given."""

    __slots__ = ("arguments", "made_by", "state")

    def __init__(self, made_by: Global | None, arguments: tuple[Any, ...] = ()) -> None:
        self.made_by = made_by
        self.arguments = arguments
        self.state: Any = None


Calls = Mapping[str, Callable[..., Any]]
"""By the name of what is called: what it gives for its arguments, as data."""

_MARK = object()
_PUSHED: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": list,
}
_COUNTED = {  # bytes of the length that stands before the text
    "SHORT_BINUNICODE": 1,
    "BINUNICODE": 4,
    "BINUNICODE8": 8,
    "SHORT_BINBYTES": 1,
    "BINBYTES": 4,
    "BINBYTES8": 8,
    "BYTEARRAY8": 8,
    "SHORT_BINSTRING": 1,
    "BINSTRING": 4,
    "LONG1": 1,
    "LONG4": 4,
}
_UNSIGNED = {"BININT1": 1, "BININT2": 2}


def load(stream: Stream, calls: Calls, persistent: Callable[[Any], Any]) -> Any:
    """The next pickle of a stream; `persistent` gives what a persistent id stands for."""
    try:
        return _Machine(stream, calls, persistent).run()
    except UnreadableFile:
        raise
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, struct.error) as error:
        raise UnreadableFile("its pickle is damaged") from error


class _Machine:
    """The stack, the memo, and one method for each kind of opcode."""

    def __init__(self, stream: Stream, calls: Calls, persistent: Callable[[Any], Any]) -> None:
        self.stream = stream
        self.calls = calls
        self.persistent = persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.steps = 0
        self.begin = stream.offset

    def run(self) -> Any:
        while True:
            self.spend(1)
            code = self.stream.read(1)
            if code == b".":
                return self.stack.pop()
            step = _STEPS.get(code)
            if step is None:
                raise UnreadableFile("its pickle has an opcode that does not exist: it is damaged")
            step(self)

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MOST_STEPS or self.stream.offset - self.begin > MOST:
            raise UnreadableFile(
                f"its pickle takes more than {MOST_STEPS} steps or {MOST} bytes, as no checkpoint does"
            )

    def push(self, make: Callable[[], Any]) -> None:
        self.stack.append(make())

    def unsigned(self, length: int) -> None:
        self.stack.append(int.from_bytes(self.stream.read(length), "little"))

    def refuse(self, name: str) -> None:
        raise UnreadableFile(f"its pickle has {name}, which no checkpoint needs")

    def counted(self, name: str) -> None:
        length = int.from_bytes(self.stream.read(_COUNTED[name]), "little")
        if "LONG" in name and length > MOST_OF_INTEGER:
            raise UnreadableFile(f"its pickle has an integer of more than {MOST_OF_INTEGER} bytes")
        data = self.stream.read(length)
        if "LONG" in name:
            self.stack.append(int.from_bytes(data, "little", signed=True))
        elif "BYTE" in name:
            self.stack.append(data)
        else:
            self.stack.append(data.decode("utf-8", "replace"))

    def to_mark(self) -> list[Any]:
        """What was pushed since the last mark."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise UnreadableFile("its pickle is damaged")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        self.spend(len(items))
        return items

    # numbers and text

    def op_proto(self) -> None:
        self.stream.skip(1)

    def op_frame(self) -> None:
        self.stream.skip(8)

    def op_binint(self) -> None:
        self.stack.append(int.from_bytes(self.stream.read(4), "little", signed=True))

    def op_int(self) -> None:
        text = self.stream.line()
        self.stack.append(text == b"01" if text in (b"00", b"01") else _whole(text))

    def op_long(self) -> None:
        self.stack.append(_whole(self.stream.line().rstrip(b"L")))

    def op_float(self) -> None:
        self.stack.append(float(self.stream.line()))

    def op_binfloat(self) -> None:
        self.stack.append(struct.unpack(">d", self.stream.read(8))[0])

    def op_string(self) -> None:
        self.stack.append(self.stream.line().decode("latin-1")[1:-1])

    def op_unicode(self) -> None:
        self.stack.append(self.stream.line().decode("utf-8", "replace"))

    # containers

    def op_mark(self) -> None:
        self.stack.append(_MARK)

    def op_pop(self) -> None:
        self.stack.pop()

    def op_pop_mark(self) -> None:
        self.to_mark()

    def op_dup(self) -> None:
        self.stack.append(self.stack[-1])

    def op_tuple(self) -> None:
        self.stack.append(tuple(self.to_mark()))

    def op_tuple1(self) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def op_tuple2(self) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def op_tuple3(self) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def op_list(self) -> None:
        self.stack.append(self.to_mark())

    op_frozenset = op_list

    def op_dict(self) -> None:
        items, made = self.to_mark(), dict[str | int, Any]()
        self.stack.append(made)
        self.put(made, items)

    def op_append(self) -> None:
        item = self.stack.pop()
        self.extend(self.stack[-1], [item])

    def op_appends(self) -> None:
        items = self.to_mark()
        self.extend(self.stack[-1], items)

    op_additems = op_appends

    def op_setitem(self) -> None:
        key, value = self.stack[-2:]
        del self.stack[-2:]
        self.put(self.stack[-1], [key, value])

    def op_setitems(self) -> None:
        items = self.to_mark()
        self.put(self.stack[-1], items)

    def extend(self, to: Any, items: list[Any]) -> None:
        if isinstance(to, list):
            to.extend(items)

    def put(self, to: Any, items: list[Any]) -> None:
        """Keys and values by turns; other keys than names and numbers are left out: hashing may recurse."""
        if not isinstance(to, dict):
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str | int):
                to[key] = value

    # the memo

    def op_get(self) -> None:
        self.stack.append(self.memo[_whole(self.stream.line())])

    def op_binget(self) -> None:
        self.stack.append(self.memo[self.stream.read(1)[0]])

    def op_long_binget(self) -> None:
        self.stack.append(self.memo[int.from_bytes(self.stream.read(4), "little")])

    def op_put(self) -> None:
        self.memo[_whole(self.stream.line())] = self.stack[-1]

    def op_binput(self) -> None:
        self.memo[self.stream.read(1)[0]] = self.stack[-1]

    def op_long_binput(self) -> None:
        self.memo[int.from_bytes(self.stream.read(4), "little")] = self.stack[-1]

    def op_memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    # names, and what would be calls

    def op_global(self) -> None:
        module, name = (self.stream.line().decode("utf-8", "replace") for _ in range(2))
        self.named(module, name)

    def op_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise UnreadableFile("its pickle names a function by what is no text")
        self.named(module, name)

    def named(self, module: str, name: str) -> None:
        top, first = module.partition(".")[0], name.partition(".")[0]
        if top in ATTACKS or (top in ("builtins", "__builtin__") and first in ATTACKS_OF_BUILTINS):
            whole = f"{module}.{name}"[:80]
            raise UnreadableFile(f"its pickle asks to call {whole!r}; nothing was run. Do not load it otherwise")
        self.stack.append(Global(module, name))

    def op_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.made(function, arguments)

    def op_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        self.made(kind, arguments)

    def op_newobj_ex(self) -> None:
        _, arguments, kind = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.made(kind, arguments)

    def op_inst(self) -> None:
        module, name = (self.stream.line().decode("utf-8", "replace") for _ in range(2))
        arguments = tuple(self.to_mark())
        self.named(module, name)
        self.made(self.stack.pop(), arguments)

    def op_obj(self) -> None:
        kind, *arguments = self.to_mark()
        self.made(kind, tuple(arguments))

    def made(self, function: Any, arguments: Any) -> None:
        """What takes the place of a call's result."""
        arguments = arguments if isinstance(arguments, tuple) else ()
        if not isinstance(function, Global):
            self.stack.append(Opaque(None))
            return
        self.spend(sum(len(argument) for argument in arguments if isinstance(argument, list | tuple)))
        call = self.calls.get(str(function))
        self.stack.append(call(*arguments) if call else Opaque(function, arguments))

    def op_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Opaque):
            self.stack[-1].state = state

    def op_persid(self) -> None:
        self.stack.append(self.persistent(self.stream.line().decode("utf-8", "replace")))

    def op_binpersid(self) -> None:
        self.stack.append(self.persistent(self.stack.pop()))


def _step(name: str) -> Callable[[_Machine], None]:
    """What an opcode does."""
    if name in _PUSHED:
        return lambda machine: machine.push(_PUSHED[name])
    if name in _COUNTED:
        return lambda machine: machine.counted(name)
    if name in _UNSIGNED:
        return lambda machine: machine.unsigned(_UNSIGNED[name])
    return getattr(_Machine, f"op_{name.lower()}", lambda machine: machine.refuse(name))


_STEPS = {opcode.code.encode("latin-1"): _step(opcode.name) for opcode in pickletools.opcodes}


def _whole(text: bytes) -> int:
    """A number in decimals."""
    if len(text) > MOST_OF_INTEGER:
        raise UnreadableFile(f"its pickle has an integer of more than {MOST_OF_INTEGER} digits")
    return int(text)
