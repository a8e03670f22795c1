"""The kernels' source text: one translation unit from a `.cu` file, its headers put in where they are included."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path

_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)


@functools.cache
def folder() -> Path:
    """Where the kernels are: beside the package in a checkout, inside it where it was installed."""
    package = Path(__file__).parents[2]
    checkout = package.parent / "kernels"
    return checkout if (checkout / "parameters.cuh").exists() else package / "kernels"


@functools.cache
def translation_unit(name: str) -> str:
    """The whole source of kernels/<name>.cu.

    Headers are put in rather than found by the compiler: caches of compiled kernels look at the source only, and an
    edited header must never leave them stale. `#line` keeps the compiler's messages true.
    """
    included: set[str] = set()

    def text_of(file: str) -> str:
        text = (folder() / file).read_text(encoding="utf-8").replace("#pragma once\n", "\n")
        parts = [f'#line 1 "{file}"\n']
        for number, content in enumerate(text.splitlines(), 1):
            match = _INCLUDE.match(content)
            if match and match[1] not in included:
                included.add(match[1])
                parts += [text_of(match[1]), f'#line {number + 1} "{file}"\n']
            else:
                parts.append("\n" if match else content + "\n")
        return "".join(parts)

    return text_of(f"{name}.cu")


def specialised(name: str, options: Iterable[str]) -> str:
    """The translation unit with its `-D` options in the text, which is all there is to know of a kernel then."""
    defines = (option.removeprefix("-D").replace("=", " ", 1) for option in options)
    return "".join(f"#define {define}\n" for define in defines) + translation_unit(name)
