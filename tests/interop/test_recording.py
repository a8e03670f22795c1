"""Where operations are recorded instead of done, numbers would turn into constants: refused. Who only watches, may."""

import contextlib
import re
import warnings

import numpy as np
import pytest

import cubn

torch = pytest.importorskip("torch")

X = torch.arange(24.0).reshape(4, 3, 2)
REFUSED = "must hold numbers in memory, not stand for them; got a torch."


def state():
    names = ("gamma", "running_mean", "running_var")
    return cubn.BatchNormState.from_arrays(**{name: torch.ones(3, device="cpu") for name in names})


OPERATIONS = {
    "forward": lambda x: cubn.forward(x, state()),
    "forward_train": lambda x: cubn.forward_train(x, state())[0],
    "forward_frozen": lambda x: cubn.forward_frozen(x, state())[0],
    "normalize": lambda x: cubn.normalize(x, cubn.moments(np.ones((4, 3, 2), np.float32))),
    "moments": lambda x: torch.from_numpy(cubn.moments(x).mean),
    "backward": lambda dy: cubn.backward(dy, cubn.forward_train(X, state())[1]).dx,
    "out": lambda x: torch.from_numpy(cubn.forward(x.numpy(), state(), out=x.numpy())),
}
GIVEN_X = [name for name in OPERATIONS if name not in ("backward", "out")]


def make_fx(f, x, **options):
    from torch.fx.experimental import proxy_tensor

    return proxy_tensor.make_fx(f, **options)(x)


class Module(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


def aot(f, x):
    from functorch import compile as functorch

    return functorch.aot_function(f, functorch.nop)(x)


RECORDERS = {
    "jit.trace": torch.jit.trace,
    "jit.trace of a module": lambda f, x: torch.jit.trace(Module(f), x),
    "make_fx": make_fx,
    "make_fx, fake": lambda f, x: make_fx(f, x, tracing_mode="fake"),
    "make_fx, symbolic": lambda f, x: make_fx(f, x, tracing_mode="symbolic"),
    "make_fx, before dispatch": lambda f, x: make_fx(f, x, pre_dispatch=True),
    "fx.symbolic_trace": lambda f, _: torch.fx.symbolic_trace(Module(f)),
    "export": lambda f, x: torch.export.export(Module(f), (x,), strict=False),
    "aot": aot,
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "linearize": lambda f, x: torch.func.linearize(f, x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
}


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracers: deprecations, and constants they do not trace
        yield


@pytest.mark.parametrize("operation", GIVEN_X)
@pytest.mark.parametrize("recorder", RECORDERS)
def test_nothing_is_recorded(recorder, operation):
    with quiet(), pytest.raises(TypeError, match=rf"^\w+: \w+ {re.escape(REFUSED)}"):
        RECORDERS[recorder](OPERATIONS[operation], X.clone())


@pytest.mark.parametrize(
    "recorder", [name for name in RECORDERS if name not in ("vmap", "grad", "jacrev", "linearize")]
)
def test_parameters_are_no_way_around(recorder):
    def fold(gamma):
        held = cubn.BatchNormState.from_arrays(gamma=gamma, running_mean=torch.ones(3), running_var=torch.ones(3))
        return cubn.fold(held)[0]

    with quiet(), pytest.raises(TypeError, match=rf"^\w+: \w+ {re.escape(REFUSED)}"):
        RECORDERS[recorder](fold, torch.ones(3))


@pytest.mark.parametrize(
    ("recorder", "name"),
    [
        ("jit.trace", "torch.Tensor under torch.jit.trace"),
        ("make_fx", "torch.Tensor under make_fx or torch.export"),
        ("make_fx, before dispatch", "torch.Tensor under make_fx or torch.export"),
        ("fx.symbolic_trace", "torch.Proxy"),
    ],
)
def test_the_recorder_is_named(recorder, name):
    with quiet(), pytest.raises(TypeError, match=re.escape(f"stand for them; got a {name}")):
        RECORDERS[recorder](OPERATIONS["forward"], X.clone())


@pytest.mark.parametrize("transformation", ["functionalize", "grad"])
def test_a_transformation_makes_no_output_for_a_tensor_from_outside(transformation):
    held = state()
    value = torch.ones(()) if transformation == "grad" else torch.ones(2)
    with pytest.raises(TypeError, match=r"^cubn: an output must hold numbers in memory"):
        getattr(torch.func, transformation)(lambda a: a * cubn.forward(X, held).sum())(value)


@pytest.mark.parametrize("transformation", ["grad", "jvp", "vmap"])
def test_tensors_from_outside_a_transformation_are_read(transformation):
    """On the host: torch.func lets nobody read them through torch."""
    held, x, mask = state(), X[:, :, 0], torch.ones(len(X), dtype=torch.bool)
    expected = cubn.fold(held)[0].sum(), held.to_dict(), cubn.moments(x, mask=mask).mean
    found = []

    def f(a):
        found.append((cubn.fold(held)[0].sum(), held.to_dict(), cubn.moments(x, mask=mask).mean))
        cubn.BatchNormState.from_arrays(running_mean=held.running_mean, running_var=held.running_var)
        return a.sum()

    given = torch.ones(2)
    transform = getattr(torch.func, transformation)
    with quiet():
        transform(f, (given,), (given,)) if transformation == "jvp" else transform(f)(given)
    np.testing.assert_equal(found[0][1:], expected[1:])


def test_a_plain_tensor_under_a_mode_that_fakes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(TypeError, match=r"got a torch.Tensor under FakeTensorMode"):
        cubn.moments(X)


def test_jax_shapes_without_numbers():
    jax = pytest.importorskip("jax")
    x = jax.ShapeDtypeStruct((2, 3), "float32")
    with pytest.raises(TypeError, match=r"not stand for them; got a jax.ShapeDtypeStruct \(shape=\(2, 3\)"):
        cubn.moments(x)


# --- who only watches -----------------------------------------------------------------------------------------------


class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class WatchingFunctions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def counter():
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


WATCHERS = {
    "a device": lambda: torch.device("cpu"),
    "another device": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "anomalies": torch.autograd.detect_anomaly,
    "a counter of operations": counter,
    "a dispatch mode": Watching,
    "a function mode": WatchingFunctions,
    "a dual level": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("watcher", WATCHERS)
def test_watchers_change_nothing(watcher, operation):
    expected = OPERATIONS[operation](X.clone())
    with quiet(), WATCHERS[watcher]():
        y = OPERATIONS[operation](X.clone())
    assert type(y) is type(expected)
    assert np.array_equal(np.asarray(y), np.asarray(expected))


def test_checkpoints_change_nothing():
    from torch.utils import checkpoint

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return OPERATIONS["forward"](x.detach())

        @staticmethod
        def backward(ctx, dy):
            return dy

    policy = checkpoint.CheckpointPolicy
    for kept in (policy.MUST_SAVE, policy.PREFER_RECOMPUTE):
        x = X.clone().requires_grad_()
        contexts = lambda kept=kept: checkpoint.create_selective_checkpoint_contexts(lambda *a, **k: kept)  # noqa: E731
        y = checkpoint.checkpoint(Forward.apply, x, use_reentrant=False, context_fn=contexts)
        y.sum().backward()
        assert torch.equal(y, OPERATIONS["forward"](X)) and torch.equal(x.grad, torch.ones_like(x))


def test_a_compiled_function_computes_outside_of_its_graph():
    with quiet():
        compiled = torch.compile(OPERATIONS["forward"], backend="eager")
        for x in (X.clone(), X + 1):
            assert torch.equal(compiled(x), OPERATIONS["forward"](x))


def test_a_graph_without_breaks_is_an_error():
    torch._dynamo.reset()
    with quiet(), pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(OPERATIONS["forward"], backend="eager", fullgraph=True)(X.clone())
    with quiet(), pytest.raises((TypeError, torch._dynamo.exc.Unsupported)):
        torch.export.export(Module(OPERATIONS["forward"]), (X.clone(),), strict=True)


def test_a_tensor_from_outside_of_vmap_is_only_numbers():
    y = torch.func.vmap(lambda a: a * cubn.forward(X, state()).sum())(torch.ones(2))
    assert torch.equal(y, OPERATIONS["forward"](X).sum().expand(2))
