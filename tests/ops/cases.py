"""One case: an operation with all its options, run through the public API and held to the oracle."""

import functools
import itertools

import numpy as np

import cubn
from tests import oracle
from tests.ops import arrays

EPS = 1e-5

SHAPES = {
    "2-D": (37, 19),
    "short": (5, 17, 7, 7),
    "vectors": (3, 16, 16),
    "single": (1, 1, 40),
    "tiles": (2, 3, 45, 50),
    "5-D": (2, 9, 3, 4, 5),
}

AXES = {
    "operation": ["forward", "train", "frozen", "normalize"],
    "dtype": arrays.DTYPES,
    "layout": list(arrays.LAYOUTS),
    "threads": [1, 2, 3, 11],
    "library": arrays.LIBRARIES,
    "shape": list(SHAPES),
    "mask": ["none", "full", "samples", "positions", "rank"],
    "residual": [False, True],
    "relu": [False, True],
    "affine": ["both", "none", "gamma", "beta"],
    "parameters": ["float32", "half", "x"],
    "out": ["fresh", "given", "in place", "residual"],
    "others": ["alike", "dense", "channels_last", "negative"],
    "momentum": [0.1, None, 1.0],
    "cut": ["whole", "halves", "uneven"],
}


def allowed(row):
    """Which two options cannot meet; axes that are not in the row yet say nothing."""

    def both(**values):
        return all(name in row and row[name] in some for name, some in values.items())

    library, layout = row.get("library"), row.get("layout")
    return not (
        (library and layout and not arrays.can_carry(library, layout))
        or both(library=["torch", "jax"], others=["negative"])
        or both(library=["jax"], out=["given", "in place", "residual"])
        or both(layout=["broadcast"], out=["in place", "residual"])
        or both(residual=[False], out=["residual"])
        or both(shape=["2-D"], mask=["positions"])
        or both(operation=["forward", "train", "frozen"], cut=["halves", "uneven"])
        or both(operation=["forward", "frozen", "normalize"], momentum=[None, 1.0])
        or both(cut=["halves", "uneven"], momentum=[None, 1.0])
    )


class Case:
    """The arrays of a row, as stores; what the oracle makes of them; and the arguments cubn gets."""

    def __init__(self, row, seed=0):
        self.row = row
        rng = np.random.default_rng(seed)
        dtype = row["dtype"]
        values = arrays.normal(rng, SHAPES[row["shape"]], dtype, centre=0.5, scale=2.0)
        self.C = values.shape[1]
        self.x, self.axis = arrays.lay_out(values, row["layout"])
        self.memory = arrays.LAYOUTS[row["layout"]][1]
        self.dy = arrays.normal(rng, self.x.shape, dtype)
        self.residual = arrays.normal(rng, self.x.shape, dtype) if row["residual"] else None
        self.mask = self._mask(rng)
        half = "bfloat16" if dtype == "bfloat16" else "float16"
        of_parameters = {"float32": "float32", "half": half, "x": dtype}[row["parameters"]]
        self.parameters = {
            name: arrays.normal(rng, self.C, of_parameters, centre=0.3)
            for name in ("gamma", "beta")
            if row["affine"] in ("both", name)
        }
        of_state = "float64" if dtype == "float64" else "float32"
        self.running_mean = arrays.normal(rng, self.C, of_state, centre=0.5)
        self.running_var = np.abs(arrays.normal(rng, self.C, of_state, centre=2.0))

    def _mask(self, rng):
        """Without the channel axis."""
        extents = [n for axis, n in enumerate(self.x.shape) if axis != self.axis % self.x.ndim]
        present = rng.random(extents) < 0.7
        if self.row["mask"] == "samples":
            present = present[(slice(None), *[slice(0, 1)] * (len(extents) - 1))]
        if self.row["mask"] == "positions":
            present = present[:1]
        present.flat[:2] = True  # a channel needs two values
        return None if self.row["mask"] == "none" else present

    # --- what is expected ---

    @property
    def ncs(self):
        return oracle.as_ncs(self.x, self.axis)

    @property
    def flat_mask(self):
        return None if self.mask is None else oracle.mask_as_ns(self.mask, self.x.shape, self.axis)

    @property
    def expected_options(self):
        residual = None if self.residual is None else oracle.as_ncs(self.residual, self.axis)
        return {**self.parameters, "mask": self.flat_mask, "residual": residual, "relu": self.row["relu"]}

    def statistics(self):
        if self.row["operation"] in ("train", "normalize"):
            return oracle.batch_statistics(self.ncs, EPS, mask=self.flat_mask)
        return oracle.frozen_statistics(self.running_mean, self.running_var, EPS)

    def expected(self, stats):
        return oracle.normalize(self.ncs, stats, **self.expected_options)

    def expected_gradients(self, stats):
        dy, frozen = oracle.as_ncs(self.dy, self.axis), self.row["operation"] == "frozen"
        return oracle.backward(dy, self.ncs, stats, frozen=frozen, **self.expected_options)

    # --- what cubn gets: fresh arrays, so that nothing is shared between two runs ---

    def carry(self, store):
        return arrays.carry(store.copy(), self.row["library"])

    def state(self):
        return cubn.BatchNormState.from_arrays(
            **{name: self.carry(store) for name, store in self.parameters.items()},
            running_mean=self.carry(self.running_mean),
            running_var=self.carry(self.running_var),
            eps=EPS,
            momentum=self.row["momentum"],
            channel_axis=self.axis,
        )

    def arguments(self):
        """x, and the options that go with it."""
        x = arrays.carry(arrays.in_memory(self.x, self.memory, self.axis), self.row["library"])
        options = {"relu": self.row["relu"]}
        if self.residual is not None:
            options["residual"] = self.beside(self.residual)
        if self.mask is not None:
            options["mask"] = self.given_mask(self.mask)
        match self.row["out"]:
            case "given":
                options["out"] = self.beside(np.zeros(self.x.shape, self.x.dtype))
            case "in place":
                options["out"] = x
            case "residual":
                options["out"] = options["residual"]
        return x, options

    def beside(self, store):
        """A second array of x's shape, laid out like x or in its own way; in memory of its own, element by element."""
        memory = self.memory if self.row["others"] == "alike" else self.row["others"]
        memory = "sliced" if memory == "broadcast" else memory
        return arrays.carry(arrays.in_memory(store, memory, self.axis), self.row["library"])

    def given_mask(self, mask):
        return self.carry(np.expand_dims(mask, self.axis) if self.row["mask"] == "rank" else mask)

    def moments(self, x):
        """Moments of x: of its parts, merged, where the row cuts it."""
        sample_axis = 1 if self.axis == 0 else 0
        N = x.shape[sample_axis]
        edges = {"whole": [0, N], "halves": [0, N // 2, N], "uneven": [0, 1, 1, (2 * N + 2) // 3, N]}[self.row["cut"]]
        parts = []
        for lo, hi in itertools.pairwise(edges):
            part, mask = x[:, lo:hi] if sample_axis else x[lo:hi], self.mask
            if mask is not None:
                mask = self.given_mask(mask[lo:hi] if mask.shape[0] > 1 else mask)
            parts.append(cubn.moments(part, channel_axis=self.axis, mask=mask, start=lo))
        return functools.reduce(cubn.Moments.merge, parts)


def run(row, seed=0, kind=Case):
    """Run a row on as many threads as it asks for and compare everything it gives with the oracle."""
    case = kind(row, seed)
    cubn.set_num_threads(row["threads"])
    {"forward": _forward, "train": _train, "frozen": _frozen, "normalize": _normalize}[row["operation"]](case)


def _check_output(case, y, x, options):
    row = case.row
    assert arrays.library_of(y) == row["library"]
    if "out" in options:
        assert y is options["out"]
    elif row["library"] != "jax":
        if arrays.is_dense(case.x):
            assert arrays.steps(arrays.store_of(y)) == arrays.steps(case.x), "y is not laid out as x is"
        else:
            assert arrays.store_of(y).flags.c_contiguous
    if row["out"] != "in place":
        arrays.assert_same(arrays.store_of(x), case.x, "x, which should not change,")


def _compare(case, got, expected, what):
    store = arrays.store_of(got)
    assert store.shape == case.x.shape
    arrays.assert_same(oracle.as_ncs(store, case.axis), expected, what)


def _forward(case):
    state = case.state()
    x, options = case.arguments()
    y = cubn.forward(x, state, **options)
    _check_output(case, y, x, options)
    _compare(case, y, case.expected(case.statistics()), "y")


def _train(case):
    state = case.state()
    x, options = case.arguments()
    y, saved = cubn.forward_train(x, state, **options)
    stats = case.statistics()
    _check_output(case, y, x, options)
    _compare(case, y, case.expected(stats), "y")
    zeros = np.zeros(case.C, np.int64)
    after = oracle.update(oracle.State(case.running_mean, case.running_var, zeros, zeros), stats, case.row["momentum"])
    arrays.assert_same(arrays.store_of(state.running_mean), after.mean, "running_mean")
    arrays.assert_same(arrays.store_of(state.running_var), after.var, "running_var")
    arrays.assert_same(arrays.store_of(state.tracked), after.tracked, "tracked")
    arrays.assert_same(arrays.store_of(state.skipped), after.skipped, "skipped")
    if case.row["out"] != "in place":
        _backward(case, saved, stats)


def _frozen(case):
    state = case.state()
    x, options = case.arguments()
    y, saved = cubn.forward_frozen(x, state, **options)
    stats = case.statistics()
    _check_output(case, y, x, options)
    _compare(case, y, case.expected(stats), "y")
    arrays.assert_same(arrays.store_of(state.running_mean), case.running_mean, "running_mean, which is frozen,")
    if case.row["out"] != "in place":
        _backward(case, saved, stats)


def _backward(case, saved, stats):
    library = case.row["library"]
    expected = case.expected_gradients(stats)
    for out in ("fresh", "given", "in place") if library != "jax" else ("fresh",):
        dy = case.beside(case.dy)
        destination = {
            "fresh": {},
            "given": {"out": arrays.carry(np.zeros(case.x.shape, case.x.dtype), library)},
            "in place": {"out": dy},
        }[out]
        grads = cubn.backward(dy, saved, **destination)
        if destination:
            assert grads.dx is destination["out"]
        _compare(case, grads.dx, expected.dx, f"dx ({out})")
        if out != "in place":
            arrays.assert_same(arrays.store_of(dy), case.dy, "dy, which should not change,")
        if case.residual is None:
            assert grads.dresidual is None
        else:
            _compare(case, grads.dresidual, expected.dresidual, f"dresidual ({out})")
        for name in ("gamma", "beta"):
            gradient = getattr(grads, f"d{name}")
            if name not in case.parameters:
                assert gradient is None
            else:
                assert arrays.library_of(gradient) == library
                arrays.assert_same(arrays.store_of(gradient), getattr(expected, f"d{name}"), f"d{name} ({out})")


def _normalize(case):
    x, options = case.arguments()
    moments = case.moments(x)
    stats = case.statistics()
    assert_moments(moments, stats)
    parameters = {name: case.carry(store) for name, store in case.parameters.items()}
    y = cubn.normalize(x, moments, **parameters, eps=EPS, channel_axis=case.axis, **options)
    _check_output(case, y, x, options)
    _compare(case, y, case.expected(stats), "y")


def assert_moments(got, stats):
    """Moments with the count, mean and m2 of the oracle's statistics, and the variances that follow."""
    assert (np.asarray(got.count) == stats.count).all()
    arrays.assert_same(np.asarray(got.mean), stats.mean, "mean")
    arrays.assert_same(np.asarray(got.m2), stats.m2, "m2")
    if stats.count > 1:
        arrays.assert_same(np.asarray(got.var()), stats.var, "var")
        arrays.assert_same(np.asarray(got.var_unbiased()), stats.m2 / np.float64(stats.count - 1), "var_unbiased")
