"""Calls whose signature is known: the same bits and the same errors as the first call, by a short way."""

import gc
import subprocess
import sys
import threading
import warnings
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cubn
from cubn import _calls
from cubn._differentiation import BACKWARDS
from cubn._kept import ENTRY
from tests.ops import arrays

MOST_FRAMES = {"forward": 12, "forward_train": 30, "backward": 25}
MOST_FILES = 6
FULL_WAYS = (
    *(("cubn.forward", name) for name in ("_forward", "_forward_frozen", "_normalize")),
    *(("cubn.moments", name) for name in ("_moments", "_update")),
    *(("cubn.forward_train", "Training"), ("cubn.backward", "Differentiation")),
)


@contextmanager
def only_the_short_way():
    """Fail where a call goes the full way."""

    def refuse(*arguments, **options):
        raise AssertionError("the full way")

    with pytest.MonkeyPatch.context() as patch:
        for module, name in FULL_WAYS:
            patch.setattr(sys.modules[module], name, refuse)
        yield


def normal(shape, dtype="float32", layout="nchw", library="numpy", seed=0):
    """(array of a library in a layout, channel axis)."""
    store, axis = arrays.lay_out(arrays.normal(np.random.default_rng(seed), shape, dtype), layout)
    return arrays.carry(store, library), axis


def fresh(x, axis, **options):
    return cubn.BatchNormState(x.shape[axis], channel_axis=axis, like=x, **options)


def step(x, state, dy, **options):
    """Everything that the operations give, one after the other, as stores."""
    y, saved = cubn.forward_train(x, state, **options)
    gradients = cubn.backward(dy, saved)
    inferred = cubn.forward(x, state, **options)
    found = [y, *gradients, inferred, saved.mean, saved.invstd]
    y, saved = cubn.forward_frozen(x, state, **options)
    found += [y, *cubn.backward(dy, saved), saved.mean, saved.invstd]
    mask, axis = options.get("mask"), state.channel_axis
    taken = cubn.moments(x, channel_axis=axis, mask=mask)
    found += [taken.mean, taken.m2]
    found.append(cubn.normalize(x, taken, gamma=state.gamma, beta=state.beta, channel_axis=axis, **options))
    cubn.update(state, taken)
    found += [state.running_mean, state.running_var, state.tracked]
    return [arrays.store_of(a).copy() for a in found if a is not None]


# --- what it costs --------------------------------------------------------------------------------------------------


def entered(call):
    """The files of all Python functions that a call enters."""
    files = []

    def note(frame, event, argument):
        if event == "call":
            files.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return files[1:]  # without the lambda


@pytest.mark.parametrize("name", MOST_FRAMES)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_warm_call_enters_few_functions_in_few_files(library, name):
    x, axis = normal((8, 16, 2, 2), library=library)
    state = fresh(x, axis)
    y, saved = cubn.forward_train(x, state)
    call = {
        "forward": lambda: cubn.forward(x, state),
        "forward_train": lambda: cubn.forward_train(x, state),
        "backward": lambda: cubn.backward(y, saved),
    }[name]
    call()
    files = entered(call)
    assert 1 < len(files) <= MOST_FRAMES[name]
    assert len({file for file in files if "torch" not in file.split("/")}) <= MOST_FILES


SHAPES = """
import itertools, sys
import numpy as np
import cubn

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

state = cubn.BatchNormState(3)
values = np.random.default_rng(0).standard_normal(102 * 3 * 201).astype(np.float32)
for i, (N, S) in enumerate(itertools.product(range(2, 102), range(1, 201)), 1):
    x = values[: N * 3 * S].reshape(N, 3, S)
    y, saved = cubn.forward_train(x, state)
    if i % 10 == 0:
        cubn.forward(x, state), cubn.backward(y, saved), cubn.moments(x)
    if i == 5_000:
        before = resident()
print(i, resident() - before)
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_twenty_thousand_shapes_take_bounded_memory():
    done = subprocess.run([sys.executable, "-c", SHAPES], capture_output=True, text=True, timeout=900, check=True)
    shapes, grown = map(int, done.stdout.split())
    assert shapes == 20_000
    assert grown < 16 << 20


def test_the_oldest_calls_make_way(monkeypatch):
    store = _calls.new_store()
    monkeypatch.setattr(store, "_most", 10 * ENTRY)
    monkeypatch.setattr(sys.modules["cubn.forward"], "FORWARDS", store)
    state, x = cubn.BatchNormState(3), np.ones((2, 3, 99), np.float32)
    kept = x[:, :, :1]
    for S in range(1, 99):
        cubn.forward(x[:, :, :S], state)
        assert store.nbytes <= 10 * ENTRY
        cubn.forward(kept, state)
    with only_the_short_way():
        cubn.forward(kept, state)
    with pytest.raises(AssertionError), only_the_short_way():
        cubn.forward(x[:, :, :5], state)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_what_is_kept_keeps_no_array_of_a_caller_alive(library):
    _calls.clear()
    x, axis = normal((4, 5, 3), library=library)
    residual, _ = normal((4, 5, 3), library=library, seed=1)
    state = fresh(x, axis)
    for options in ({}, {"residual": residual, "relu": True}, {"out": residual}):
        step(x, state, residual, **options)
    watched = [weakref.ref(array) for array in (x, residual, state.gamma, state.running_var)]
    del x, residual, state, options
    gc.collect()
    assert [array() for array in watched] == [None] * 4


# --- the same bits --------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_a_known_signature_gives_the_bits_of_the_full_way(data):
    draw = data.draw
    library = draw(st.sampled_from(["numpy", "torch"]))
    layout = draw(st.sampled_from([name for name in arrays.LAYOUTS if arrays.can_carry(library, name)]))
    dtype = draw(st.sampled_from(arrays.DTYPES))
    shape = draw(st.tuples(st.integers(2, 6), st.integers(1, 20), st.integers(1, 5), st.integers(1, 5)))
    options = {"relu": draw(st.booleans())}
    with_residual, with_mask = draw(st.booleans()), draw(st.booleans())

    def inputs(seed):
        x, axis = normal(shape, dtype, layout, library, seed)
        dy, _ = normal(shape, dtype, "nchw" if layout == "broadcast" else layout, library, seed + 1)
        more = {}
        if with_residual:
            more["residual"], _ = normal(shape, dtype, layout, library, seed + 2)
        if with_mask:
            mask = np.ones((shape[0], 1, 1), bool)
            mask[seed % 2] = shape[0] == 2
            more["mask"] = arrays.carry(mask, library)
        return x, axis, dy, more

    first, second = inputs(10), inputs(21)
    _calls.clear()
    x, axis, dy, more = second
    expected = step(x, fresh(x, axis), dy, **more, **options)
    _calls.clear()
    x, axis, dy, more = first
    step(x, fresh(x, axis), dy, **more, **options)
    x, axis, dy, more = second
    with only_the_short_way():
        found = step(x, fresh(x, axis), dy, **more, **options)
    for a, b in zip(found, expected, strict=True):
        arrays.assert_same(a, b)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("where", ["x", "residual", "apart"])
def test_a_given_out_is_written_as_by_the_full_way(library, where):
    def call():
        (x, axis), (residual, _), (out, _) = (normal((4, 5, 3), library=library, seed=s) for s in (1, 2, 3))
        state = fresh(x, axis)
        out = {"x": x, "residual": residual, "apart": out}[where]
        y, saved = cubn.forward_train(x, state, residual=residual, relu=True, out=out)
        assert y is out
        return y, saved, state

    _calls.clear()
    expected, *_ = call()
    with only_the_short_way():
        found, saved, _ = call()
    arrays.assert_same(arrays.store_of(found), arrays.store_of(expected))
    if where == "x":
        with pytest.raises(ValueError, match="y was written over it"):
            cubn.backward(found, saved)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_dresidual_has_the_layout_of_x_beside_an_out_of_another(library):
    (x, axis), (dy, _) = (normal((4, 5, 3, 2), library=library, seed=s) for s in (1, 2))
    out, _ = normal((4, 5, 3, 2), layout="channels_last", library=library)
    _, saved = cubn.forward_train(x, fresh(x, axis), residual=dy, relu=True)
    _calls.clear()
    expected = cubn.backward(dy, saved, out=out)
    dx, dresidual = (arrays.store_of(a).copy() for a in (out, expected.dresidual))
    with only_the_short_way():
        found = cubn.backward(dy, saved, out=out)
    arrays.assert_same(arrays.store_of(found.dx), dx)
    arrays.assert_same(arrays.store_of(found.dresidual), dresidual)
    assert arrays.store_of(found.dresidual).strides == arrays.store_of(expected.dresidual).strides


def test_eps_and_momentum_are_those_of_the_call():
    x, axis = normal((4, 5, 3))
    for eps, momentum in ((1e-5, 0.1), (1e-2, 0.9), (1e-3, None)):
        _calls.clear()
        expected = step(x, fresh(x, axis, eps=eps, momentum=momentum), x)
        step(x, fresh(x, axis), x)
        with only_the_short_way():
            state = fresh(x, axis)
            state.eps, state.momentum = eps, momentum
            found = step(x, state, x)
        for a, b in zip(found, expected, strict=True):
            arrays.assert_same(a, b)


def test_many_threads_with_changing_shapes_update_one_state():
    """Every batch has mean 0 and variance 1, so that the order in which threads come does not matter."""
    C, calls = 5, 1000
    state = cubn.BatchNormState(C, momentum=0.5, running_variance="biased")
    state.running_mean[:], state.running_var[:] = 3, 7
    shapes = [(N, C, S) for N in (2, 4, 6) for S in (1, 3, 17)]
    batches = [np.resize(np.float32([1, -1]), (N, S, C)).transpose(0, 2, 1) * 1.0 for N, _, S in shapes]
    for x in batches:
        x[:] = np.where(np.arange(len(x)) % 2, -1, 1)[:, None, None]
    expected = [cubn.forward_train(x, state, update=False) for x in batches]
    wrong = []

    def work(start):
        for i in range(start, start + calls):
            x, (y, saved) = batches[i % len(batches)], expected[i % len(batches)]
            found, kept = cubn.forward_train(x, state)
            gradient = cubn.backward(x, kept).dx
            if (found != y).any() or (kept.mean != saved.mean).any() or not np.isfinite(gradient).all():
                wrong.append(x.shape)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (state.tracked == 8 * calls).all()
    alone = cubn.BatchNormState(C, momentum=0.5, running_variance="biased")
    alone.running_mean[:], alone.running_var[:] = 3, 7
    for i in range(200):  # by then nothing changes any more
        cubn.forward_train(batches[i % len(batches)], alone)
    arrays.assert_same(state.running_mean, alone.running_mean)
    arrays.assert_same(state.running_var, alone.running_var)


# --- what goes the full way -----------------------------------------------------------------------------------------

X = np.random.default_rng(5).standard_normal((4, 3, 2)).astype(np.float32)


def read_only(array):
    view = array.view()
    view.flags.writeable = False
    return view


class Warm:
    """A state and arrays whose signatures are known, in NumPy."""

    def __init__(self):
        self.x, self.dy, self.out = X.copy(), X.copy(), np.empty_like(X)
        self.mask = np.ones((4, 2), bool)
        self.state = cubn.BatchNormState(3)
        for options in ({}, {"out": self.out}, {"mask": self.mask}, {"residual": X.copy()}):
            cubn.forward(self.x, self.state, **options)
            _, self.saved = cubn.forward_train(self.x, self.state, **options)
        _, self.saved = cubn.forward_train(self.x, self.state)
        for options in ({}, {"out": self.out}):
            cubn.backward(self.dy, self.saved, **options)


def overwrite_running(w):
    w.state.running_mean.flags.writeable = False


def convert_running(w):
    w.state.running_var.dtype = np.int32


MISTAKES = {
    "a read-only out": lambda w: cubn.forward(w.x, w.state, out=read_only(w.out)),
    "a read-only out of a training step": lambda w: cubn.forward_train(w.x, w.state, out=read_only(w.out)),
    "a read-only out of a backward": lambda w: cubn.backward(w.dy, w.saved, out=read_only(w.out)),
    "an out that overlaps x": lambda w: cubn.forward(
        (long := np.zeros(28, np.float32))[:24].reshape(4, 3, 2), w.state, out=long[4:].reshape(4, 3, 2)
    ),
    "an out over x in a backward": lambda w: cubn.backward(w.dy, w.saved, out=w.x),
    "relu=1": lambda w: cubn.forward(w.x, w.state, relu=1),
    "update=0": lambda w: cubn.forward_train(w.x, w.state, update=0),
    "update=1 where True is known": lambda w: cubn.forward_train(w.x, w.state, update=1),
    "another number of channels": lambda w: cubn.forward(w.x[:, :2].copy(), w.state),
    "a mask that lets one value through": lambda w: cubn.forward_train(
        w.x, w.state, mask=w.mask & (w.mask.cumsum().reshape(4, 2) == 1)
    ),
    "a mask of integers": lambda w: cubn.forward(w.x, w.state, mask=w.mask.view(np.uint8)),
    "another byte order": lambda w: cubn.forward(w.x.astype(">f4"), w.state),
    "a subclass": lambda w: cubn.forward(np.ma.masked_array(w.x), w.state),
    "a list": lambda w: cubn.forward(w.x.tolist(), w.state),
    "no state": lambda w: cubn.forward(w.x, None),
    "running statistics that became read-only": lambda w: (overwrite_running(w), cubn.forward_train(w.x, w.state)),
    "running statistics that became integers": lambda w: (convert_running(w), cubn.forward(w.x, w.state)),
    "x with another shape since": lambda w: (setattr(w.x, "shape", (2, 3, 4)), cubn.backward(w.dy, w.saved)),
    "dy of another dtype": lambda w: cubn.backward(w.dy.astype(np.float64), w.saved),
    "statistics of a training forward": lambda w: cubn.backward(w.dy, w.saved, statistics=True),
    "parameter_gradients of an array": lambda w: cubn.backward(w.dy, w.saved, parameter_gradients=w.x),
    "sizes without comm": lambda w: cubn.forward_train(w.x, w.state, sizes=[4]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_after_good_calls_meets_the_error_it_meets_at_once(mistake):
    make = MISTAKES[mistake]
    warm = Warm()
    before = warm.state.copy()
    _calls.clear()
    cold = Warm()
    _calls.clear()
    with pytest.raises((TypeError, ValueError)) as at_once:
        make(cold)
    warm = Warm()
    before = {name: np.array(a) for name, a in warm.state.to_dict().items() if isinstance(a, np.ndarray)}
    x, dy, out = warm.x.copy(), warm.dy.copy(), warm.out.copy()
    with pytest.raises(type(at_once.value)) as later:
        make(warm)
    assert str(later.value) == str(at_once.value)
    arrays.assert_same(warm.x.reshape(x.shape), x)
    arrays.assert_same(warm.dy, dy)
    arrays.assert_same(warm.out, out)
    if "became" not in mistake:
        for name, value in before.items():
            arrays.assert_same(np.array(warm.state.to_dict()[name]), value)


def test_momentum_that_is_no_weight_is_refused_though_others_were_not():
    x, axis = normal((4, 5, 3))
    cubn.forward_train(x, fresh(x, axis))
    held = {"running_mean": np.zeros(5, np.float32), "running_var": np.ones(5, np.float32)}
    with pytest.raises(ValueError, match="momentum must be None or from 0 to 1"):
        cubn.forward_train(x, cubn.BatchNormState.from_arrays(**held, momentum=2.0))


def test_one_state_is_not_taken_for_another():
    """Whose arrays are in other places, of another dtype, missing or exchanged."""
    x, axis = normal((4, 5, 3))
    step(x, fresh(x, axis), x)
    for options in ({"affine": False}, {"track": False}, {"dtype": "float64"}, {"running_variance": "biased"}):
        state = fresh(x, axis, **options)
        if not options.get("track", True):
            with pytest.raises(ValueError, match="have running statistics"):
                cubn.forward(x, state)
            continue
        found = step(x, state, x)
        _calls.clear()
        expected = step(x, fresh(x, axis, **options), x)
        for a, b in zip(found, expected, strict=True):
            arrays.assert_same(a, b)
    state = fresh(x, axis)
    step(x, state, x)
    state.gamma = np.full(5, 2, np.float32)
    assert (cubn.forward(x, state) == 2 * cubn.forward(x, fresh_like(state))).all()


def fresh_like(state):
    """The state with a gamma of 1."""
    other = state.copy()
    other.gamma = np.ones(5, np.float32)
    return other


def test_a_class_of_states_with_options_of_its_own_is_not_taken_for_another():
    class Elsewhere(cubn.BatchNormState):
        @property
        def channel_axis(self):
            return 2

    x, axis = normal((4, 3, 3))
    state, other = fresh(x, axis), Elsewhere(3)
    state.running_var = other.running_var = np.float32([1, 4, 9])
    _calls.clear()
    expected = cubn.forward(x, state)
    _calls.clear()
    cubn.forward(x, other)
    arrays.assert_same(cubn.forward(x, state), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_is_that_of_the_call(threads):
    x, axis = normal((64, 40, 20, 20))
    cubn.set_num_threads(1)
    expected = step(x, fresh(x, axis), x)
    cubn.set_num_threads(threads)
    found = step(x, fresh(x, axis), x)
    for a, b in zip(found, expected, strict=True):
        arrays.assert_same(a, b)


# --- PyTorch --------------------------------------------------------------------------------------------------------


def torch_mistakes(torch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    def under_fake_mode(w):
        with FakeTensorMode():
            cubn.forward(w.x, w.state)

    def beside_numpy(w):
        _, saved = cubn.forward_train(X, w.state)
        cubn.backward(X, saved)
        with FakeTensorMode():
            cubn.backward(X, saved)

    def freed(w):
        w.x.untyped_storage().resize_(0)
        cubn.forward(w.x, w.state)

    def cut(w):
        w.x.untyped_storage().resize_(8)
        cubn.forward(w.x, w.state)

    def written(w):
        w.x.add_(1)
        cubn.backward(w.dy, w.saved)

    def differentiated(call):
        return lambda w: torch.func.grad(lambda scale: scale * call(w).sum())(torch.ones(()))

    return {
        "a forward differentiated by something else": differentiated(lambda w: cubn.forward(w.x, w.state)),
        "a backward differentiated by something else": differentiated(lambda w: cubn.backward(w.dy, w.saved).dx),
        "x of NumPy, and parameters under a fake mode": beside_numpy,
        "functionalization": lambda w: torch.func.functionalize(lambda scale: scale * cubn.forward(w.x, w.state))(
            torch.ones(())
        ),
        "x requires a gradient": lambda w: cubn.forward(w.x.requires_grad_(), w.state),
        "out requires a gradient": lambda w: cubn.forward(w.x, w.state, out=w.out.requires_grad_()),
        "dy requires a gradient": lambda w: cubn.backward(w.dy.requires_grad_(), w.saved),
        "a dual tensor": lambda w: dual(torch, w),
        "a fake mode": under_fake_mode,
        "a freed storage": freed,
        "a cut storage": cut,
        "x written since": written,
        "a sparse x": lambda w: cubn.forward(w.x.to_sparse(), w.state),
        "a meta x": lambda w: cubn.forward(w.x.to("meta"), w.state),
        "an expanded out": lambda w: cubn.forward(w.x, w.state, out=w.out[:1].expand(4, 3, 2)),
    }


def dual(torch, w):
    with torch.autograd.forward_ad.dual_level(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own use of torch.jit
        cubn.forward(torch.autograd.forward_ad.make_dual(w.x, w.dy), w.state)


class WarmTorch:
    def __init__(self, torch):
        self.x, self.dy, self.out = (torch.from_numpy(X).clone() for _ in range(3))
        self.state = cubn.BatchNormState(3, like=self.x)
        for options in ({}, {"out": self.out}):
            cubn.forward(self.x, self.state, **options)
            cubn.forward_train(self.x, self.state, **options)
        _, self.saved = cubn.forward_train(self.x, self.state)
        cubn.backward(self.dy, self.saved)


TORCH_MISTAKES = (
    "a forward differentiated by something else",
    "a backward differentiated by something else",
    "x of NumPy, and parameters under a fake mode",
    "functionalization",
    *("x requires a gradient", "out requires a gradient", "dy requires a gradient", "a dual tensor", "a fake mode"),
    *("a freed storage", "a cut storage", "x written since", "a sparse x", "a meta x", "an expanded out"),
)


@pytest.mark.parametrize("mistake", TORCH_MISTAKES)
def test_a_mistake_with_tensors_meets_the_error_it_meets_at_once(mistake):
    torch = pytest.importorskip("torch")
    make = torch_mistakes(torch)[mistake]
    cold = WarmTorch(torch)
    _calls.clear()
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as at_once:
        make(cold)
    warm = WarmTorch(torch)
    with pytest.raises(type(at_once.value)) as later:
        make(warm)
    assert str(later.value) == str(at_once.value)


def test_tensors_that_a_mapped_function_knows_are_plain_ones():
    torch = pytest.importorskip("torch")
    warm = WarmTorch(torch)
    expected = cubn.forward(warm.x, warm.state)
    seen = []
    torch.func.vmap(lambda scale: seen.append(cubn.forward(warm.x, warm.state)) or scale)(torch.ones(2))
    assert torch.equal(seen[0], expected)


ELSEWHERE = {
    "freed": lambda torch, gamma: gamma.new_empty(0),
    "shorter": lambda torch, gamma: gamma[:1].clone(),
    "wider": lambda torch, gamma: gamma.double(),
    "narrower": lambda torch, gamma: gamma.half(),
    "of two axes": lambda torch, gamma: gamma[:, None].clone(),
}


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
def test_gradients_fit_the_parameters_of_the_forward_whatever_became_of_them(elsewhere):
    """As sharded training does with them between the two, and `module.half()`."""
    torch = pytest.importorskip("torch")
    warm = WarmTorch(torch)
    expected = cubn.backward(warm.dy, warm.saved)
    for parameter in (warm.state.gamma, warm.state.beta):
        parameter.data = ELSEWHERE[elsewhere](torch, parameter.data)
    with only_the_short_way():
        found = cubn.backward(warm.dy, warm.saved)
    _calls.clear()
    for gradients in (found, cubn.backward(warm.dy, warm.saved)):
        for a, b in zip(gradients[:3], expected[:3], strict=True):
            assert a.dtype == b.dtype
            assert a.device == b.device
            assert torch.equal(a, b)


def test_gradients_of_parameters_are_plain_tensors():
    torch = pytest.importorskip("torch")

    class Marked(torch.Tensor):
        pass

    warm = WarmTorch(torch)
    state = cubn.BatchNormState.from_arrays(gamma=torch.ones(3).as_subclass(Marked), beta=torch.zeros(3))
    for _ in range(3):
        _, saved = cubn.forward_train(warm.x, state)
        assert type(cubn.backward(warm.dy, saved).dgamma) is torch.Tensor


def test_tensors_that_were_written_have_newer_versions():
    torch = pytest.importorskip("torch")
    warm = WarmTorch(torch)
    watched = warm.out, warm.state.running_mean, warm.state.running_var
    before = [tensor._version for tensor in watched]
    with only_the_short_way():
        cubn.forward_train(warm.x, warm.state, out=warm.out)
    assert all(tensor._version > version for tensor, version in zip(watched, before, strict=True))
    assert warm.x._version == 0


def test_state_tensors_that_moved_are_found():
    """`x.data = y` moves a tensor behind everybody's back, as `module.to()` does."""
    torch = pytest.importorskip("torch")
    warm = WarmTorch(torch)
    warm.state.gamma.data = torch.full((3,), 2.0)
    other = warm.state.copy()
    _calls.clear()
    expected = cubn.forward(warm.x, other)
    assert torch.equal(cubn.forward(warm.x, warm.state), expected)
    warm.state.gamma.data = torch.ones(3, dtype=torch.float64)
    assert torch.equal(2 * cubn.forward(warm.x, warm.state), expected)


def test_the_call_of_a_backward_is_for_an_x_that_begins_where_that_of_its_forward_did():
    """A device reads vectors, for which the address of x is to be a multiple of 16."""
    torch = pytest.importorskip("torch")
    memory, state = torch.randn(61), cubn.BatchNormState(3)
    _calls.clear()
    for begin in (0, 1, 0):
        x = memory[begin : begin + 60].view(4, 3, 5)
        _, saved = cubn.forward_train(x, state)
        cubn.backward(torch.ones(4, 3, 5), saved)
        (entry,) = BACKWARDS.entries.values()
        assert entry.value.facts.x == _calls.signature(x)[0]


def test_a_call_during_which_options_changed_is_not_kept(monkeypatch):
    """By another thread, say: it was prepared for one channel axis, and would be found for another."""
    x = np.random.default_rng(0).standard_normal((4, 3, 3)).astype(np.float32)
    state, other = cubn.BatchNormState(3, channel_axis=1), cubn.BatchNormState(3, channel_axis=2)
    other.gamma[:] = state.gamma[:] = 1, 2, 3
    read = type(state)._read
    _calls.clear()
    expected = cubn.forward(x, other)
    _calls.clear()

    def changed_meanwhile(self, array):
        held = read(self, array)
        self.channel_axis = 2
        return held

    with monkeypatch.context() as patch:
        patch.setattr(type(state), "_read", changed_meanwhile)
        cubn.forward(x, state)
    arrays.assert_same(cubn.forward(x, other), expected)
