"""What torch's batch norms do not have: freezing, and ranks."""

import copy
import io
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import cubn.torch  # noqa: E402
from cubn.sync import threads  # noqa: E402
from tests.torch.comparing import batch, same, statistics, step  # noqa: E402

SHAPE = (4, 3, 5, 2)


def trained(cls=cubn.torch.BatchNorm2d, **options):
    module = cls(3, **options)
    for seed in range(2):
        module(*[batch(SHAPE, seed)] * (2 if cls._fused_residual else 1))
    return module


# --- frozen -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["", "ReLU", "AddReLU"])
def test_frozen_modules_train_as_they_evaluate_with_gradients_through(kind):
    module = trained(getattr(cubn.torch, f"BatchNorm{kind}2d"))
    reference = nn.BatchNorm2d(3, dtype=torch.float64).eval()
    reference.load_state_dict(module.state_dict())
    others = (batch(SHAPE, 4),) if kind == "AddReLU" else ()
    before = statistics(module)
    assert module.freeze() is module and module.training
    found = step(module, batch(SHAPE, 3), *others)
    assert all(same(tensor, before[name]) for name, tensor in statistics(module).items())
    evaluated = copy.deepcopy(module).eval()
    assert all(same(a, b) for a, b in zip(found, step(evaluated, batch(SHAPE, 3), *others), strict=True))

    def parts(x, *residual):
        y = reference(x) + sum(residual)
        return y.relu() if kind else y

    expected = step(parts, batch(SHAPE, 3).double(), *(t.double() for t in others))
    assert all(torch.allclose(a.double(), b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    for a, b in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a.grad.double(), b.grad, atol=1e-4)


def test_unfrozen_modules_train_by_batches_again():
    module, plain = trained().freeze(), trained()
    assert module.unfreeze() is module
    assert all(same(a, b) for a, b in zip(step(module, batch(SHAPE, 3)), step(plain, batch(SHAPE, 3)), strict=True))
    assert all(same(a, b) for a, b in zip(module.buffers(), plain.buffers(), strict=True))


def test_that_it_is_frozen_is_shown_copied_and_not_in_the_state_dict():
    module = trained().freeze()
    assert repr(module).endswith("track_running_stats=True, frozen=True)")
    assert "frozen" not in repr(trained()) and "comm" not in repr(trained())
    for copied in (copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))):
        assert copied.frozen and repr(copied) == repr(module)
    plain = cubn.torch.BatchNorm2d(3)
    plain.load_state_dict(module.state_dict())
    assert not plain.frozen and module.state_dict().keys() == plain.state_dict().keys()


def test_without_running_statistics_there_is_nothing_to_freeze():
    module = cubn.torch.BatchNorm2d(3, track_running_stats=False)
    with pytest.raises(ValueError, match=r"^freeze: BatchNorm2d must have running statistics"):
        module.freeze()
    assert not module.frozen


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(4, 2), (6, 0), (0, 6), (1, 5)])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 2, 2)])
def test_ranks_are_one_process_with_the_whole_batch_empty_ones_included(shape, sizes):
    cls = cubn.torch.BatchNorm1d if len(shape) == 2 else cubn.torch.BatchNorm2d
    whole, x = cls(3, momentum=None), batch(shape)
    parts, dy = x.split(sizes), batch(shape, 1).split(sizes)

    def rank(comm):
        module = cls(3, momentum=None, comm=comm)
        mine = parts[comm.rank].clone().requires_grad_()
        y = module(mine)
        y.backward(dy[comm.rank])
        return y.detach(), mine.grad, module

    (*found,) = zip(*threads.run(2, rank), strict=True)
    y, dx = step(whole, x)
    assert same(torch.cat(found[0]), y) and same(torch.cat(found[1]), dx)
    for module in found[2]:
        assert all(same(a, b) for a, b in zip(module.buffers(), whole.buffers(), strict=True))
        assert module.weight.grad.isfinite().all()
    assert torch.allclose(sum(module.bias.grad for module in found[2]), whole.bias.grad, atol=1e-5)


def test_ranks_with_one_value_in_all_raise_on_all():
    def rank(comm):
        module = cubn.torch.BatchNorm1d(3, comm=comm)
        with pytest.raises(ValueError, match=r"more than one value per channel over all ranks"):
            module(torch.ones(comm.rank, 3))
        return module.num_batches_tracked.item()

    assert threads.run(2, rank) == [0, 0]


@pytest.mark.parametrize("prepare", [lambda module: module.eval(), lambda module: module.freeze()])
def test_a_rank_evaluates_alone(prepare):
    alone, other = threads.communicators(2)
    other.end()  # so that asking it is an error
    module = prepare(trained())
    expected = step(module, batch(SHAPE, 3))
    module.comm = alone
    assert all(same(a, b) for a, b in zip(step(module, batch(SHAPE, 3)), expected, strict=True))


def test_copies_share_the_ranks():
    comm = threads.communicators(2)[0]
    module = cubn.torch.BatchNormReLU2d(3, comm=comm)
    model = nn.Sequential(module, nn.Sequential(module, cubn.torch.BatchNorm2d(3, comm=comm)))
    copied = copy.deepcopy(model)
    assert copied[0] is copied[1][0] and copied[0] is not module
    assert copied[0].comm is copied[1][1].comm is copy.copy(module).comm is comm
    copied[0].comm = None
    assert module.comm is comm
    lazy = cubn.torch.LazyBatchNorm2d(comm=comm).eval()
    lazy(batch(SHAPE))
    assert type(lazy) is cubn.torch.BatchNorm2d and lazy.comm is comm


def test_ranks_are_shown_and_not_pickled():
    module = cubn.torch.BatchNorm2d(3, comm=threads.communicators(2)[0])
    assert repr(module).endswith("track_running_stats=True, comm=ThreadCommunicator)")
    assert module.freeze().extra_repr().endswith("comm=ThreadCommunicator, frozen=True")
    for save in (pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
        with pytest.raises(TypeError, match=r"communicator.*got comm=ThreadCommunicator.*state_dict\(\)"):
            save(module)
    torch.save(module.state_dict(), io.BytesIO())
    module.comm = None
    assert pickle.loads(pickle.dumps(module)).comm is None


def test_what_is_no_communicator_is_refused_before_anything_changes():
    module, model = cubn.torch.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    for given in (
        lambda: cubn.torch.BatchNorm2d(3, comm=np.ones(3)),
        lambda: setattr(module, "comm", "gloo"),
        lambda: cubn.torch.convert(model, comm=7),
    ):
        with pytest.raises(TypeError, match=r"comm must be an mpi4py communicator"):
            given()
    assert module.comm is None and type(model) is torch.nn.BatchNorm2d
