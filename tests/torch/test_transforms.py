"""torch.func, forward mode, dispatch modes and tensor subclasses: they see operators, and eager's bits come out."""

import contextlib

import pytest

torch = pytest.importorskip("torch")

from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import BaseTorchDispatchMode, TorchDispatchMode  # noqa: E402

import cubn.torch as ct  # noqa: E402
from cubn.torch._routes import autograd  # noqa: E402
from tests.torch.comparing import batch, same  # noqa: E402


class Recorder(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "cubn":
            self.seen.append(function._opname)
        return function(*args, **(kwargs or {}))


def add_relu(**options):
    """A module whose parameters are no ones and zeros, and arguments for it."""
    module = ct.BatchNormAddReLU2d(3, **options)
    for i, parameter in enumerate(module.parameters()):
        parameter.data.copy_(torch.linspace(0.5, 1.5 + i, 3))
    return module, batch((4, 3, 2, 2)), batch((4, 3, 2, 2), seed=1)


def loss(y):
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum()


def eager_step(freeze=False):
    """Of `add_relu`: gradients by the parameters, by x and the residual, and the buffers."""
    module, *inputs = add_relu()
    if freeze:
        module.freeze()
    inputs = [each.requires_grad_() for each in inputs]
    loss(module(*inputs)).backward()
    return [p.grad for p in (*module.parameters(), *inputs)], list(module.buffers())


def all_same(a, b):
    assert all(same(p, q) for p, q in zip(a, b, strict=True))


# --- torch.func -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", [False, True])
def test_func_grad_has_the_bits_of_eager(freeze):
    module, *inputs = add_relu()
    if freeze:
        module.freeze()
    parameters = dict(module.named_parameters())

    def of(parameters, *inputs):
        return loss(torch.func.functional_call(module, parameters, inputs))

    (by_parameters, *by_inputs), value = torch.func.grad_and_value(of, argnums=(0, 1, 2))(parameters, *inputs)
    gradients, buffers = eager_step(freeze)
    all_same([*by_parameters.values(), *by_inputs], gradients)
    all_same(module.buffers(), buffers)
    assert value.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_first_and_second_derivatives_are_those_of_finite_differences(training, residual, masked):
    vectors = [torch.linspace(low, 2, 3, dtype=torch.float64) for low in (0.5, -2, -1, 0.5)]
    mask = torch.tensor([[True, False], [True, True], [False, True]]) if masked else None
    running = [None, None] if training else vectors[2:]

    def function(x, weight, bias, residual=None):
        return autograd.batch_norm(x, (weight, bias, *running), None, training, 0.1, 1e-5, mask, residual, True, None)

    inputs = [batch((3, 3, 2), dtype=torch.float64), *vectors[:2]]
    inputs += [batch((3, 3, 2), seed=1, dtype=torch.float64)] if residual else []
    inputs = [each.requires_grad_() for each in inputs]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_a_hessian_by_two_reverse_passes_is_autograds():
    module, x = ct.BatchNorm1d(3).double(), batch((4, 3), dtype=torch.float64)

    def of(x):
        return loss(module(x).sin())

    found = torch.func.jacrev(torch.func.grad(of))(x)
    torch.testing.assert_close(found, torch.autograd.functional.hessian(_of_nn(module), x), rtol=1e-9, atol=1e-9)


def _of_nn(module):
    def of(x):
        return loss(torch.nn.functional.batch_norm(x, None, None, module.weight, module.bias, True).sin())

    return of


@pytest.mark.parametrize("mode", [contextlib.nullcontext, BaseTorchDispatchMode])
@pytest.mark.parametrize("of", ["x", "weight", "dy"])
def test_third_derivatives_are_refused_whatever_they_are_taken_by(of, mode):
    x, weight, dy = (torch.randn(shape, requires_grad=True) for shape in ((4, 3), (3,), (4, 3)))
    by = {"x": x, "weight": weight, "dy": dy}[of]
    with mode():
        y = ct.functional.batch_norm(x, None, None, weight, training=True)
        (first,) = torch.autograd.grad(y, x, dy, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(3).sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"^batch_norm: there are no third derivatives\."):
            torch.autograd.grad(second.sum(), by)


def test_third_derivatives_are_refused():
    module, x = ct.BatchNorm1d(3), batch((4, 3))
    third = torch.func.grad(
        lambda x: torch.func.grad(lambda x: torch.func.grad(lambda x: loss(module(x)))(x).sin().sum())(x).sum()
    )
    with pytest.raises(NotImplementedError, match=r"^batch_norm: there are no third derivatives\."):
        third(x)


@pytest.mark.parametrize("grad", [True, False])
def test_vmap_has_the_bits_of_each_batch(grad):
    module, x, residual = add_relu()
    module.eval()
    xs, residuals = torch.stack([x, 2 * x + 1]), torch.stack([residual, -residual])
    with torch.set_grad_enabled(grad):
        all_same(torch.func.vmap(module)(xs, residuals), [module(a, b) for a, b in zip(xs, residuals, strict=True)])


def test_gradients_of_each_sample_are_those_of_it_alone():
    module, x, residual = add_relu()
    module.freeze()

    def of(x, residual):
        return loss(module(x[None], residual[None]))

    found = torch.func.vmap(torch.func.grad(of, argnums=(0, 1)))(x, residual)
    alone = [torch.func.grad(of, argnums=(0, 1))(a, b) for a, b in zip(x, residual, strict=True)]
    all_same(found[0], [dx for dx, _ in alone])
    all_same(found[1], [dresidual for _, dresidual in alone])


def test_an_ensemble_trains_in_one_vmap():
    models, alone = ([ct.BatchNorm1d(3) for _ in range(2)] for _ in range(2))
    for i, module in enumerate((*models, *alone)):
        module.running_mean.fill_(i % 2)
    parameters, buffers = torch.func.stack_module_state(models)
    x = batch((4, 3))

    def of(parameters, buffers):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    all_same(torch.func.vmap(of)(parameters, buffers), [module(x) for module in alone])
    for name in ("running_mean", "running_var"):
        all_same(buffers[name], [getattr(module, name) for module in alone])


def test_vmap_over_one_module_that_trains_is_refused():
    module, xs = ct.BatchNorm1d(3), torch.stack([batch((4, 3))] * 2)
    text = r"^vmap of batch_norm: running_mean must be mapped along with x .*torch\.func\.stack_module_state"
    with pytest.raises(RuntimeError, match=text):
        torch.func.vmap(module)(xs)
    assert not module.running_mean.any()


# --- forward mode ---------------------------------------------------------------------------------------------------

NO_TANGENT = r"^batch_norm: x must have no forward-mode tangent; got a dual tensor\. Use reverse mode"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore:.*torch.jit")  # torch scripts its decompositions at the first dual
def test_tangents_are_refused_and_never_dropped(training, grad):
    module, x = ct.BatchNorm1d(3).train(training), batch((4, 3))
    with torch.set_grad_enabled(grad):
        with pytest.raises(NotImplementedError, match=NO_TANGENT):
            torch.func.jvp(module, (x,), (x,))
        with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=NO_TANGENT):
            module(torch.autograd.forward_ad.make_dual(x, x))


# --- modes and subclasses -------------------------------------------------------------------------------------------


def test_a_dispatch_mode_sees_every_pass_and_changes_no_bit():
    module, *inputs = add_relu()
    inputs = [each.requires_grad_() for each in inputs]
    with Recorder() as recorder:
        loss(module(*inputs)).backward()
        with torch.no_grad():
            module.eval()(*inputs)
    assert recorder.seen == ["batch_norm_train", "batch_norm_backward", "batch_norm_inference"]
    gradients, buffers = eager_step()
    all_same([p.grad for p in (*module.parameters(), *inputs)], gradients)
    all_same(module.buffers(), buffers)


def test_fake_tensors_go_through_forward_and_backward():
    with FakeTensorMode():
        module = ct.BatchNorm2d(3)
        x = torch.empty(4, 3, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
        y = module(x)
        y.sum().backward()
    assert (y.shape, y.stride(), x.grad.stride()) == (x.shape, x.stride(), x.stride())
    assert type(y) is type(x) is type(x.grad) is not torch.Tensor


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx_records_operators_instead_of_numbers(mode):
    module, x, residual = add_relu()
    module.freeze()

    def function(x, residual):
        y = module(x, residual)
        return y, *torch.autograd.grad(loss(y), (x, residual))

    inputs = x.requires_grad_(), residual.requires_grad_()
    graph = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)(*inputs)
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert torch.ops.cubn.batch_norm_frozen.default in called
    assert torch.ops.cubn.batch_norm_backward.default in called
    others = batch(x.shape, seed=5).requires_grad_(), batch(x.shape, seed=6).requires_grad_()
    all_same(graph(*others), function(*others))


def test_a_subclass_stays_what_it_is():
    class Named(torch.Tensor):
        pass

    module, x, residual = add_relu()
    y = module(x.as_subclass(Named), residual)
    assert type(y) is Named
    assert same(y.as_subclass(torch.Tensor), add_relu()[0](x, residual))


class Watcher(TorchFunctionMode):
    """The names of cubn's operators among the functions that are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "namespace", None) == "cubn":
            self.seen.append(function._opname)
        return function(*args, **(kwargs or {}))


def test_a_function_mode_sees_operators_and_changes_no_bit():
    module, x, residual = add_relu()
    with Watcher() as watcher:
        y = module(x, residual)
    assert watcher.seen == ["batch_norm_train"]
    assert same(y, add_relu()[0](x, residual))
