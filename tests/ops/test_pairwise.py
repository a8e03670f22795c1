"""The generator of all-pairs rows covers what it says it covers."""

import itertools

import pytest

from tests.ops import cases
from tests.ops.pairwise import covering, every_pair, whole_product


def test_every_allowed_pair_meets_in_an_allowed_row():
    rows = every_pair(cases.AXES, cases.allowed)
    assert all(cases.allowed(row) and list(row) == list(cases.AXES) for row in rows)
    for one, other in itertools.combinations(cases.AXES, 2):
        met = {(row[one], row[other]) for row in rows}
        possible = itertools.product(cases.AXES[one], cases.AXES[other])
        assert met == {pair for pair in possible if cases.allowed(dict(zip((one, other), pair, strict=True)))}


def test_few_rows_do():
    assert len(every_pair(cases.AXES, cases.allowed)) < 200


def test_the_whole_product_is_every_allowed_combination():
    axes = {"a": [1, 2], "b": [1, 2], "c": [1, 2, 3], "d": [4, 5]}
    rows = list(whole_product(axes, ["a", "b", "c"], lambda row: row.get("a", 0) + row.get("b", 0) < 4))
    met = {(row["a"], row["b"], row["c"]) for row in rows}
    assert len(rows) == len(met) == 9 and (2, 2, 1) not in met
    assert all(row["d"] in axes["d"] for row in rows)


@pytest.mark.parametrize("strength", [1, 2])
def test_few_rows_cover_what_all_of_them_have(strength):
    rows = list(whole_product({"a": range(6), "b": range(4), "c": range(3)}, ["a", "b", "c"], lambda row: True))
    found = [rows[i] for i in covering(rows, strength)]
    for names in itertools.combinations("abc", strength):
        met = {tuple(row[name] for name in names) for row in found}
        assert met == {tuple(row[name] for name in names) for row in rows}
    assert len(found) == {1: 6, 2: 24}[strength]


def test_no_value_is_favoured_where_all_rows_cover_as_much():
    rows = [{"many": many, "few": few} for many in range(12) for few in range(3)]
    few = [rows[i]["few"] for i in covering(rows, 1)]
    assert [few.count(value) for value in range(3)] == [4, 4, 4]


@pytest.mark.every_value
@pytest.mark.parametrize("many", range(4))
@pytest.mark.parametrize("few", range(2))
def test_what_a_product_leaves_to_full_is_marked(request, many, few):
    by_default = {(0, 0), (1, 1), (2, 0), (3, 1)}
    assert bool(request.node.get_closest_marker("full")) == ((many, few) not in by_default)
