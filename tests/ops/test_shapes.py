"""Every operation over shapes, addresses and values: both sides of every edge of the tree, of vectors and of blocks."""

import itertools
import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cubn
from tests import oracle
from tests.conftest import CUDA_ON_CPU
from tests.ops import arrays
from tests.ops.cases import assert_moments
from tests.ops.pairwise import others_full

EPS = 1e-5
SIZE = 60_000  # elements, at most
EDGES = {
    "N": [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 127, 128, 129, 255, 256, 257, 300],
    "C": [1, 2, 3, 15, 16, 17, 31, 32, 33, 65, 96, 511, 512, 513, 1025],
    "S": [
        1,
        2,
        3,
        4,
        5,
        7,
        8,
        9,
        15,
        16,
        17,
        31,
        33,
        49,
        196,
        255,
        256,
        257,
        258,
        261,
        511,
        512,
        515,
        784,
        2047,
        2048,
        2049,
        2304,
        3136,
        4097,
        5000,
    ],
}
CHOICES = {
    "seed": range(2**32),
    "dtype": arrays.DTYPES,
    "centre_and_scale": [(0.0, 1.0), (3.0, 2.0), (1000.0, 0.1), (0.0, 1e-22), (0.0, 1e4)],
    "wild": [0.0, 0.0, 0.0, 0.001, 0.2],
    "density": [None, None, 0.0, 0.01, 0.5, 0.99],
    "residual": [False, True],
    "relu": [False, True],
    "momentum": [0.1, 1.0, None],
    "channels_last": [False, True],
    "elements_off": range(32),
    "threads": [1, 2, 3, 5],
}


@dataclass(frozen=True)
class Problem:
    """A call: extents, values and how they are handed over."""

    extents: tuple[int, int, int]
    dtype: str
    seed: int
    centre_and_scale: tuple[float, float]
    wild: float
    density: float | None
    residual: bool
    relu: bool
    momentum: float | None
    channels_last: bool
    elements_off: int
    threads: int


def extents(choose, order, chosen):
    """N, C, S with two values a channel or more; what is not chosen yet is, in that order, as far as SIZE allows."""
    for name in order:
        if name not in chosen:
            left = SIZE // math.prod(chosen.values())
            chosen[name] = choose([n for n in EDGES[name] if n <= left])
    if chosen["N"] * chosen["S"] == 1:
        chosen["N"] = 2
    return chosen["N"], chosen["C"], chosen["S"]


@st.composite
def problems(draw):
    def choose(values):
        return draw(st.sampled_from(values))

    found = extents(choose, draw(st.permutations("NCS")), {})
    return Problem(found, **{name: choose(values) for name, values in CHOICES.items()})


def problems_at_every_edge(draws, seed):
    """Each edge of each extent with both layouts, all else at random."""
    rng, found = random.Random(seed), []
    for name, sizes in EDGES.items():
        for size, channels_last in itertools.product(sizes, (False, True)):
            for _ in range(draws):
                rest = {field: rng.choice(values) for field, values in CHOICES.items()}
                shape = extents(rng.choice, rng.sample("NCS", 3), {name: size})
                found.append(Problem(shape, **{**rest, "channels_last": channels_last}))
    return found


def name_of(value):
    if not isinstance(value, Problem):
        return str(value)
    problem = value
    return "-".join(map(str, (*problem.extents, problem.dtype, "nhwc" if problem.channels_last else "nchw")))


class Drawn:
    """The values of a problem: stores (N, C, S) for the oracle, arrays at their address for cubn."""

    def __init__(self, problem):
        self.problem = problem
        rng = np.random.default_rng(problem.seed)
        N, C, S = shape = problem.extents
        centre, scale = problem.centre_and_scale
        self.axis = -1 if problem.channels_last else 1
        self.x = arrays.normal(rng, shape, problem.dtype, centre=centre, scale=scale, wild=problem.wild)
        self.dy = arrays.normal(rng, shape, problem.dtype, wild=problem.wild)
        self.gamma, self.beta = arrays.normal(rng, C, centre=0.5), arrays.normal(rng, C)
        own = "float64" if problem.dtype == "float64" else "float32"
        self.running_mean = arrays.normal(rng, C, own, centre=centre)
        self.running_var = np.abs(arrays.normal(rng, C, own, centre=scale * scale))
        self.expected_options = {"mask": None, "residual": None, "relu": problem.relu}
        if problem.residual:
            self.expected_options["residual"] = arrays.normal(rng, shape, problem.dtype, wild=problem.wild)
        if problem.density is not None:
            mask = rng.random((N, S)) < problem.density
            mask.flat[rng.choice(N * S, 2, replace=False)] = True
            self.expected_options["mask"] = mask
        cubn.set_num_threads(problem.threads)

    def place(self, store):
        """The store at its address, channels where they belong, and without the position's axis where S is 1."""
        N, C, S = self.problem.extents
        store = store.reshape(N, C) if S == 1 else np.moveaxis(store, 1, self.axis)
        return arrays.carry(arrays.at_address(store, self.problem.elements_off * store.itemsize % 64), "numpy")

    def options(self):
        residual, mask = self.expected_options["residual"], self.expected_options["mask"]
        options = {"relu": self.problem.relu}
        if residual is not None:
            options["residual"] = self.place(residual)
        if mask is not None:
            options["mask"] = mask[:, 0] if mask.shape[1] == 1 else mask
        return options

    def state(self):
        return cubn.BatchNormState.from_arrays(
            gamma=self.gamma,
            beta=self.beta,
            running_mean=self.running_mean.copy(),
            running_var=self.running_var.copy(),
            eps=EPS,
            momentum=self.problem.momentum,
            channel_axis=self.axis,
        )

    def expected(self, stats):
        return oracle.normalize(self.x, stats, self.gamma, self.beta, **self.expected_options)

    def same(self, got, expected, what):
        arrays.assert_same(oracle.as_ncs(arrays.store_of(got), self.axis), expected, what)

    def same_gradients(self, got, stats, *, frozen):
        expected = oracle.backward(
            self.dy, self.x, stats, self.gamma, self.beta, frozen=frozen, **self.expected_options
        )
        self.same(got.dx, expected.dx, "dx")
        arrays.assert_same(got.dgamma, expected.dgamma, "dgamma")
        arrays.assert_same(got.dbeta, expected.dbeta, "dbeta")
        if self.problem.residual:
            self.same(got.dresidual, expected.dresidual, "dresidual")


def check_training(problem):
    drawn = Drawn(problem)
    state = drawn.state()
    y, saved = cubn.forward_train(drawn.place(drawn.x), state, **drawn.options())
    stats = oracle.batch_statistics(drawn.x, EPS, mask=drawn.expected_options["mask"])
    arrays.assert_same(saved.mean, stats.mean, "mean")
    arrays.assert_same(saved.invstd, stats.invstd, "invstd")
    drawn.same(y, drawn.expected(stats), "y")
    none = np.zeros(problem.extents[1], np.int64)
    after = oracle.update(oracle.State(drawn.running_mean, drawn.running_var, none, none), stats, problem.momentum)
    arrays.assert_same(state.running_mean, after.mean, "running_mean")
    arrays.assert_same(state.running_var, after.var, "running_var")
    arrays.assert_same(state.skipped, after.skipped, "skipped")
    drawn.same_gradients(cubn.backward(drawn.place(drawn.dy), saved), stats, frozen=False)


def check_frozen_statistics_and_inference(problem):
    drawn = Drawn(problem)
    state = drawn.state()
    stats = oracle.frozen_statistics(drawn.running_mean, drawn.running_var, EPS)
    expected = drawn.expected(stats)
    drawn.same(cubn.forward(drawn.place(drawn.x), state, **drawn.options()), expected, "y of forward")
    y, saved = cubn.forward_frozen(drawn.place(drawn.x), state, **drawn.options())
    drawn.same(y, expected, "y of forward_frozen")
    drawn.same_gradients(cubn.backward(drawn.place(drawn.dy), saved), stats, frozen=True)


def check_moments_and_normalize(problem, start, cuts):
    drawn = Drawn(problem)
    x, mask = drawn.place(drawn.x), drawn.options().get("mask")
    N = problem.extents[0]
    edges = [0, *sorted(int(c * N) for c in cuts), N]
    parts = [
        cubn.moments(x[lo:hi], channel_axis=drawn.axis, mask=None if mask is None else mask[lo:hi], start=start + lo)
        for lo, hi in itertools.pairwise(edges)
    ]
    whole = parts.pop()
    while parts:
        whole = parts.pop().merge(whole)
    stats = oracle.batch_statistics(drawn.x, EPS, mask=drawn.expected_options["mask"], start=start)
    assert_moments(whole, stats)
    given_parameters = {"gamma": drawn.gamma, "beta": drawn.beta, "eps": EPS, "channel_axis": drawn.axis}
    drawn.same(cubn.normalize(x, whole, **given_parameters, **drawn.options()), drawn.expected(stats), "y")


PLAIN = [("cpu", "plain"), *((name, "plain") for name in CUDA_ON_CPU)]
PLACES = [*PLAIN, ("cpu", "streamed"), ("cpu", "streamed by position")]
"""Where an operation runs, and how the CPU makes its elementwise passes."""


def at_every_edge(seed, places):
    """Three problems an edge and layout on the CPU, one of their own on each of the others.

    By default one, in the first place; and each of the other places has one of the two layouts at every edge.
    """
    problems = {name: (1, problems_at_every_edge(1, f"{seed} {name}")) for name in CUDA_ON_CPU}
    problems["cpu"] = 3, problems_at_every_edge(3, seed)
    rows, chosen = [], []
    for turn, (name, passes) in enumerate(places):
        draws, drawn = problems[name]
        for i, problem in enumerate(drawn):
            (edge, layout), draw = divmod(i // draws, 2), i % draws
            if draw == 0 and (turn == 0 or (edge + layout + turn) % 2):
                chosen.append(len(rows))
            rows.append((name, passes, problem))
    names = ("backend", "passes", "problem")
    return pytest.mark.parametrize(names, others_full(rows, set(chosen)), indirect=names[:2], ids=name_of)


def anywhere(places):
    """Where a test draws its own problems, which compiles many kernels: by default on the CPU, in one way."""
    marks = {"cpu": pytest.mark.full, **dict.fromkeys(CUDA_ON_CPU, pytest.mark.slow)}
    rows = [pytest.param(*place, marks=() if place == places[0] else marks[place[0]]) for place in places]
    return pytest.mark.parametrize(("backend", "passes"), rows, indirect=True)


@pytest.mark.usefixtures("eager_threads", "passes")
class TestTraining:
    @at_every_edge(1, PLACES)
    def test_the_oracle_s_bits_at_every_edge(self, backend, problem):
        check_training(problem)

    @anywhere(PLACES)
    @given(problems())
    def test_the_oracle_s_bits_anywhere(self, backend, problem):
        check_training(problem)


@pytest.mark.usefixtures("eager_threads", "passes")
class TestFrozenStatisticsAndInference:
    @at_every_edge(2, PLACES)
    def test_the_oracle_s_bits_at_every_edge(self, backend, problem):
        check_frozen_statistics_and_inference(problem)

    @anywhere(PLACES)
    @given(problems())
    def test_the_oracle_s_bits_anywhere(self, backend, problem):
        check_frozen_statistics_and_inference(problem)


@pytest.mark.usefixtures("eager_threads", "passes")
class TestMomentsOfAnyCut:
    @at_every_edge(3, PLAIN)
    def test_the_oracle_s_bits_at_every_edge(self, backend, problem):
        check_moments_and_normalize(problem, 5, (0.3, 0.5))

    @anywhere(PLAIN)
    @given(problems(), st.integers(0, 1000), st.lists(st.floats(0, 1), max_size=4))
    def test_the_oracle_s_bits_anywhere(self, backend, problem, start, cuts):
        check_moments_and_normalize(problem, start, cuts)
