"""The modules are torch's batch norms: constructor, attributes, outputs, gradients, statistics."""

import inspect

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import cubn.torch  # noqa: E402
from tests.torch.comparing import PAIRS, SHAPES, batch, same, statistics, step  # noqa: E402

EPS = torch.finfo(torch.float64).eps
FUSED = [getattr(cubn.torch, f"BatchNorm{kind}{d}d") for kind in ("ReLU", "AddReLU") for d in "123"]
LAZY = [(getattr(cubn.torch, f"LazyBatchNorm{d}d"), getattr(nn, f"LazyBatchNorm{d}d")) for d in "123"]


def close(a, b, values):
    """As close as two ways to add up so many float64 values come, each with the errors of the sums it is made of."""
    return a.shape == b.shape and (a - b).abs().max() <= 32 * values * EPS * (1 + b.abs().max())


def pair(dimensions, **options):
    """Cubn's module and torch's with the same random parameters."""
    ours, theirs = (cls(3, dtype=torch.float64, **options) for cls in PAIRS[dimensions])
    with torch.no_grad():
        for i, (a, b) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            b.copy_(batch((2, 3), seed=i)[0])
            a.copy_(b)
    return ours, theirs


# --- what they are ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), [*PAIRS.values(), *LAZY], ids=lambda cls: cls.__module__.partition(".")[0])
def test_constructors_take_torchs_arguments_with_their_defaults(ours, theirs):
    asked, given = (inspect.signature(cls).parameters for cls in (theirs, ours))
    for name, parameter in asked.items():
        assert (given[name].default, given[name].kind) == (parameter.default, parameter.kind)
    assert given.keys() - asked.keys() - {"bias"} == {"comm"}


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=repr
)
@pytest.mark.parametrize("dimensions", PAIRS)
def test_attributes_and_text_are_torchs(dimensions, options):
    ours, theirs = (cls(3, eps=1e-3, **options) for cls in PAIRS[dimensions])
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, type(theirs)) and isinstance(ours, nn.modules.batchnorm._BatchNorm)
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats", "training"):
        assert getattr(ours, name) == getattr(theirs, name)
    for names in ("named_parameters", "named_buffers"):
        found = {name: tensor for name, tensor in getattr(ours, names)() if name != "skipped"}
        expected = dict(getattr(theirs, names)())
        assert list(found) == list(expected) and all(same(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("cls", [*(ours for ours, _ in PAIRS.values()), *FUSED])
def test_without_bias_there_is_none_in_any_version_of_torch(cls):
    module = cls(3, bias=False)
    module.weight.data.fill_(5)
    module.reset_parameters()
    assert module.bias is None and module.weight.tolist() == [1, 1, 1]
    assert list(module.state_dict()) == ["weight", "running_mean", "running_var", "num_batches_tracked"]


def test_device_and_dtype_are_those_asked_for():
    module = cubn.torch.BatchNorm2d(3, device="meta", dtype=torch.float64)
    assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"meta"}
    assert {t.dtype for t in (*module.parameters(), *module.buffers())} == {torch.float64, torch.int64}
    with torch.device("meta"):
        assert cubn.torch.BatchNorm2d(3).skipped.is_meta


def test_resetting_begins_anew_also_what_was_skipped():
    module = cubn.torch.BatchNorm2d(3)
    step(module, batch((4, 3, 2, 2)))
    step(module, torch.full((4, 3, 2, 2), torch.inf))
    module.weight.data.fill_(2)
    module.reset_running_stats()
    assert all(same(a, b) for a, b in zip(module.buffers(), cubn.torch.BatchNorm2d(3).buffers(), strict=True))
    assert module.weight.tolist() == [2, 2, 2]
    module.reset_parameters()
    assert module.weight.tolist() == [1, 1, 1] and module.bias.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("ours", "theirs"), LAZY)
def test_lazy_modules_become_whole_with_their_first_input(ours, theirs):
    shape = SHAPES[f"{ours.__name__[-2]}d"]
    options = {"momentum": 0.3, "eps": 1e-3}
    mine, reference = ours(**options, comm=None), theirs(**options)
    assert repr(mine) == repr(reference)
    y, expected = mine(batch(shape)), reference(batch(shape))
    assert type(mine) is getattr(cubn.torch, theirs.__name__.removeprefix("Lazy")) and repr(mine) == repr(reference)
    assert mine.skipped.tolist() == [0, 0, 0]
    assert torch.allclose(y, expected, atol=1e-5)
    assert ours(affine=False, bias=False)(batch(shape)).shape == shape
    without = ours(bias=False)
    without(batch(shape), torch.ones(shape[:1] + shape[2:], dtype=torch.bool))
    assert without.bias is None and without.weight.tolist() == [1, 1, 1]


@pytest.mark.parametrize("dimensions", PAIRS)
def test_inputs_of_other_ranks_are_refused_as_torch_does(dimensions):
    ours, theirs = (cls(3) for cls in PAIRS[dimensions])
    for rank in range(1, 7):
        x = torch.ones((2, 3, 2, 2, 2, 2)[:rank])
        errors = []
        for module in (ours, theirs):
            try:
                module(x)
            except ValueError as error:
                errors.append(str(error))
        assert len(errors) in (0, 2) and len(set(errors)) < 2
    assert ours.num_batches_tracked == theirs.num_batches_tracked


def test_a_wrong_number_of_channels_changes_nothing():
    module = cubn.torch.BatchNorm2d(3)
    with pytest.raises(ValueError, match=r"must have shape \(4,\)"):
        module(torch.ones(2, 4, 2, 2))
    assert all(same(a, b) for a, b in zip(module.buffers(), cubn.torch.BatchNorm2d(3).buffers(), strict=True))


# --- what they compute ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=repr
)
@pytest.mark.parametrize("dimensions", PAIRS)
def test_outputs_gradients_and_statistics_are_torchs(dimensions, options):
    ours, theirs = pair(dimensions, **options)
    values = batch(SHAPES[dimensions]).numel() // 3
    for seed, training in enumerate([True, True, False, True]):
        x = batch(SHAPES[dimensions], seed, torch.float64)
        found, expected = (step(module.train(training), x) for module in (ours, theirs))
        assert all(close(a, b, values) for a, b in zip(found, expected, strict=True))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert close(a.grad, b.grad, values)
    found, expected = statistics(ours), statistics(theirs)
    assert found.keys() == expected.keys()
    assert all(close(found[name].double(), expected[name].double(), values) for name in found)


@pytest.mark.parametrize("dimensions", PAIRS)
def test_fused_modules_are_the_parts_one_after_the_other(dimensions):
    shape = SHAPES[dimensions]
    x, residual = batch(shape, dtype=torch.float64), batch(shape, 2, torch.float64)
    for kind, others in (("ReLU", ()), ("AddReLU", (residual,))):
        ours, theirs = pair(dimensions)
        fused = getattr(cubn.torch, f"BatchNorm{kind}{dimensions}")(3, dtype=torch.float64)
        fused.load_state_dict(ours.state_dict())
        found = step(fused, x, *others)
        expected = step(lambda x, *r, bn=theirs: (bn(x) + sum(r)).relu(), x, *others)
        assert len(found) == 2 + len(others)
        assert all(close(a, b, x.numel() // 3) for a, b in zip(found, expected, strict=True))
        assert all(
            close(a.grad, b.grad, x.numel()) for a, b in zip(fused.parameters(), theirs.parameters(), strict=True)
        )
        assert (fused.eval()(x, *others) >= 0).all()


def test_a_residual_is_asked_for():
    with pytest.raises(TypeError, match="residual"):
        cubn.torch.BatchNormAddReLU2d(3)(batch(SHAPES["2d"]))


@pytest.mark.parametrize("training", [True, False])
def test_a_mask_leaves_positions_out(training):
    x = batch((4, 3, 5, 2))
    mask = batch((4, 5, 2)) > -1
    masked, packed = (cubn.torch.BatchNorm2d(3).train(training) for _ in range(2))
    y = masked(x.masked_fill(~mask[:, None], torch.nan), mask)
    chosen = x.movedim(1, -1)[mask].T[None, :, :, None]  # the same values as one long sample
    assert torch.allclose(y.movedim(1, -1)[mask].T[None, :, :, None], packed(chosen), atol=1e-5)
    assert (y.movedim(1, -1)[~mask] == 0).all() and (~mask).sum() > 0
    assert torch.allclose(masked.running_var, packed.running_var, rtol=1e-5)


@pytest.mark.parametrize("wants", ["nothing", "x", "weight", "bias", "everything"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_come_to_those_who_want_them(wants, training):
    module = cubn.torch.BatchNorm2d(3).train(training)
    whole = cubn.torch.BatchNorm2d(3).train(training)
    y, dx = step(whole, batch(SHAPES["2d"]))
    x = batch(SHAPES["2d"]).requires_grad_(wants in ("x", "everything"))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(wants in (name, "everything"))
    found = module(x)
    assert same(found.detach(), y) and found.requires_grad == (wants != "nothing")
    if wants != "nothing":
        found.backward(batch(y.shape, seed=1))
    for tensor, gradient in ((x, dx), (module.weight, whole.weight.grad), (module.bias, whole.bias.grad)):
        assert same(tensor.grad, gradient) if tensor.requires_grad else tensor.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients_the_same_bits_and_the_same_update(mode, training):
    plain, module = (cubn.torch.BatchNorm2d(3).train(training) for _ in range(2))
    y, _ = step(plain, batch(SHAPES["2d"]))
    with mode():
        found = module(batch(SHAPES["2d"]))
    assert not found.requires_grad and torch.equal(found, y)
    assert all(same(a, b) for a, b in zip(module.buffers(), plain.buffers(), strict=True))
    step(module, batch(SHAPES["2d"]))  # and training goes on


@pytest.mark.parametrize(
    ("shape", "form"), [((4, 3, 5, 2), torch.channels_last), ((2, 3, 3, 2, 2), torch.channels_last_3d)]
)
@pytest.mark.parametrize("training", [True, False])
def test_channels_last_is_kept_in_both_directions(shape, form, training):
    dimensions = f"{len(shape) - 2}d"
    for cls in (getattr(cubn.torch, f"BatchNorm{kind}{dimensions}") for kind in ("", "ReLU", "AddReLU")):
        module, plain = cls(3).train(training), cls(3).train(training)
        others = (batch(shape, 2),) if "Add" in cls.__name__ else ()
        found = step(module, *(t.to(memory_format=form) for t in (batch(shape), *others)))
        expected = step(plain, batch(shape), *others)
        assert all(t.is_contiguous(memory_format=form) and not t.is_contiguous() for t in found)
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_the_input_decides(dtype):
    module, reference = cubn.torch.BatchNorm2d(3), nn.BatchNorm2d(3)
    convolution = nn.Conv2d(3, 3, 1)
    with torch.autocast("cpu", dtype=dtype):
        x = convolution(batch(SHAPES["2d"]))
        y, expected = module(x), reference(x)
    assert y.dtype == expected.dtype == x.dtype == dtype
    y.float().square().sum().backward()
    assert module.weight.grad.dtype == module.running_mean.dtype == torch.float32
    assert convolution.weight.grad.dtype == torch.float32
    assert torch.allclose(y.float(), expected.float(), atol=8 * torch.finfo(dtype).eps)


def test_hooks_see_and_change_what_they_see_and_change_of_any_module():
    module, seen = cubn.torch.BatchNorm2d(3), []
    module.register_forward_pre_hook(lambda m, inputs: (2 * inputs[0],))
    module.register_forward_hook(lambda m, inputs, y: seen.append(y.detach().clone()) or y + 1)
    module.register_full_backward_hook(lambda m, dx, dy: seen.append((dx[0], dy[0])))
    module.register_full_backward_pre_hook(lambda m, dy: (3 * dy[0],))
    module.weight.register_hook(lambda gradient: gradient + 7)
    plain = cubn.torch.BatchNorm2d(3)
    x = batch(SHAPES["2d"]).requires_grad_()
    y = module(x)
    doubled = (2 * batch(SHAPES["2d"])).requires_grad_()
    expected = plain(doubled)
    dy = batch(y.shape, 1)
    y.backward(dy), expected.backward(3 * dy)
    assert same(seen[0], expected.detach()) and same(y.detach(), expected.detach() + 1)
    assert same(seen[1][0], doubled.grad) and same(seen[1][1], 3 * dy) and same(x.grad, 2 * doubled.grad)
    assert same(module.weight.grad, plain.weight.grad + 7)


# --- running statistics -----------------------------------------------------------------------------------------------


def test_the_average_of_all_batches_is_that_of_their_statistics():
    module = cubn.torch.BatchNorm1d(3, momentum=None, dtype=torch.float64)
    batches = [batch((n, 3), seed=n, dtype=torch.float64) for n in (5, 2, 9, 4, 3)]
    for i, x in enumerate(batches):
        module(x)
        if i == 2:  # these are no batches of the average
            module(torch.full((4, 3), torch.nan, dtype=torch.float64))
            module(batch((0, 3), dtype=torch.float64))
    means, variances = (
        torch.stack(each).mean(0) for each in zip(*((x.mean(0), x.var(0)) for x in batches), strict=True)
    )
    assert close(module.running_mean, means, 9) and close(module.running_var, variances, 9)
    assert module.num_batches_tracked == len(batches) + 2 and module.skipped.tolist() == [2, 2, 2]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_that_is_not_finite_is_counted_and_leaves_its_channels_alone(momentum):
    module, clean = (cubn.torch.BatchNorm2d(3, momentum=momentum) for _ in range(2))
    x = batch((4, 3, 5, 2))
    bad = x.clone()
    bad[1, 2, 3, 1] = torch.nan
    for each in (x, bad, 3 * x):
        module(each)
    for each in (x, x, 3 * x):
        clean(each)
    assert module.num_batches_tracked == 3 and module.skipped.tolist() == [0, 0, 1]
    assert torch.equal(module.running_var[:2], clean.running_var[:2])
    without = cubn.torch.BatchNorm2d(3, momentum=momentum)
    for each in (x, 3 * x):
        without(each)
    assert module.running_var[2] == without.running_var[2] and module.running_mean[2] == without.running_mean[2]


def test_statistics_that_are_not_finite_heal_with_a_batch_that_is():
    module = cubn.torch.BatchNorm2d(3)
    module.running_var[1] = torch.inf
    x = batch((4, 3, 5, 2))
    module(x)
    assert torch.allclose(module.running_var[1], x[:, 1].var()) and module.running_var.isfinite().all()


def test_statistics_that_are_not_tracked_any_more_stay():
    module, reference = cubn.torch.BatchNorm2d(3), nn.BatchNorm2d(3)
    for each in (module, reference):
        each(batch((4, 3, 5, 2)))
        each.track_running_stats = False
    before = statistics(module)
    assert torch.allclose(module(batch((4, 3, 5, 2), 1)), reference(batch((4, 3, 5, 2), 1)), atol=1e-5)
    assert all(same(t, before[name]) for name, t in statistics(module).items())


def test_momentum_that_is_no_weight_is_refused():
    module = cubn.torch.BatchNorm2d(3, momentum=1.5)
    with pytest.raises(ValueError, match=r"momentum must be None or from 0 to 1"):
        module(batch((4, 3, 5, 2)))
    assert module.num_batches_tracked == 0


# --- few values -------------------------------------------------------------------------------------------------------

EMPTY = [
    ("1d", (0, 3)),
    ("1d", (0, 3, 5)),
    ("1d", (4, 3, 0)),
    ("2d", (0, 3, 4, 4)),
    ("2d", (2, 3, 0, 4)),
    ("3d", (0, 3, 2, 2, 2)),
]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dimensions", "shape"), EMPTY)
def test_an_empty_batch_is_to_the_module_what_it_is_to_torchs(dimensions, shape, training, momentum):
    ours, theirs = (cls(3, momentum=momentum).train(training) for cls in PAIRS[dimensions])
    found, expected = (step(module, torch.zeros(shape)) for module in (ours, theirs))
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert all(same(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    expected = statistics(theirs)
    assert all(same(t, expected[name]) for name, t in statistics(ours).items())
    assert ours.skipped.tolist() == [int(training)] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_an_empty_batch_keeps_dtype_and_layout_and_passes_through_what_is_fused(dtype):
    module = cubn.torch.BatchNormAddReLU2d(3)
    x = torch.zeros(0, 3, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
    y, dx, dresidual = step(module, x, x)
    assert y.shape == dx.shape == dresidual.shape == x.shape
    assert y.dtype == dx.dtype == dresidual.dtype == dtype
    assert module.weight.grad.tolist() == [0, 0, 0] and module.num_batches_tracked == 1
    assert cubn.torch.BatchNorm2d(3, affine=False, track_running_stats=False)(x).shape == x.shape


@pytest.mark.parametrize(
    ("dimensions", "shape"), [("1d", (1, 3)), ("1d", (1, 3, 1)), ("2d", (1, 3, 1, 1)), ("3d", (1, 3, 1, 1, 1))]
)
def test_one_value_per_channel_cannot_be_trained_on(dimensions, shape):
    module, theirs = (cls(3) for cls in PAIRS[dimensions])
    for each in (module, theirs):
        with pytest.raises(ValueError, match=r"more than (one|1) value per channel"):
            each(torch.ones(shape))
    assert all(same(a, b) for a, b in zip(module.buffers(), PAIRS[dimensions][0](3).buffers(), strict=True))
    assert module.eval()(torch.ones(shape)).shape == shape
    assert module.train().freeze()(torch.ones(shape)).shape == shape
    with pytest.raises(ValueError, match="more than one value per channel"):
        PAIRS[dimensions][0](3, track_running_stats=False).eval()(torch.ones(shape))
