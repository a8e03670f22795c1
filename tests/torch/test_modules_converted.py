"""Modules that were converted, moved, copied or parametrized: what a step updates are their buffers as they are now."""

import copy
import warnings

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, parametrize  # noqa: E402

import cubn.torch  # noqa: E402
from tests.torch.comparing import batch, same, statistics, step  # noqa: E402

SHAPE = (4, 3, 5, 2)
NARROW = [torch.float16, torch.bfloat16]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


def loaded(assign):
    def load(module):
        other = trained()
        step(other, batch(SHAPE, 5))
        module.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        return module

    return load


def on_meta(module):
    empty = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    assert empty.skipped.tolist() == [0, 0, 0]
    empty.load_state_dict(module.state_dict())
    return empty


def assigned_to_meta(module):
    with torch.device("meta"):
        empty = cubn.torch.BatchNorm2d(3)
    empty.load_state_dict(module.state_dict(), assign=True)
    return empty


def swapped(module):
    other = trained()
    for name, tensor in other.named_buffers():
        torch.utils.swap_tensors(getattr(module, name), tensor)
    return module


def parametrized(module):
    parametrize.register_parametrization(module, "weight", Doubled())
    return module


def replaced(module):
    module.running_mean, module.running_var = torch.zeros(3), torch.ones(3)
    return module


CONVERSIONS = {
    "double": lambda module: module.double(),
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to float16": lambda module: module.to(torch.float16),
    "to the device": lambda module: module.to("cpu"),
    "type": lambda module: module.type(torch.float64),
    "there and back": lambda module: module.half().double().float(),
    "share_memory": lambda module: module.share_memory(),
    "load_state_dict": loaded(assign=False),
    "load_state_dict, assigned": loaded(assign=True),
    "meta": on_meta,
    "meta, assigned": assigned_to_meta,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "swap_tensors": swapped,
    "parametrized": parametrized,
    "copy of parametrized": lambda module: copy.deepcopy(parametrized(module)),
    "replaced": replaced,
}


def trained(**options):
    """A module that has prepared calls for its tensors."""
    module = cubn.torch.BatchNorm2d(3, **options)
    for seed in range(2):
        step(module, batch(SHAPE, seed))
    module.zero_grad()
    return module


@pytest.fixture(params=[False, True], ids=["", "swapped by torch"])
def swapping(request):
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.filterwarnings("ignore:cubn.torch. running statistics stay in float32")
@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_step_after_a_conversion_moves_the_modules_own_buffers(name, momentum):
    module = CONVERSIONS[name](trained(momentum=momentum))
    module.momentum = momentum
    dtype = module.weight.dtype
    before = statistics(module)
    twin = cubn.torch.BatchNorm2d(3, momentum=momentum, dtype=torch.float64 if dtype == torch.float64 else None)
    twin.load_state_dict(before | {"weight": module.weight.detach(), "bias": module.bias.detach()})
    for seed in (7, 8):
        x = batch(SHAPE, seed, dtype)
        found, expected = step(module, x), step(twin, x)
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    after = statistics(module)
    assert after["running_mean"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(same(after[name], tensor) for name, tensor in statistics(twin).items())
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert all(buffer is getattr(module, name) for name, buffer in module.named_buffers())


@pytest.mark.parametrize("name", ["deepcopy", "meta", "assigned to meta"])
def test_what_was_copied_from_stays_as_it_was(name):
    module = trained()
    before = statistics(module)
    copied = {
        "deepcopy": copy.deepcopy,
        "meta": on_meta,
        "assigned to meta": lambda m: assigned_to_meta(copy.deepcopy(m)),
    }
    step(copied[name](module), batch(SHAPE, 7))
    assert all(same(tensor, before[name]) for name, tensor in statistics(module).items())


CONVERT = [
    lambda m, dtype: m.half() if dtype == torch.float16 else m.bfloat16(),
    lambda m, dtype: m.to(dtype),
    lambda m, dtype: m.to("cpu", dtype),
    lambda m, dtype: m.type(dtype),
]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("convert", CONVERT)
@pytest.mark.usefixtures("swapping")
def test_running_statistics_go_through_no_16_bits(convert, dtype):
    module = nn.Sequential(nn.Conv2d(3, 3, 1), trained())
    before = statistics(module)
    with pytest.warns(UserWarning, match="running statistics stay in float32") as said:
        convert(module, dtype)
    assert len(said) == 1
    assert module[1].weight.dtype == module[1].bias.dtype == module[0].weight.dtype == dtype
    assert all(same(tensor, before[name]) for name, tensor in statistics(module).items())


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_modules_have_wide_statistics_from_the_start(dtype):
    made = [lambda: cubn.torch.BatchNorm2d(3, dtype=dtype), lambda: cubn.torch.LazyBatchNorm2d(dtype=dtype)]
    with pytest.warns(UserWarning, match="stay in float32"):
        module = made[0]()
    for each in (module, made[1](), cubn.torch.BatchNormReLU2d(3, dtype=dtype)):
        y = each(batch(SHAPE, dtype=dtype))
        assert y.dtype == each.weight.dtype == dtype
        assert each.running_mean.dtype == each.running_var.dtype == torch.float32


def test_the_default_dtype_does_not_narrow_statistics_either():
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.warns(UserWarning, match="stay in float32"):
            module = cubn.torch.BatchNorm2d(3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert module.weight.dtype == torch.bfloat16 and module.running_var.dtype == torch.float32


def test_it_is_said_once_in_a_process_that_statistics_stay_wide():
    with pytest.warns(UserWarning, match="stay in float32"):
        trained().half()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained().half(), trained().bfloat16(), cubn.torch.BatchNorm1d(3, dtype=torch.float16)


def test_nothing_is_said_of_modules_that_stay_wide_or_have_no_statistics():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained().double().float().to("cpu")
        cubn.torch.BatchNorm2d(3, track_running_stats=False).half()


def test_statistics_of_float64_are_updated_in_float64():
    module, reference = (cls(3, dtype=torch.float64) for cls in (cubn.torch.BatchNorm2d, nn.BatchNorm2d))
    x = batch(SHAPE, dtype=torch.float64) + 1e6
    step(module, x), step(reference, x)
    bound = 64 * torch.finfo(torch.float64).eps * x.abs().max()  # of a sum of 40 values, by its largest
    assert (module.running_mean - reference.running_mean).abs().max() <= bound
    assert (module.running_mean - module.running_mean.float()).abs().max() > bound


def test_converting_what_is_shared_keeps_it_shared():
    module = trained().share_memory()
    assert all(buffer.is_shared() for buffer in module.buffers())
    step(module, batch(SHAPE, 3))
    assert module.running_var.is_shared() and module.skipped.is_shared()


def test_gradients_reach_the_parameter_behind_a_parametrization():
    module, plain = parametrized(trained()), trained()
    step(module, batch(SHAPE, 3)), step(plain, batch(SHAPE, 3))
    assert same(module.parametrizations.weight.original.grad, 2 * plain.weight.grad)
    normed = parametrizations.weight_norm(trained())
    step(normed, batch(SHAPE, 3))
    assert normed.parametrizations.weight.original0.grad is not None


def grown(module):
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.ndim and name != "skipped":
            more = torch.cat([tensor.detach()] * 100)
            setattr(module, name, nn.Parameter(more) if name in ("weight", "bias") else more)


COUNTERS = {
    "none": lambda m: m.register_buffer("skipped", None, persistent=False),
    "of other channels": grown,
    "of float32": lambda m: setattr(m, "skipped", torch.zeros(3)),
    "of one memory": lambda m: setattr(m, "skipped", torch.zeros(1, dtype=torch.int64).expand(3)),
    "elsewhere": lambda m: setattr(m, "skipped", torch.zeros(3, dtype=torch.int64, device="meta")),
    "tracked of float16": lambda m: m.load_state_dict({k: t.half() for k, t in m.state_dict().items()}, assign=True),
}


@pytest.mark.filterwarnings("ignore:cubn.torch. running statistics stay in float32")
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", COUNTERS)
def test_counters_that_do_not_fit_are_mended_not_written_past(name, momentum):
    module = trained(momentum=momentum)
    COUNTERS[name](module)
    C = len(module.running_mean)
    step(module, batch(SHAPE, 3).repeat(1, C // 3, 1, 1))
    step(module, torch.full((4, C, 5, 2), torch.nan))
    assert module.num_batches_tracked == 4 and module.skipped.tolist() == [1] * C
    assert module.num_batches_tracked.dtype == module.skipped.dtype == torch.int64
