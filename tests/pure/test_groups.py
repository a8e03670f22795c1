"""Which samples form a group, where those of a rank stand, and in what order their nodes are put: integers only."""

from itertools import accumulate, pairwise

from hypothesis import given
from hypothesis import strategies as st

from cubn import _groups, reference
from cubn._groups import Cut
from cubn._tree import aligned_blocks


@given(st.integers(0, 60), st.integers(1, 70))
def test_groups_are_those_of_the_reference(N, size):
    slices = [(group.start, group.stop) for group in reference.groups(N, size)]
    assert list(_groups.group_ranges(N, size)) == slices
    assert 2 * size > N or len(slices) == N // size
    assert all(size <= hi - lo < 2 * size for lo, hi in slices) or len(slices) == 1


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(1, 20))
def test_pieces_of_all_ranks_are_the_groups(samples, size):
    N, seen = sum(samples), []
    for first, stop in pairwise(accumulate(samples, initial=0)):
        for group, start, lo, hi in _groups.pieces(first, stop, N, size):
            assert lo < hi <= stop - first
            seen += [(group, start + i, first + i + lo) for i in range(hi - lo)]
    wanted = [
        (i, sample - group.start, sample)
        for i, group in enumerate(reference.groups(N, size))
        for sample in range(group.start, group.stop)
    ]
    assert seen == wanted


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(1, 20), st.booleans())
def test_the_rows_of_all_ranks_in_order_are_those_of_each_tree(samples, size, whole):
    N, cut = sum(samples), Cut(size, whole)
    rows = [
        block
        for first, stop in pairwise(accumulate(samples, initial=0))
        for block in _groups.blocks_of(first, stop, N, cut)
    ]
    order = _groups.rows_by_tree(tuple(samples), cut)
    assert sorted(order) == list(range(len(rows)))
    ordered = [rows[row] for row in order]
    trees = [ordered[of] for of in _groups.tree_slices(ordered)]
    ranges = [(0, group.stop - group.start) for group in reference.groups(N, size)] + [(0, N)] * whole
    assert [(tree[0][0], tree[-1][1]) for tree in trees] == (ranges if N else [])
    for tree in trees:  # neighbours, each aligned
        assert all(left[1] == right[0] for left, right in pairwise(tree))
        assert all(aligned_blocks(*block) == (block,) for block in tree)


def test_without_groups_all_samples_are_one_tree():
    assert _groups.blocks_of(5, 8, 20, Cut()) == aligned_blocks(5, 8)
