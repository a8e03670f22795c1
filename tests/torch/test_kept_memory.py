"""What a module keeps for its backward is autograd's: freed by it, dropped by a checkpoint, seen when it changes."""

import contextlib
import weakref
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils._python_dispatch import BaseTorchDispatchMode  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import cubn.torch  # noqa: E402
from cubn.torch._routes import as_tensors  # noqa: E402


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


FORMATS = {
    "first": torch.Tensor.contiguous,
    "last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t,
    "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("back", ["first", "last", "sliced"])
@pytest.mark.parametrize("given", FORMATS)
@pytest.mark.parametrize("norm", ["BatchNorm2d", "BatchNormAddReLU2d"])
@pytest.mark.parametrize("mode", [contextlib.nullcontext, BaseTorchDispatchMode])
def test_hooks_on_saved_tensors_may_bring_back_copies_of_another_layout(mode, norm, given, back):
    """As torch's `save_on_cpu(pin_memory=True)` does."""
    torch.manual_seed(0)
    x, residual, dy = (torch.randn(3, 4, 5, 6) for _ in range(3))
    x, mask = FORMATS[given](x), torch.rand(3, 5, 6) > 0.3
    others = (FORMATS[given](residual),) if "Add" in norm else ()

    def gradients(pack):
        bn, leaf = getattr(cubn.torch, norm)(4), x.detach().requires_grad_()
        with mode(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):  # either route of autograd
            y = bn(leaf, *others, mask=mask)
        first = torch.autograd.grad(y, [leaf, bn.weight], dy, create_graph=True)
        return *first, *torch.autograd.grad(first[0].square().sum(), [leaf, bn.weight])

    for _ in range(2):
        expected = gradients(lambda t: t)
        got = gradients(lambda t: FORMATS[back](t.clone()))
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize(("norm", "dtype"), [("BatchNorm2d", torch.float32), ("BatchNormAddReLU2d", torch.int16)])
@pytest.mark.parametrize("pack", [lambda t: t[:1], lambda t: t.new_empty(0), torch.Tensor.double, torch.Tensor.half])
def test_what_hooks_bring_back_in_another_shape_or_dtype_is_refused(norm, dtype, pack):
    """x, or the bits of a residual ReLU."""
    x, bn = torch.randn(3, 4, 5, 6, requires_grad=True), getattr(cubn.torch, norm)(4)
    others = (x.detach(),) if "Add" in norm else ()
    bn(x, *others).sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: pack(t) if t.dtype == dtype and t.ndim > 1 else t, lambda t: t
    ):
        y = bn(x, *others)
    with pytest.raises((ValueError, TypeError), match=r"backward: (x|bits of the ReLU) must be"):
        y.sum().backward()


def test_statistics_that_hooks_bring_back_in_another_dtype_are_refused():
    """Where they are a tensor: on the route of operators."""
    x, bn = torch.randn(3, 4, requires_grad=True), cubn.torch.BatchNorm1d(4)
    with (
        BaseTorchDispatchMode(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t.float() if t.dtype == torch.float64 else t, lambda t: t),
    ):
        y = bn(x)
    with pytest.raises(ValueError, match="backward: statistics must be as the forward left them"):
        y.sum().backward()


def test_a_cached_mask_is_there_for_all_streams_and_belongs_to_no_graph(monkeypatch):
    waits = []
    capturing = iter([True, False])
    stream = SimpleNamespace(synchronize=lambda: waits.append("synchronize"))
    monkeypatch.setattr(as_tensors, "_UNWRITTEN", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: next(capturing))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    kind = 3, True, True, False, torch.device("cpu")
    of_graph = as_tensors._unwritten(*kind)
    assert not waits
    kept = as_tensors._unwritten(*kind)
    assert kept is not of_graph and waits == ["synchronize"]
    assert as_tensors._unwritten(*kind) is kept and waits == ["synchronize"]
