"""What a module keeps for its backward is autograd's: freed by it, dropped by a checkpoint, seen when it changes."""

import weakref

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import cubn.torch  # noqa: E402


def held_after(free):
    """Whether an x that only a module holds is alive after `free(y)`."""
    x = torch.randn(7, 6, requires_grad=True) + 0
    alive = weakref.ref(x.untyped_storage())
    y = cubn.torch.BatchNorm1d(6)(x)
    del x
    free(y)
    return alive() is not None


def test_what_is_kept_for_the_backward_is_freed_by_it():
    assert held_after(lambda y: None)
    assert not held_after(lambda y: y.sum().backward())


def test_a_checkpoint_keeps_no_activation():
    model, x, alive = nn.Sequential(nn.Linear(5, 6), cubn.torch.BatchNorm1d(6)), torch.randn(7, 5), []
    model[0].register_forward_hook(lambda module, given, y: alive.append(weakref.ref(y.untyped_storage())))
    y = model(x)
    assert alive.pop()() is not None
    y = checkpoint(model, x, use_reentrant=False)
    assert alive.pop()() is None
    y.sum().backward()
    assert model[1].weight.grad is not None


@pytest.mark.parametrize("changed", ["x", "weight"])
def test_what_was_changed_meanwhile_is_noticed(changed):
    bn = cubn.torch.BatchNorm1d(6)
    x = torch.randn(7, 6, requires_grad=True) + 0
    y = bn(x)
    with torch.no_grad():
        {"x": x, "weight": bn.weight}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
