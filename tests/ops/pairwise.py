"""Rows of options: all pairs of a product, the whole product, and few of the rows there are."""

import itertools
import random
from collections import Counter

import pytest


def every_pair(axes, allowed, seed=0):
    """Rows (dicts) in which every two values that can meet in an allowed row do meet.

    axes: {name: values}. allowed: predicate on a row, or on a part of one; a pair it lets through can be completed.
    """
    rng = random.Random(seed)
    missing = {
        frozenset(pair)
        for one, other in itertools.combinations(axes, 2)
        for pair in itertools.product([(one, v) for v in axes[one]], [(other, v) for v in axes[other]])
        if allowed(dict(pair))
    }
    rows = []
    while missing:
        row = _complete(dict(min(missing, key=_in_order)), axes, allowed, missing, rng)
        missing -= _pairs(row)
        rows.append(row)
    return rows


def whole_product(axes, names, allowed, seed=0):
    """Every allowed combination of the named axes, the other axes drawn at random."""
    rng = random.Random(seed)
    for values in itertools.product(*(axes[name] for name in names)):
        row = dict(zip(names, values, strict=True))
        if allowed(row):
            yield _complete(row, axes, allowed, (), rng)


def covering(rows, strength):
    """Numbers of a few rows (dicts) in which all combinations of `strength` values occur that occur in any row.

    Of rows that add as many combinations, that with the values least used so far, so that none is favoured.
    """
    meets = [set(itertools.combinations(row.items(), strength)) for row in rows]
    missing, used, chosen = set().union(*meets), Counter(), []
    while missing:
        best = max(range(len(rows)), key=lambda i: (len(meets[i] & missing), -sum(used[v] for v in rows[i].items())))
        missing -= meets[best]
        used.update(rows[best].items())
        chosen.append(best)
    return chosen


def others_full(rows, chosen):
    """Rows as parameters of a test: those of the chosen numbers, and the others marked `full`."""
    return [pytest.param(*row, marks=() if i in chosen else pytest.mark.full) for i, row in enumerate(rows)]


def _complete(start, axes, allowed, missing, rng):
    """Fill the axes still open, in random order, each with the value that meets most of what has not met."""
    for _ in range(100):
        row = dict(start)
        for name in rng.sample([a for a in axes if a not in row], len(axes) - len(row)):
            choices = [v for v in axes[name] if allowed({**row, name: v})]
            if not choices:
                break
            rng.shuffle(choices)
            row[name] = max(choices, key=lambda v: sum(frozenset(((name, v), have)) in missing for have in row.items()))
        else:
            return {name: row[name] for name in axes}
    raise ValueError(f"{start} is allowed, but no row that holds it is")


def _in_order(pair):
    """The same in every process, as a set's own order is not."""
    return sorted(map(repr, pair))


def _pairs(row):
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
