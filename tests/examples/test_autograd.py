"""The autograd function of the documents: right under activation checkpointing, and keeps no memory alive."""

import copy
import re
import weakref
from pathlib import Path

import pytest

import cubn

torch = pytest.importorskip("torch")

DOCUMENT = Path(__file__).parents[2] / "docs" / "sharp_bits.md"


@pytest.fixture
def function():
    """The class of the recipe."""
    blocks = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if "class BatchNorm(" in block)
    namespace = {"__name__": "document"}
    exec(compile(block, str(DOCUMENT), "exec"), namespace)
    return namespace["BatchNorm"]


class Net(torch.nn.Module):
    def __init__(self, function=None):
        super().__init__()
        self.linear = torch.nn.Linear(5, 6)
        self.bn = torch.nn.BatchNorm1d(6, eps=1e-3, momentum=0.25)
        self.function = function

    def forward(self, x):
        x = self.linear(x)
        if self.function is None:
            return self.bn(x).square()
        state = cubn.BatchNormState.from_module(self.bn)
        return self.function.apply(x, self.bn.weight, self.bn.bias, state).square()


def gradients(net, x, checkpointed):
    x = x.clone().requires_grad_()
    match checkpointed:
        case None:
            y = net(x)
        case use_reentrant:
            y = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=use_reentrant)
    (y * torch.arange(6)).sum().backward()
    return [x.grad, *(parameter.grad for parameter in net.parameters())]


@pytest.mark.parametrize("checkpointed", [None, False, True], ids=["plain", "checkpoint", "reentrant checkpoint"])
def test_gradients_and_updates_are_torch_s(function, checkpointed):
    torch.manual_seed(0)
    net, x = Net(function), torch.randn(7, 5)
    reference = copy.deepcopy(net)
    reference.function = None
    for got, expected in zip(gradients(net, x, checkpointed), gradients(reference, x, checkpointed), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.bn.running_mean, reference.bn.running_mean)
    torch.testing.assert_close(net.bn.running_var, reference.bn.running_var)


def held_after(function, free):
    """Whether an x that only the function holds is alive after `free(y)`."""
    bn = torch.nn.BatchNorm1d(6)
    state = cubn.BatchNormState.from_module(bn)
    x = torch.randn(7, 6, requires_grad=True) + 0
    alive = weakref.ref(x.untyped_storage())
    y = function.apply(x, bn.weight, bn.bias, state)
    del x
    free(y)
    return alive() is not None


def test_what_is_kept_for_the_backward_is_freed_by_it(function):
    assert held_after(function, lambda y: None)
    assert not held_after(function, lambda y: y.sum().backward())


def test_a_checkpoint_keeps_no_activation(function):
    net, x, alive = Net(function), torch.randn(7, 5, requires_grad=True), []
    net.linear.register_forward_hook(lambda module, given, y: alive.append(weakref.ref(y.untyped_storage())))
    y = net(x)
    assert alive.pop()() is not None
    y = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
    assert alive.pop()() is None
    y.sum().backward()
    assert net.bn.weight.grad is not None


def test_a_parameter_that_was_changed_meanwhile_is_noticed(function):
    bn = torch.nn.BatchNorm1d(6)
    state = cubn.BatchNormState.from_module(bn)
    y = function.apply(torch.randn(7, 6, requires_grad=True), bn.weight, bn.bias, state)
    with torch.no_grad():
        bn.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
