"""The index arithmetic of the canonical tree, against the definition of the tree written out as text."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cubn import _tree

ranges = st.tuples(st.integers(0, 300), st.integers(0, 300)).map(lambda r: (r[0], r[0] + r[1]))


def written_out(lo, hi, start, stop):
    """The tree over global samples [lo, hi) with only [start, stop) present: (left right) where both sides have any."""
    if hi <= start or stop <= lo:
        return ""
    if hi - lo == 1:
        return str(lo)
    mid = (lo + hi) // 2
    left, right = written_out(lo, mid, start, stop), written_out(mid, hi, start, stop)
    return f"({left} {right})" if left and right else left or right


def carried_out(steps, nodes):
    nodes = list(nodes)
    for left, right in steps:
        assert nodes[left] is not None and nodes[right] is not None
        nodes[left], nodes[right] = f"({nodes[left]} {nodes[right]})", None
    return nodes


def test_a_tile_is_eight_rows_of_256_columns():
    assert (_tree.ROWS, _tree.COLUMNS, _tree.TILE) == (8, 256, 2048)


@pytest.mark.parametrize(
    ("start", "stop", "blocks"),
    [
        (0, 0, ()),
        (7, 7, ()),
        (0, 1, ((0, 1),)),
        (0, 8, ((0, 8),)),
        (0, 7, ((0, 4), (4, 6), (6, 7))),
        (5, 23, ((5, 6), (6, 8), (8, 16), (16, 20), (20, 22), (22, 23))),
        (2**40, 2**41, ((2**40, 2**41),)),
        (2**63 - 1, 2**63 + 1, ((2**63 - 1, 2**63), (2**63, 2**63 + 1))),
    ],
)
def test_aligned_blocks_by_hand(start, stop, blocks):
    assert _tree.aligned_blocks(start, stop) == blocks


@given(ranges)
def test_aligned_blocks_are_the_fewest_aligned_blocks_of_a_range(limits):
    start, stop = limits
    blocks = _tree.aligned_blocks(start, stop)
    ends = [start, *(hi for _, hi in blocks)]
    assert [lo for lo, _ in blocks] == ends[:-1] and ends[-1] == stop
    for lo, hi in blocks:
        size = hi - lo
        assert size & (size - 1) == 0 and lo % size == 0
        parent = lo - lo % (2 * size)
        assert parent < start or parent + 2 * size > stop, "a block that could be larger"


@given(ranges.filter(lambda r: r[0] < r[1]))
def test_the_root_over_a_range_is_the_tree_with_absent_samples_left_out(limits):
    start, stop = limits
    blocks = _tree.aligned_blocks(start, stop)
    whole = written_out(0, 1024, start, stop)
    assert carried_out(_tree.root_order(blocks), (written_out(*b, *b) for b in blocks))[0] == whole
    samples = [(n, n + 1) for n in range(start, stop)]
    assert carried_out(_tree.root_order(samples), map(str, range(start, stop)))[0] == whole


@given(ranges, st.lists(st.integers(0, 300), max_size=5))
def test_however_a_range_is_cut_the_pairs_and_the_root_are_the_same(limits, cuts):
    start, stop = limits
    edges = sorted({start, stop, *(c for c in cuts if start < c < stop)})
    blocks = [b for lo, hi in itertools.pairwise(edges) for b in _tree.aligned_blocks(lo, hi)]
    nodes = [written_out(*b, *b) for b in blocks]
    steps, rows, remaining = _tree.pair_order(blocks)
    merged = carried_out(steps, nodes)
    assert remaining == _tree.aligned_blocks(start, stop)
    assert [merged[row] for row in rows] == [written_out(*b, *b) for b in remaining]
    assert sum(node is not None for node in merged) == len(rows)
    if blocks:
        assert carried_out(_tree.root_order(blocks), nodes)[0] == written_out(0, 1024, start, stop)
        assert stacked(_tree.stack_order(blocks), nodes) == [written_out(0, 1024, start, stop)]


def stacked(merges, nodes):
    stack = []
    for count, node in zip(merges, nodes, strict=True):
        stack.append(node)
        for _ in range(count):
            right, left = stack.pop(), stack.pop()
            stack.append(f"({left} {right})")
    return stack


def test_nothing_to_merge():
    assert _tree.pair_order(()) == ((), (), ())
    assert _tree.root_order(()) == _tree.stack_order(()) == ()
