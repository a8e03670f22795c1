"""Reports: sorted, as a table, in colour, in JSON, in HTML; whatever layers are called."""

import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from cubn.health import as_html, as_text, wording
from cubn.health.diagnose import examine
from cubn.health.finding import Finding
from cubn.health.layer import Layer
from cubn.health.report import Report
from tests.health.healthy import healthy

LAYERS = [healthy(), Layer("other", 300), Layer("new", 2)]
FINDINGS = [
    Finding(
        "dead", "info", "new", "it is dead", (0, 1), {"running_var": [0.0, 1e-9], "eps": 1e-5}, "zeros", "remove()"
    ),
    Finding("eps", "warning", "other", "eps is large", (), {"eps": 1.0}, "a mistake", "bn.eps = 1e-5"),
    Finding(
        "non-finite", "error", "block.bn", "it is NaN", (3,), {"running_mean": [math.nan]}, "an overflow", "mend(bn)"
    ),
    Finding("dead", "info", "other", "it is dead", tuple(range(0, 300, 2)), {"running_var": [0.0] * 150}, "zeros", "x"),
]
REPORT = Report(LAYERS, FINDINGS)

TABLE = """\
1 error, 1 warning, 2 infos in 3 batch norms

severity  layer     channels                             rule        what
error     block.bn  3                                    non-finite  it is NaN (running_mean nan)
warning   other                                          eps         eps is large (eps 1)
info      new       all 2                                dead        it is dead (running_var [0, 1e-09], eps 1e-05)
info      other     0, 2, 4, 6, 8, 10, … (150 in all)  dead        it is dead (running_var [0, 0, 0, 0, …])

non-finite:
  usually an overflow
  remedy: mend(bn)

eps:
  usually a mistake
  remedy: bn.eps = 1e-5

dead:
  usually zeros
  remedy: remove()
  remedy: x"""


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """Pages are made in milliseconds without them."""
    monkeypatch.setattr(as_html, "find_spec", lambda name: None)


def test_the_worst_comes_first():
    assert [finding.severity for finding in REPORT.findings] == ["error", "warning", "info", "info"]
    assert [finding.layer for finding in REPORT.findings if finding.rule == "dead"] == ["new", "other"]
    assert (REPORT.worst, Report(LAYERS, []).worst) == ("error", None)
    assert REPORT.of("warning") == [FINDINGS[1]]
    with pytest.raises(ValueError, match=r"^of: severity must be 'error' or 'warning' or 'info'; got 'fatal'"):
        REPORT.of("fatal")
    assert repr(REPORT) == "Report(layers=3, error=1, warning=1, info=2)"


def test_the_table():
    lines = [" ".join(line.split()) for line in str(REPORT).splitlines()]
    assert lines == [" ".join(line.split()) for line in TABLE.splitlines()]
    header, *rows = str(REPORT).splitlines()[2:7]
    for row in rows:
        for heading in ("layer", "rule"):
            assert row[header.index(heading) - 1] == " " and row[header.index(heading)] != " "


def test_there_is_little_to_say_of_nothing():
    assert str(Report(LAYERS, [])) == "nothing found in 3 batch norms"
    assert str(Report(LAYERS[:1], [])) == "nothing found in 1 batch norm"
    assert str(Report([], [])) == "nothing found in no batch norms"


@pytest.mark.parametrize(
    ("channels", "features", "text"),
    [
        ((), 4, ""),
        ((0,), 1, "0"),
        ((0, 1, 2), 3, "all 3"),
        ((0, 1, 2), 4, "0-2"),
        ((1, 3, 4, 7), 9, "1, 3-4, 7"),
        (tuple(range(0, 14, 2)), 99, "0, 2, 4, 6, 8, 10, … (7 in all)"),
    ],
)
def test_channels_are_runs_and_not_too_many(channels, features, text):
    assert wording.channels(Finding("r", "info", "l", "m", channels), features) == text


# --- the terminal ---------------------------------------------------------------------------------------------------


def on_a_terminal(monkeypatch, columns=200, **environment):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for name, value in ({"COLUMNS": str(columns), "TERM": "xterm-256color"} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_a_terminal_gets_colours(monkeypatch):
    pytest.importorskip("rich")
    on_a_terminal(monkeypatch)
    text = str(REPORT)
    assert "\x1b[1;31merror" in text and "\x1b[33mwarning" in text and "mend(bn)" in text
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in str(REPORT)


def test_without_rich_a_terminal_gets_the_plain_table(monkeypatch):
    on_a_terminal(monkeypatch)
    monkeypatch.setattr(as_text, "find_spec", lambda name: None)
    assert str(REPORT) == as_text.plain(REPORT.layers, REPORT.findings)


@pytest.mark.parametrize("columns", [20, 79, 80, 200])
def test_no_terminal_is_too_narrow_for_names_and_remedies(columns, monkeypatch):
    pytest.importorskip("rich")
    on_a_terminal(monkeypatch, columns)
    name = "features.denseblock12.layer"
    report = examine([replace(healthy(running_mean={3: math.nan}), name=name)])
    shown = re.sub(r"\x1b\[[0-9;]*m", "", str(report))
    lines = shown.splitlines()
    assert max(map(len, lines)) <= columns
    (finding,) = report.findings
    assert "…" not in shown and finding.remedy.replace(" ", "") in "".join(shown.split())
    if columns >= 80:  # a table: the name is in its column, however many lines that takes
        begin, end = lines[1].index("layer"), lines[1].index("channels")
        lines = [line[begin:end] for line in lines[2:] if line.startswith(("error", "  "))]
    assert name in "".join("".join(lines).split())


# --- JSON -----------------------------------------------------------------------------------------------------------


def test_json_has_everything_and_no_nan():
    def refuse(word):
        raise AssertionError(word)

    read = json.loads(REPORT.to_json(), parse_constant=refuse)
    assert (read["schema"], read["worst"], read["counts"]) == (1, "error", {"error": 1, "warning": 1, "info": 2})
    assert read["layers"][0] == {
        "name": "block.bn",
        "num_features": 16,
        "eps": 1e-5,
        "momentum": 0.1,
        "running_variance": "unbiased",
        "dtypes": dict.fromkeys(("gamma", "beta", "running_mean", "running_var"), "float32"),
        "tracked": [500, 500],
        "skipped": [0, 0],
    }
    assert read["findings"][0] == {
        "rule": "non-finite",
        "severity": "error",
        "layer": "block.bn",
        "message": "it is NaN",
        "channels": [3],
        "evidence": {"running_mean": ["nan"]},
        "cause": "an overflow",
        "remedy": "mend(bn)",
    }
    assert json.loads(Report([], []).to_json())["worst"] is None


# --- HTML -----------------------------------------------------------------------------------------------------------

VOID = {"meta", "br", "link", "img", "hr"}


class Page(HTMLParser):
    """A page's elements, each closed where it must be; its texts; what it refers to."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.texts, self.references = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        assert not [name for name, _ in attributes if name.startswith("on")]

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("report", [REPORT, Report(LAYERS, []), Report([], [])])
def test_the_page_is_whole_and_refers_to_nothing_elsewhere(report, tmp_path):
    path = tmp_path / "report.html"
    text = report.to_html(path)
    assert path.read_text(encoding="utf-8") == text
    page = Page(text)
    assert page.tags[:2] == ["html", "head"] and "script" not in page.tags and "link" not in page.tags
    assert [reference for reference in page.references if not reference.startswith("#")] == []
    assert "url(http" not in text and "@import" not in text
    assert 'name="viewport"' in text and 'content="light dark"' in text and "@media (max-width" in text
    shown = " ".join(page.texts)
    for finding in report.findings:
        assert finding.layer in shown and finding.message in shown and finding.remedy in shown


def test_the_page_has_figures_where_they_can_be_drawn(monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("cubn.health.figures")
    monkeypatch.undo()  # of `without_figures`
    report = examine([replace(healthy(running_mean={3: math.nan}), name="<b>&amp; a\x1b\n\ud800 $\\x$")])
    text = report.to_html()
    page = Page(text)
    assert page.tags.count("svg") == page.tags.count("figure") > 0 and "b" not in page.tags[page.tags.index("svg") :]
    assert [reference for reference in page.references if not reference.startswith("#")] == []
    assert "<metadata" not in text and "<!DOCTYPE svg" not in text and text == report.to_html()


def test_notebooks_get_a_part_of_a_page():
    part = REPORT._repr_html_()
    assert {"html", "body", "script"}.isdisjoint(Page(part).tags)


# --- names ----------------------------------------------------------------------------------------------------------

NAMES = ["<script>alert(1)</script>", "[red]a[/red]", "[/]", "a\x1b[31mb\rc\n", "\u202eevil", "\ud800", "&amp;'\"", ""]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_and_not_obeyed(name, monkeypatch, tmp_path):
    report = examine([replace(healthy(running_mean={3: math.nan}), name=name)])
    shown = wording.printable(name)
    assert shown.isprintable()
    text = str(report)
    assert shown in text and "\x1b" not in text and len(text.splitlines()) == 8
    page = report.to_html(tmp_path / "page.html")
    assert "script" not in Page(page).tags and shown in "".join(Page(page).texts)
    json.loads(report.to_json())
    pytest.importorskip("rich")
    on_a_terminal(monkeypatch)
    assert shown in str(report) and "\x1b[31mb" not in str(report)
