"""A state of a torch module: its tensors in place, its options, and what it was before."""

import copy

import numpy as np
import pytest

import cubn
from tests.ops.arrays import assert_same

torch = pytest.importorskip("torch")

X = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
MODULES = {
    "plain": lambda: torch.nn.BatchNorm1d(4),
    "eps": lambda: torch.nn.BatchNorm1d(4, eps=1.0, momentum=0.25),
    "cumulative": lambda: torch.nn.BatchNorm1d(4, momentum=None),
    "no parameters": lambda: torch.nn.BatchNorm1d(4, affine=False),
    "no statistics": lambda: torch.nn.BatchNorm1d(4, track_running_stats=False),
    "neither": lambda: torch.nn.BatchNorm1d(4, affine=False, track_running_stats=False),
    "synchronised": lambda: torch.nn.SyncBatchNorm(4),
    "subclass": lambda: type("Own", (torch.nn.BatchNorm1d,), {})(4),
}


def drawn(module):
    """The module with other parameters than at first."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.linspace(-1, 2, 4))
    return module


@pytest.mark.parametrize("kind", MODULES)
def test_training_by_a_module_s_state_is_the_module_s(kind):
    module = drawn(MODULES[kind]())
    reference = copy.deepcopy(module)
    if kind == "synchronised":  # which torch runs on GPUs alone
        reference = torch.nn.BatchNorm1d(4)
        reference.load_state_dict(module.state_dict())
    for batches in range(3):  # the state is made anew each time, as after loading
        state = cubn.BatchNormState.from_module(module)
        assert state.gamma is module.weight and state.beta is module.bias
        assert state.running_mean is module.running_mean and state.running_var is module.running_var
        assert (state.eps, state.momentum, state.channel_axis) == (module.eps, module.momentum, 1)
        assert state.tracked is None or (state.tracked == batches).all()
        x = X * (batches + 1) + batches
        y, _ = cubn.forward_train(x, state)
        torch.testing.assert_close(y, reference(x).detach(), rtol=1e-5, atol=1e-5)
        if state.tracked is not None:
            torch.testing.assert_close(module.running_mean, reference.running_mean)
            torch.testing.assert_close(module.running_var, reference.running_var)
            assert (state.tracked == batches + 1).all()
            module.num_batches_tracked += 1
    if state.tracked is not None:
        torch.testing.assert_close(cubn.forward(X, state), reference.eval()(X).detach(), rtol=1e-5, atol=1e-5)


class Holder(torch.nn.Module):
    """A model that holds a module and its state."""

    def __init__(self):
        super().__init__()
        self.bn = torch.nn.BatchNorm1d(4)
        self.state = cubn.BatchNormState.from_module(self.bn)


def test_a_copied_model_s_state_is_of_the_copied_module():
    model = Holder()
    cubn.forward_train(X, model.state)
    copied = copy.deepcopy(model)
    assert copied.state.gamma is copied.bn.weight and copied.state.beta is copied.bn.bias
    assert copied.state.running_mean is copied.bn.running_mean and copied.state.running_var is copied.bn.running_var
    np.testing.assert_equal(copied.state.to_dict(), model.state.to_dict())
    before = copy.deepcopy(model.state.to_dict())
    cubn.forward_train(X, copied.state)
    assert torch.equal(copied.bn.running_mean, copied.state.running_mean)
    np.testing.assert_equal(model.state.to_dict(), before)
    assert (copied.state.tracked == 2).all()


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
def test_inference_of_a_converted_module(convert):
    module = drawn(torch.nn.BatchNorm1d(4))
    module(X)
    module = getattr(module.eval(), convert)()
    state = cubn.BatchNormState.from_module(module)
    x = X.to(module.weight.dtype)
    expected = torch.nn.functional.batch_norm(
        *(v.double() for v in (x, module.running_mean, module.running_var, module.weight, module.bias)), eps=module.eps
    )
    for y in (cubn.forward(x, state), cubn.forward_frozen(x, state)[0]):
        assert y.dtype == x.dtype
        rounding = torch.finfo(x.dtype).eps if convert != "double" else 1e-12
        torch.testing.assert_close(y.double(), expected.detach(), rtol=rounding, atol=rounding)
    scale, shift = cubn.fold(state)
    assert scale.dtype == x.dtype
    widened = [v.detach().double() for v in (module.weight, module.bias, module.running_mean, module.running_var)]
    gamma, beta, mean, var = widened
    exact = gamma / (var + module.eps).sqrt()
    assert torch.equal(scale, exact.to(x.dtype))
    assert torch.equal(shift, (beta - mean * exact).to(x.dtype))


@pytest.mark.parametrize("how", ["assign", "deepcopy", "tensor"])
def test_a_module_that_got_other_tensors_needs_another_state(how):
    module = torch.nn.BatchNorm1d(4)
    state = cubn.BatchNormState.from_module(module)
    match how:
        case "assign":
            module.load_state_dict(torch.nn.BatchNorm1d(4).state_dict(), assign=True)
        case "deepcopy":
            module = copy.deepcopy(module)
        case "tensor":
            module.running_mean = torch.zeros(4)
    cubn.forward_train(X + 1, state)
    assert not module.running_mean.any()
    cubn.forward_train(X + 1, cubn.BatchNormState.from_module(module))
    assert module.running_mean.all()


def test_a_loaded_state_dict_is_seen():
    module, other = torch.nn.BatchNorm1d(4), torch.nn.BatchNorm1d(4)
    other(X)
    state = cubn.BatchNormState.from_module(module)
    module.load_state_dict(other.state_dict())
    assert_same(cubn.forward(X, state), cubn.forward(X, cubn.BatchNormState.from_module(other)))


@pytest.mark.parametrize(
    ("module", "remedy"),
    [
        (torch.nn.LayerNorm(4), "Of another module, pass the arrays, eps and momentum to from_arrays"),
        (
            torch.nn.InstanceNorm1d(4, affine=True),
            "Of another module, pass the arrays, eps and momentum to from_arrays",
        ),
        (torch.nn.LazyBatchNorm1d(), "Let it see a batch first"),
        (torch.nn.BatchNorm1d, "Of another module, pass the arrays"),
        (torch.nn.BatchNorm1d(4).state_dict(), "Of another module, pass the arrays"),
        (cubn.BatchNormState(4), "Of another module, pass the arrays"),
        (None, "Of another module, pass the arrays"),
    ],
    ids=["layer norm", "instance norm", "lazy", "class", "state_dict", "state", "none"],
)
def test_what_is_no_batch_norm(module, remedy):
    with pytest.raises(
        TypeError, match=r"BatchNormState.from_module: bn must be a batch norm of torch.nn; got"
    ) as caught:
        cubn.BatchNormState.from_module(module)
    assert remedy in str(caught.value)


def test_a_lazy_module_that_has_seen_a_batch():
    module = torch.nn.LazyBatchNorm1d()
    module(X)
    assert cubn.BatchNormState.from_module(module).num_features == 4


def test_a_broken_module():
    module = torch.nn.BatchNorm1d(4)
    module.running_var[1] = -1.0
    with pytest.raises(ValueError, match="running_var must be 0 or more, but is negative in channel 1"):
        cubn.BatchNormState.from_module(module)
    state = cubn.BatchNormState.from_module(module, check=False)
    state.reset()
    assert module.running_var.tolist() == [1, 1, 1, 1]


def test_a_momentum_that_is_no_weight_serves_inference():
    module = torch.nn.BatchNorm1d(4, momentum=1.5).eval()
    state = cubn.BatchNormState.from_module(module)
    torch.testing.assert_close(cubn.forward(X, state), module(X).detach())
    again = cubn.BatchNormState.from_dict(state.to_dict())
    assert again.momentum == state.copy().momentum == 1.5
    with pytest.raises(ValueError, match="forward_train: momentum must be None or from 0 to 1"):
        cubn.forward_train(X, state)


def test_num_batches_tracked_goes_on():
    module = torch.nn.BatchNorm1d(4, momentum=None)
    for _ in range(3):
        module(X)
    reference = copy.deepcopy(module)
    state = cubn.BatchNormState.from_module(module)
    cubn.forward_train(X + 8, state)
    reference(X + 8)
    torch.testing.assert_close(module.running_mean, reference.running_mean)
    np.testing.assert_array_equal(state.tracked, 4)
