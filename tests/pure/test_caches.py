"""What the operating system says of caches, read."""

import pytest

from cubn.backends.cpu import caches, plan
from cubn.backends.cpu.caches import Cache, last_level


def described(folder, *described):
    """A folder as Linux has it, of caches (level, type, size, processors that share it)."""
    for i, values in enumerate(described):
        (folder / f"index{i}").mkdir()
        for name, value in zip(("level", "type", "size", "shared_cpu_list"), values, strict=True):
            (folder / f"index{i}" / name).write_text(f"{value}\n")
    return folder


FIRST = (1, "Data", "32K", "0"), (1, "Instruction", "32K", "0"), (2, "Unified", "512K", "0")


@pytest.mark.parametrize(
    ("last", "cache"),
    [
        ((3, "Unified", "32768K", "0-1"), Cache(32 << 20, 2)),
        ((3, "Unified", "105M", "0-3,96,98-99"), Cache(105 << 20, 7)),
        ((4, "Unified", "1G", "0"), Cache(1 << 30, 1)),
    ],
)
def test_the_cache_before_memory_is_found(tmp_path, last, cache):
    assert last_level(described(tmp_path, last, *FIRST)) == cache


def test_without_a_third_level_the_second_is_the_last(tmp_path):
    assert last_level(described(tmp_path, *FIRST)) == Cache(512 << 10, 1)


@pytest.mark.parametrize("size", ["", "many", "12Q", "K"])
def test_what_cannot_be_read_is_as_good_as_nothing(tmp_path, size):
    assert last_level(described(tmp_path, (3, "Unified", size, "0"))) == caches.UNKNOWN


def test_a_system_that_does_not_say_is_no_error(tmp_path):
    assert last_level(tmp_path / "absent") == caches.UNKNOWN


def test_every_cache_that_threads_fill_counts(monkeypatch):
    monkeypatch.setattr(plan, "STREAM_BYTES", 1 << 20)
    monkeypatch.setattr(plan, "SHARING", 4)
    extents = (1, 1 << 20, 1)  # 4 MB
    assert [plan.streams(extents, 4, threads) for threads in (1, 4, 5, 16, 17)] == [True, True, True, True, False]
