"""Ghost batches: every group is a batch of its own, and the running statistics are those of the whole one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cubn
from cubn import _ghost, reference
from tests import oracle
from tests.conftest import BACKENDS
from tests.ops import arrays
from tests.ops.pairwise import covering, every_pair, others_full
from tests.ops.test_on_device import device, remote  # noqa: F401

EPS = 1e-5
MASKS = ["none", "samples", "positions", "all"]


class Ghost:
    """A batch, what cubn gets of it, and what the contract makes of its groups."""

    def __init__(
        self, size, shape=(11, 5, 3, 4), dtype="float32", layout="nchw", library="numpy", mask="none", *, seed=0, **on
    ):
        rng = np.random.default_rng(seed)
        self.size, self.library, self.on = size, library, {"residual": False, "relu": False} | on
        store = arrays.normal(rng, shape, dtype, centre=0.5, scale=2.0)
        self.x, self.axis = arrays.lay_out(store, layout)
        self.memory = arrays.LAYOUTS[layout][1]
        self.dy, self.residual = (arrays.normal(rng, self.x.shape, dtype) for _ in range(2))
        self.gamma, self.beta = arrays.normal(rng, (2, shape[1]), "float32", centre=0.3)
        self.mask = None
        if mask != "none":
            extents = [n for axis, n in enumerate(self.x.shape) if axis != self.axis % self.x.ndim]
            self.mask = rng.random(extents) < 0.7
            if mask == "samples":
                self.mask = self.mask[(slice(None), *[slice(0, 1)] * (len(extents) - 1))] | True
            if mask == "positions":
                self.mask = self.mask[:1]

    def state(self, momentum=0.1):
        gamma, beta = (arrays.carry(store.copy(), self.library) for store in (self.gamma, self.beta))
        state = cubn.BatchNormState(len(self.gamma), channel_axis=self.axis, momentum=momentum, like=gamma, eps=EPS)
        state.gamma, state.beta = gamma, beta
        return state

    def carry(self, store):
        return arrays.carry(arrays.in_memory(store, self.memory, self.axis), self.library)

    def options(self):
        found = {"relu": self.on["relu"]}
        if self.on["residual"]:
            found["residual"] = self.carry(self.residual)
        if self.mask is not None:
            found["mask"] = arrays.carry(self.mask.copy(), self.library)
        return found

    def step(self, **options):
        """y, gradients, Saved and state of a step by groups."""
        state = self.state()
        y, saved = cubn.forward_train(self.carry(self.x), state, groups=self.size, **self.options(), **options)
        return y, cubn.backward(self.carry(self.dy), saved), saved, state

    # --- what is expected: in plain NumPy, group by group ---

    def expected(self):
        """Stores of y, dx, dresidual, dgamma, dbeta; statistics of each group, and of the whole batch."""
        x, dy, skip = (oracle.as_ncs(store, self.axis) for store in (self.x, self.dy, self.residual))
        mask = None if self.mask is None else oracle.mask_as_ns(self.mask, self.x.shape, self.axis)
        options = {"mask": mask, "residual": skip if self.on["residual"] else None, "relu": self.on["relu"]}
        y, found, each = oracle.ghost_batches(x, dy, self.size, EPS, self.gamma, self.beta, **options)
        of_samples = (oracle.from_ncs(a, self.x.shape, self.axis) for a in (y, found.dx, found.dresidual))
        return *of_samples, found.dgamma, found.dbeta, each, oracle.batch_statistics(x, EPS, mask=mask)


def assert_as_expected(ghost, result):
    y, gradients, saved, state = result
    want_y, dx, dresidual, dgamma, dbeta, each, whole = ghost.expected()
    for name, got, want in (
        ("y", y, want_y),
        ("dx", gradients.dx, dx),
        ("dresidual", gradients.dresidual, dresidual if ghost.on["residual"] else None),
        ("dgamma", gradients.dgamma, dgamma),
        ("dbeta", gradients.dbeta, dbeta),
    ):
        assert (got is None) == (want is None), name
        if want is not None:
            assert arrays.library_of(got) == ghost.library
            arrays.assert_same(arrays.store_of(got), want, name)
    for name in ("count", "mean", "var", "invstd"):
        arrays.assert_same(np.asarray(getattr(saved, name)), np.stack([getattr(stats, name) for stats in each]), name)
    C = len(ghost.gamma)
    zeros = np.zeros(C, np.int64)
    moved = oracle.update(oracle.State(np.zeros(C, np.float32), np.ones(C, np.float32), zeros, zeros), whole, 0.1)
    arrays.assert_same(arrays.store_of(state.running_mean), moved.mean, "running_mean")
    arrays.assert_same(arrays.store_of(state.running_var), moved.var, "running_var")
    np.testing.assert_array_equal([state.tracked, state.skipped], [moved.tracked, moved.skipped])


AXES = {
    "size": [1, 3, 4, 20],
    "dtype": arrays.DTYPES,
    "layout": ["nchw", "nhwc", "axis0", "sliced"],
    "library": arrays.LIBRARIES,
    "mask": MASKS,
    "residual": [False, True],
    "relu": [False, True],
    "backend": BACKENDS,
}


ROWS = every_pair(
    AXES, lambda row: len(row.keys() & {"library", "layout"}) < 2 or arrays.can_carry(row["library"], row["layout"])
)
FEW = covering(ROWS, 1)


@pytest.mark.parametrize(
    ("backend", "row"),
    others_full([(row.pop("backend"), row) for row in ROWS], FEW),
    indirect=["backend"],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())),
)
def test_a_step_is_that_of_the_contract(backend, row):
    """Any two values of any two options meet; by default, every value occurs."""
    ghost = Ghost(**row)
    assert_as_expected(ghost, ghost.step())


@pytest.mark.every_value
@pytest.mark.parametrize("shape", [(64, 3), (7, 2, 2100), (40, 65), (6, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("size", [2, 5, 16])
def test_samples_of_other_sizes(backend, shape, size):
    ghost = Ghost(size, shape, relu=True)
    assert_as_expected(ghost, ghost.step())


@settings(max_examples=15)
@given(st.integers(2, 24), st.integers(2, 26), st.integers(0, 99))
def test_any_batch_in_groups_of_any_size(N, size, seed):
    ghost = Ghost(size, (N, 3, 2), "float64" if seed % 2 else "float32", seed=seed, residual=seed % 3 == 0, relu=True)
    assert_as_expected(ghost, ghost.step())


def test_a_group_has_the_bits_of_a_call_on_its_samples(backend):
    ghost = Ghost(4, relu=True, residual=True, mask="all")
    y, gradients, saved, _ = ghost.step()
    for i, group in enumerate(reference.groups(11, 4)):
        state = ghost.state()
        options = {"mask": ghost.mask[group], "residual": ghost.residual[group], "relu": True}
        alone, saved_alone = cubn.forward_train(ghost.x[group], state, **options)
        of_alone = cubn.backward(ghost.dy[group], saved_alone)
        arrays.assert_same(y[group], alone)
        arrays.assert_same(gradients.dx[group], of_alone.dx)
        arrays.assert_same(gradients.dresidual[group], of_alone.dresidual)
        arrays.assert_same(saved.mean[i], saved_alone.mean)


def test_groups_make_a_difference():
    """The control: were the whole batch one group, nothing above would show much."""
    ghost = Ghost(4)
    y, gradients, *_ = ghost.step()
    alone, saved = cubn.forward_train(ghost.x, ghost.state())
    assert not oracle.equal(y, alone) and not oracle.equal(gradients.dx, cubn.backward(ghost.dy, saved).dx)


def test_one_group_is_a_plain_step(backend):
    ghost = Ghost(8, relu=True)
    y, gradients, saved, state = ghost.step()
    plain = ghost.state()
    of_plain, saved_plain = cubn.forward_train(ghost.x, plain, relu=True)
    arrays.assert_same(y, of_plain)
    for got, want in zip(gradients[:3], cubn.backward(ghost.dy, saved_plain)[:3], strict=True):
        arrays.assert_same(got, want)
    arrays.assert_same(saved.var, saved_plain.var[None])
    np.testing.assert_equal(state.to_dict(), plain.to_dict())


def test_gradients_are_those_of_finite_differences():
    ghost = Ghost(3, (8, 2, 3), "float64", residual=True, relu=True, mask="all", seed=3)
    ghost.mask[:, 0] = True
    weights = ghost.dy

    def loss(x, gamma, beta, residual):
        y = []
        for group in reference.groups(8, 3):
            options = {"mask": ghost.mask[group], "residual": residual[group], "relu": True, "eps": EPS}
            y.append(reference.forward_train(x[group], gamma=gamma, beta=beta, **options)[0])
        return float((np.concatenate(y) * weights).sum())

    state = cubn.BatchNormState.from_arrays(gamma=ghost.gamma.astype(float), beta=ghost.beta.astype(float), eps=EPS)
    options = {"groups": 3, "mask": ghost.mask, "residual": ghost.residual, "relu": True}
    _, saved = cubn.forward_train(ghost.x, state, **options)
    found = cubn.backward(weights, saved)
    at = [ghost.x, state.gamma, state.beta, ghost.residual]
    step = 1e-6
    for i, gradient in enumerate(found):
        numeric = np.empty(at[i].shape)
        for j in np.ndindex(at[i].shape):
            sides = []
            for sign in (1, -1):
                moved = [a.copy() for a in at]
                moved[i][j] += sign * step
                sides.append(loss(*moved))
            numeric[j] = (sides[0] - sides[1]) / (2 * step)
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-7)


# --- running statistics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_running_statistics_move_once_by_the_moments_of_the_whole_batch(backend, momentum):
    ghost = Ghost(4)
    ghost.x[5, 2] = np.inf  # which is kept out of them
    by_groups, by_moments = ghost.state(momentum), ghost.state(momentum)
    for _ in range(2):
        cubn.forward_train(ghost.x, by_groups, groups=4)
        cubn.update(by_moments, cubn.moments(ghost.x))
    np.testing.assert_equal(by_groups.to_dict(), by_moments.to_dict())
    assert by_groups.tracked[0] == 2 and by_groups.skipped.tolist() == [0, 0, 2, 0, 0]


def test_without_an_update_the_state_stays(backend):
    ghost = Ghost(4)
    y, _, _, state = ghost.step(update=False)
    arrays.assert_same(y, ghost.expected()[0])
    np.testing.assert_equal(state.to_dict(), ghost.state().to_dict())


# --- out ------------------------------------------------------------------------------------------------------------


def test_y_may_be_written_over_x_or_the_residual(backend):
    ghost = Ghost(4, residual=True, relu=True)
    want, expected = ghost.expected()[0], ghost.step()[3].to_dict()
    for which in ("x", "residual"):
        given = {"x": ghost.x.copy(), "residual": ghost.residual.copy()}
        state, x = ghost.state(), given.pop("x")
        out = x if which == "x" else given["residual"]
        y, saved = cubn.forward_train(x, state, groups=4, relu=True, out=out, **given)
        assert y is out
        arrays.assert_same(y, want)
        np.testing.assert_equal(state.to_dict(), expected)
        if which == "x":
            with pytest.raises(ValueError, match="y was written over it"):
                cubn.backward(ghost.dy, saved)


@pytest.mark.parametrize("library", ["numpy", "jax"], ids=["parameters of NumPy", "parameters of JAX"])
def test_dx_may_be_written_over_dy(backend, library):
    ghost = Ghost(4, relu=True)
    state = ghost.state()
    state.gamma, state.beta = (arrays.carry(store.copy(), library) for store in (ghost.gamma, ghost.beta))
    _, saved = cubn.forward_train(ghost.x, state, groups=4, relu=True)
    dy = ghost.dy.copy()
    found = cubn.backward(dy, saved, out=dy)
    _, dx, _, dgamma, dbeta, *_ = ghost.expected()
    assert found.dx is dy
    for got, want in zip(found[:3], (dx, dgamma, dbeta), strict=True):
        arrays.assert_same(arrays.store_of(got), want)


# --- Saved ----------------------------------------------------------------------------------------------------------


def test_saved_has_a_row_for_each_group(backend):
    ghost = Ghost(4, residual=True, relu=True)
    saved = ghost.step()[2]
    assert saved.count.shape == (2,) and saved.count.dtype == np.int64 and saved.count.tolist() == [48, 84]
    assert saved.mean.shape == saved.var.shape == saved.invstd.shape == (2, 5)
    assert len(saved.relu_bits) == 2
    assert "normalised by those of 2 groups" in repr(saved)
    saved.mean[...] = 0  # a copy
    if backend == "cpu":
        assert saved.mean.any()


def test_a_backward_may_come_twice_and_after_other_forwards(backend):
    ghost = Ghost(4, residual=True, relu=True)
    state = ghost.state()
    _, saved = cubn.forward_train(ghost.x, state, groups=4, **ghost.options())
    first = cubn.backward(ghost.dy, saved)
    state.gamma[...] = 7
    cubn.forward_train(2 * ghost.x, state, groups=3, **ghost.options())
    for got, want in zip(cubn.backward(ghost.dy, saved), first, strict=True):
        arrays.assert_same(got, want)


# --- what it costs --------------------------------------------------------------------------------------------------


def test_groups_of_one_length_share_a_prepared_call(monkeypatch):
    from cubn.backends.cpu.backend import CpuBackend

    made = []
    for name in ("prepare_train", "prepare_backward"):
        honest = getattr(CpuBackend, name)
        monkeypatch.setattr(CpuBackend, name, lambda *a, _made=honest: made.append(a[1].N) or _made(*a))
    ghost = Ghost(4, (102, 4, 4))
    ghost.step()
    assert made == [4, 6, 4, 6]


@pytest.mark.usefixtures("device")
def test_the_host_does_not_wait_for_a_device(device):  # noqa: F811
    ghost = Ghost(4)
    state = cubn.BatchNormState.from_arrays(
        gamma=remote(ghost.gamma), beta=remote(ghost.beta), running_mean=remote(0 * ghost.beta),
        running_var=remote(0 * ghost.beta + 1),
    )  # fmt: skip
    y, saved = cubn.forward_train(remote(ghost.x), state, groups=4)
    gradients = cubn.backward(remote(ghost.dy), saved)
    assert not device.waits
    want = ghost.expected()
    for got, expected in zip((y, *gradients[:3]), (want[0], want[1], want[3], want[4]), strict=True):
        np.testing.assert_array_equal(got.buffer, expected)


@pytest.mark.usefixtures("device")
def test_a_group_without_values_behind_a_mask_on_a_device_adds_nothing(device):  # noqa: F811
    ghost = Ghost(4, (12, 5, 3))
    ghost.mask = np.ones((12, 3), bool)
    ghost.mask[4:8] = False
    state = cubn.BatchNormState.from_arrays(gamma=remote(ghost.gamma), beta=remote(ghost.beta))
    y, saved = cubn.forward_train(remote(ghost.x), state, groups=4, mask=remote(ghost.mask))
    gradients = cubn.backward(remote(ghost.dy), saved)
    want = ghost.expected()
    assert not np.isnan(gradients.dgamma.buffer).any()
    for got, expected in zip((y, *gradients[:3]), (want[0], want[1], want[3], want[4]), strict=True):
        np.testing.assert_array_equal(got.buffer, expected)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_group_that_a_mask_leaves_too_little_of_is_named(backend):
    ghost = Ghost(4, (12, 5, 3), mask="all")
    ghost.mask[4:8] = False
    state, out = ghost.state(), ghost.x.copy()
    before = state.to_dict()
    for present in (0, 1):
        ghost.mask[5, 1] = bool(present)
        text = (
            f"every group; got {present} in group 1, samples 4 to 7. Use larger groups, or leave those samples out of"
        )
        with pytest.raises(ValueError, match=text):
            cubn.forward_train(ghost.x, state, groups=4, mask=ghost.mask, out=out)
    np.testing.assert_equal(state.to_dict(), before)
    np.testing.assert_array_equal(out, ghost.x)
    ghost.mask[5, 2] = True
    cubn.forward_train(ghost.x, state, groups=4, mask=ghost.mask)


@pytest.mark.parametrize("mask_of", ["all", "samples", "positions"])
@pytest.mark.parametrize("kept", [False, True], ids=["without", "with"])
@pytest.mark.parametrize("axis", [0, 1, 3])
def test_values_behind_a_mask_are_counted_group_by_group(mask_of, kept, axis):
    """Of a mask with and without the channel axis."""
    rng = np.random.default_rng(0)
    shape = {0: (2, 9, 3, 4), 1: (9, 2, 3, 4), 3: (9, 3, 4, 2)}[axis]
    extents = {"all": (9, 3, 4), "samples": (9, 1, 1), "positions": (1, 3, 1)}[mask_of]
    mask = rng.random(extents) < 0.6
    given = np.expand_dims(mask, axis) if kept else mask
    inputs = _ghost.GhostTraining(
        2, np.ones(shape), cubn.BatchNormState(2, channel_axis=axis), given, None, False, False, None
    )
    full = np.broadcast_to(mask, (9, 3, 4))
    want = [int(full[group].sum()) for group in reference.groups(9, 2)]
    assert _ghost._present(inputs.inputs, inputs.pieces) == want
