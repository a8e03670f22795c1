"""Checkpoints go from torch's modules to cubn's and back."""

import io
import pickle
from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import cubn.torch  # noqa: E402
from tests.torch import networks  # noqa: E402
from tests.torch.comparing import PAIRS, SHAPES, batch, same, step  # noqa: E402

OPTIONS = [{}, {"affine": False}, {"track_running_stats": False}, {"bias": False}, {"momentum": None}]


def trained(cls, dimensions, **options):
    """A module after a step, with parameters that are not 0 and 1."""
    module = cls(3, **options)
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(batch((2, 3), seed=i)[0])
    step(module, batch(SHAPES[dimensions]))
    return module


def torch_knows(options):
    try:
        nn.BatchNorm2d(3, **options)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
@pytest.mark.parametrize("dimensions", PAIRS)
def test_state_dicts_load_both_ways_with_the_same_keys_and_values(dimensions, options):
    if not torch_knows(options):
        pytest.skip("this torch has no bias=False")
    for source, target in (PAIRS[dimensions], PAIRS[dimensions][::-1]):
        saved = trained(source, dimensions, **options).state_dict()
        loaded = target(3, **options)
        assert str(loaded.load_state_dict(saved, strict=True)) == "<All keys matched successfully>"
        found = loaded.state_dict()
        assert list(found) == list(saved) and found._metadata == saved._metadata
        assert all(same(found[name], saved[name]) for name in saved)


@pytest.mark.parametrize("build", [networks.resnet18, networks.resnet50])
def test_a_residual_network_loads_the_checkpoint_of_torchs_and_evaluates_it(build):
    theirs, ours = build(), build(cubn.torch.BatchNorm2d)
    images = batch((2, 3, 32, 32))
    step(theirs, images)
    checkpoint = io.BytesIO()
    torch.save(theirs.state_dict(), checkpoint)
    checkpoint.seek(0)
    loaded = torch.load(checkpoint, weights_only=True)
    assert {"layer1.0.bn1.running_var", "layer2.0.downsample.1.num_batches_tracked", "bn1.weight"} < loaded.keys()
    ours.load_state_dict(loaded, strict=True)
    before = [tensor.clone() for tensor in ours.state_dict().values()]
    with torch.no_grad():
        y, reference = ours.eval().double()(images.double()), theirs.eval().double()(images.double())
    bound = 1e5 * torch.finfo(torch.float64).eps * reference.abs().max()  # of sums of 5000 terms, in 50 layers
    assert (y - reference).abs().max() <= bound
    ours.float()
    assert all(same(a, b) for a, b in zip(ours.state_dict().values(), before, strict=True))


def test_a_state_dict_can_be_read_with_weights_only():
    module = trained(cubn.torch.BatchNorm2d, "2d")
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    found = torch.load(file, weights_only=True)
    assert found.keys() == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert all(same(tensor, found[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("assign", [False, True])
def test_an_old_state_dict_has_no_count_of_batches(assign):
    saved = trained(nn.BatchNorm2d, "2d").state_dict()
    old = {name: tensor for name, tensor in saved.items() if name != "num_batches_tracked"}
    module = cubn.torch.BatchNorm2d(3)
    module.load_state_dict(old, strict=True, assign=assign)
    assert module.num_batches_tracked.item() == 0
    assert same(module.running_var, saved["running_var"])
    saved.pop("num_batches_tracked")
    with pytest.raises(RuntimeError, match="num_batches_tracked"):  # of a module that knew of it
        module.load_state_dict(saved, strict=True, assign=assign)


@pytest.mark.parametrize("assign", [False, True])
def test_wrong_keys_and_shapes_are_errors_as_torchs_are(assign):
    module = cubn.torch.BatchNorm2d(3)
    for wrong in (nn.BatchNorm2d(4).state_dict(), nn.BatchNorm2d(3, affine=False).state_dict()):
        with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict for BatchNorm2d"):
            module.load_state_dict(wrong, assign=assign)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_statistics_that_are_loaded_become_wide(dtype, assign):
    saved = nn.BatchNorm2d(3).to(dtype).state_dict()
    saved["running_var"].copy_(batch((2, 3))[0].abs())
    module = cubn.torch.BatchNorm2d(3)
    with pytest.warns(UserWarning, match="stay in float32") if assign else nullcontext():
        module.load_state_dict(saved, assign=assign)
    assert module.running_mean.dtype == module.running_var.dtype == torch.float32
    assert torch.equal(module.running_var, saved["running_var"].float())
    assert module.weight.dtype == (dtype if assign else torch.float32)
    before = module.running_var.clone()
    step(module, batch(SHAPES["2d"]))
    assert not torch.equal(module.running_var, before)


def test_what_is_loaded_was_skipped_by_nobody():
    """A cumulative average goes on from all the batches that the state_dict counts."""
    module = cubn.torch.BatchNorm2d(3, momentum=None)
    step(module, torch.full(SHAPES["2d"], torch.nan))
    assert module.skipped.tolist() == [1, 1, 1]
    module.load_state_dict({"weight": torch.ones(3)}, strict=False)
    assert module.skipped.tolist() == [1, 1, 1]  # those are still of these statistics
    module.load_state_dict(trained(nn.BatchNorm2d, "2d", momentum=None).state_dict())
    assert module.skipped.tolist() == [0, 0, 0]


@pytest.mark.parametrize("cls", [cubn.torch.BatchNormReLU2d, cubn.torch.BatchNormAddReLU2d])
def test_fused_modules_have_the_keys_of_a_batch_norm(cls):
    saved = trained(nn.BatchNorm2d, "2d").state_dict()
    module = cls(3)
    module.load_state_dict(saved, strict=True)
    assert all(same(tensor, saved[name]) for name, tensor in module.state_dict().items())


def test_a_lazy_module_loads_what_an_initialised_one_saved():
    saved = trained(cubn.torch.BatchNorm2d, "2d").state_dict()
    module = cubn.torch.LazyBatchNorm2d()
    module.load_state_dict(saved)
    module.eval()(batch(SHAPES["2d"]))
    assert type(module) is cubn.torch.BatchNorm2d and module.num_features == 3
    assert all(same(tensor, saved[name]) for name, tensor in module.state_dict().items())
    module.train()
    step(module, batch(SHAPES["2d"]))
    assert module.num_batches_tracked.item() == saved["num_batches_tracked"].item() + 1


def test_a_whole_module_can_be_pickled():
    module = trained(cubn.torch.BatchNormReLU2d, "2d", momentum=None)
    step(module, torch.full(SHAPES["2d"], torch.nan))
    module.freeze()
    for copy in (pickle.loads(pickle.dumps(module)), saved_and_loaded(module)):
        assert repr(copy) == repr(module) and copy.frozen
        assert all(same(a, b) for a, b in zip(copy.buffers(), module.buffers(), strict=True))
        assert copy.skipped.tolist() == [1, 1, 1]
        assert same(step(copy, batch(SHAPES["2d"]))[0], step(module, batch(SHAPES["2d"]))[0])


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
