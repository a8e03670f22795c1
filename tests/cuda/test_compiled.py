"""The program that compiles everything: it goes on where it was stopped, and no old log passes for a new one."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cuda import compiled, nvrtc
from tests.cuda.specialisations import Specialisation

ALL = tuple(Specialisation("f", "f", (f"-DI={i}", f"-DCLUSTER={1 + i % 2}")) for i in range(20))
OLD, NEW = 80, 90  # of architectures without and with clusters


@pytest.fixture
def done(monkeypatch):
    """What is compiled, in turn."""
    found = []

    def line_of(specialisation, architecture, cuda):
        found.append((str(specialisation), architecture, cuda))
        said = "spilt" if specialisation == ALL[6] else "fine"
        return f"{compiled.start_of(specialisation)} 32 registers 0 stack 0 spills {said}"

    monkeypatch.setattr(compiled, "specialisations", lambda: ALL)
    monkeypatch.setattr(compiled, "line_of", line_of)
    monkeypatch.setattr(compiled, "source_of", lambda name: "these")
    monkeypatch.setattr(nvrtc, "version", lambda cuda: f"{cuda}.0")
    return found


def column(folder, architecture=NEW, **some):
    with ThreadPoolExecutor(1) as pool:
        return compiled.compile_column(13, architecture, folder, pool, **some)


def test_every_specialisation_has_a_line_and_what_is_wrong_is_counted(tmp_path, done, capsys):
    lines = column(tmp_path)
    assert [line.partition(" ")[0] for line in lines] == list(map(str, ALL))
    assert compiled.recorded(13, NEW, lines)["wrong"] == [lines[6]]
    assert str(ALL[6]) in capsys.readouterr().out
    assert len(column(tmp_path, OLD)) == 10


def test_a_stopped_run_goes_on_where_it_was(tmp_path, done):
    lines = column(tmp_path)
    (log,) = tmp_path.iterdir()
    whole = log.read_text()
    for kept in (0, 3, len(whole) // 2, len(whole) - 2):
        log.write_text(whole[:kept])
        done.clear()
        assert column(tmp_path) == lines
        assert 0 < len(done) <= (len(ALL) - kept * len(ALL) // len(whole) + 1)
    done.clear()
    assert column(tmp_path) == lines
    assert done == []


def test_a_log_of_other_sources_is_not_gone_on_with(tmp_path, done, monkeypatch):
    column(tmp_path)
    done.clear()
    monkeypatch.setattr(compiled, "source_of", lambda name: "others")
    column(tmp_path)
    assert len(done) == len(ALL)


def test_the_digest_is_of_what_came_out_not_of_the_order_in_which_it_did(tmp_path, done):
    lines = column(tmp_path)
    (log,) = tmp_path.iterdir()
    header, *rest = log.read_text().splitlines(keepends=True)
    log.write_text(header + "".join(reversed(rest)))
    assert compiled.recorded(13, NEW, column(tmp_path)) == compiled.recorded(13, NEW, lines)


def test_some_of_a_column_are_no_whole_one(tmp_path, done):
    lines = column(tmp_path, every=4, first=1)
    assert [line.partition(" ")[0] for line in lines] == list(map(str, ALL[1::4]))
    record = compiled.recorded(13, NEW, lines)
    assert (record["kernels"], record["of"]) == (5, 20)
    assert len(column(tmp_path)) == 20
    assert len(done) == 20
