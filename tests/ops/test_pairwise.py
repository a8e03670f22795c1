"""The generator of all-pairs rows covers what it says it covers."""

import itertools

from tests.ops import cases
from tests.ops.pairwise import every_pair, whole_product


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
