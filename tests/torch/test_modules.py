"""The modules are torch's batch norms: constructor, attributes, outputs, gradients, statistics."""

import inspect

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import cubn.torch  # noqa: E402
from tests.torch.comparing import PAIRS, SHAPES, batch, close, same, statistics, step  # noqa: E402

FUSED = [getattr(cubn.torch, f"BatchNorm{kind}{d}d") for kind in ("ReLU", "AddReLU") for d in "123"]
LAZY = [(getattr(cubn.torch, f"LazyBatchNorm{d}d"), getattr(nn, f"LazyBatchNorm{d}d")) for d in "123"]


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
    with pytest.raises(ValueError, match=r"input must have 3 channels"):
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


@pytest.mark.parametrize("kind", ["", "ReLU", "AddReLU"])
@pytest.mark.parametrize("training", [True, False])
def test_a_mask_leaves_positions_out(kind, training):
    x, residual, mask = batch((4, 3, 5, 2)), batch((4, 3, 5, 2), 2), batch((4, 5, 2)) > -1
    masked, packed = (getattr(cubn.torch, f"BatchNorm{kind}2d")(3).train(training) for _ in range(2))

    def chosen(t):  # as one long sample
        return t.movedim(1, -1)[mask].T[None, :, :, None]

    others = (residual,) if kind == "AddReLU" else ()
    y = masked(x.masked_fill(~mask[:, None], torch.nan), *others, mask)
    assert torch.allclose(chosen(y), packed(chosen(x), *map(chosen, others)), atol=1e-5)
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


def test_torch_fx_takes_a_module_whole_as_it_takes_torchs():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), cubn.torch.BatchNorm2d(3), nn.ReLU())
            self.outer = cubn.torch.BatchNormAddReLU2d(3)

        def forward(self, x, mask):
            return self.outer(self.inner(x) + self.inner[1](x, mask), x, mask)

    network, mask = Network(), batch((4, 5, 2)) > -1
    traced = torch.fx.symbolic_trace(network)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["inner.0", "inner.1", "inner.2", "inner.1", "outer"]
    assert torch.equal(traced.eval()(batch(SHAPES["2d"]), mask), network.eval()(batch(SHAPES["2d"]), mask))
