"""2-D arrays of fewer than 16 channels, which the CPU takes 256 samples at a time, across the edges of that."""

import itertools
import random

import numpy as np
import pytest

import cubn
from cubn.backends.cpu import plan
from tests.ops import arrays
from tests.ops.test_shapes import CHOICES, Problem, check_moments_and_normalize, check_training, name_of

SAMPLES = [255, 256, 257, 271, 272, 511, 512, 513, 4096, 4097, 4370, 8192 + 259]
CHANNELS = range(1, 16)


def problems(seed):
    """Each number of channels with each dtype, all else at random; no masks, which run on general kernels."""
    rng, found = random.Random(seed), []
    for C, dtype in itertools.product(CHANNELS, arrays.DTYPES):
        rest = {name: rng.choice(values) for name, values in CHOICES.items()}
        shape = (rng.choice([N for N in SAMPLES if N * C < 70_000]), C, 1)
        found.append(Problem(shape, **{**rest, "dtype": dtype, "density": None}))
    return pytest.mark.parametrize("problem", found, ids=name_of)


@pytest.mark.usefixtures("eager_threads")
class TestNarrowArrays:
    @problems(1)
    def test_training_gives_the_oracle_s_bits(self, problem):
        check_training(problem)

    @problems(2)
    def test_moments_of_any_cut_are_the_oracle_s(self, problem):
        check_moments_and_normalize(problem, 3, (0.3, 0.5))

    @pytest.mark.parametrize("rows", [1 << 8, 1 << 12])
    def test_moments_do_not_depend_on_how_many_samples_a_task_takes(self, rows, monkeypatch):
        x = np.random.default_rng(0).standard_normal((40_000, 3), dtype=np.float32)
        expected = cubn.moments(np.asfortranarray(x))  # not narrow: its channels are not side by side
        monkeypatch.setattr(plan, "VALUES_A_ROW", rows)
        plan.reduction.cache_clear()
        got = cubn.moments(x)
        plan.reduction.cache_clear()
        assert np.array_equal(got.mean, expected.mean) and np.array_equal(got.m2, expected.m2)


def test_a_slice_of_a_wider_array_is_read_where_it_is():
    wide = np.random.default_rng(0).standard_normal((1000, 24), dtype=np.float32)
    some = wide[:, 5:12]
    got, expected = cubn.moments(some), cubn.moments(some.copy())
    assert np.array_equal(got.mean, expected.mean) and np.array_equal(got.m2, expected.m2)
