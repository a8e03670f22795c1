"""What is kept is found once, and never that of other sources."""

import pytest

from tests.kept import kept


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = tmp_path / "source.py"
    path.write_text("first")
    return path


def test_it_is_found_once(source):
    assert kept("name", [source], lambda: [1, "a"]) == [1, "a"]
    assert kept("name", [source], lambda: pytest.fail("found again")) == [1, "a"]


def test_another_source_or_name_is_found_anew(source):
    assert kept("name", [source], lambda: 1) == 1
    assert kept("other", [source], lambda: 2) == 2
    source.write_text("second")
    assert kept("name", [source], lambda: 3) == 3


def test_what_is_not_found_is_not_kept(source):
    with pytest.raises(ZeroDivisionError):
        kept("name", [source], lambda: 1 // 0)
    assert kept("name", [source], lambda: 1) == 1
