"""A kernel's translation unit: its headers are in it, and the compiler still names the files' own lines."""

import re

import pytest

from cubn.backends.cuda import source

KERNELS = sorted(path.stem for path in source.folder().glob("*.cu"))


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes files into a folder of kernels of the test's own."""
    monkeypatch.setattr(source, "folder", lambda: tmp_path)
    source.translation_unit.cache_clear()
    yield lambda name, text: (tmp_path / name).write_text(text, encoding="utf-8")
    source.translation_unit.cache_clear()


def lines_of(unit):
    """(file, number, line) as a compiler counts them."""
    file = number = None
    for line in unit.splitlines():
        if marker := re.fullmatch(r'#line (\d+) "(.*)"', line):
            number, file = int(marker[1]), marker[2]
        else:
            yield file, number, line
            number += 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_line_is_there_once_where_the_compiler_says(kernel):
    """But for includes, in whose place the headers are, and their guards."""
    found = [line for line in lines_of(source.translation_unit(kernel)) if line[2]]
    files = {file for file, _, _ in found}
    written, included = [], set()
    for file in files:
        lines = (source.folder() / file).read_text(encoding="utf-8").splitlines()
        included |= {line.split('"')[1] for line in lines if line.startswith('#include "')}
        ours = [line if not line.startswith(('#include "', "#pragma once")) else "" for line in lines]
        written += [(file, number, line) for number, line in enumerate(ours, 1) if line]
    assert sorted(found) == sorted(written)
    assert files == {f"{kernel}.cu", *included}


def test_a_header_comes_before_what_includes_it_and_once(written):
    written("a.cu", '// a\n#include "b.cuh"\n#include "c.cuh"\nint a;\n')
    written("b.cuh", '#pragma once\n#include "c.cuh"\nint b;\n')
    written("c.cuh", "#pragma once\nint c;\n")
    code = [line for line in lines_of(source.translation_unit("a")) if line[2]]
    assert code == [("a.cu", 1, "// a"), ("c.cuh", 2, "int c;"), ("b.cuh", 3, "int b;"), ("a.cu", 4, "int a;")]


def test_an_edited_header_is_another_text(written):
    written("a.cu", '#include "b.cuh"\nint a;\n')
    written("b.cuh", "#pragma once\nint b;\n")
    before = source.translation_unit("a")
    written("b.cuh", "#pragma once\nint c;\n")
    source.translation_unit.cache_clear()  # as in another process
    after = source.translation_unit("a")
    assert "int b;" in before and "int c;" in after and "int b;" not in after
