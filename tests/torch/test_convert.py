"""Converting a model: what changes is who computes, and nothing else."""

import copy
import subprocess
import sys
import textwrap
import types

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

import cubn.torch  # noqa: E402
from cubn.torch import convert, restore  # noqa: E402
from cubn.torch._models.timm import BatchNormAct2d  # noqa: E402
from tests.mpi.launch import ROOT  # noqa: E402
from tests.torch.comparing import batch, same, statistics, step  # noqa: E402
from tests.torch.networks import resnet18  # noqa: E402

FAMILY = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"]
LAZY = [f"LazyBatchNorm{d}d" for d in "123"]
SHAPES = {"1d": (6, 3), "2d": (4, 3, 5, 2), "3d": (2, 3, 3, 2, 2), "rm": (4, 3, 5)}


def classes(model):
    return [(path, type(module)) for path, module in model.named_modules()]


def held(model):
    """The very objects."""
    tensors = (*model.named_parameters(), *model.named_buffers(), *model.named_modules())
    return {path: id(thing) for path, thing in tensors if not path.endswith("skipped")}


def trained(model):
    """The gradients of a model and of its input, after a step."""
    results = step(model, batch((4, 3, 32, 32)))
    return [*results, *(parameter.grad for parameter in model.parameters())]


def equal(a, b):
    return len(a) == len(b) and all(map(same, a, b))


@pytest.mark.parametrize("name", FAMILY)
def test_the_module_is_cubns_and_computes_as_cubns_does(name):
    theirs = getattr(nn, name)(3, eps=1e-3, momentum=0.3)
    expected = getattr(cubn.torch, name)(3, eps=1e-3, momentum=0.3)
    converted = convert(copy.deepcopy(theirs))
    assert type(converted) is type(expected) and repr(converted) == repr(expected)
    assert isinstance(converted, nn.modules.batchnorm._BatchNorm)
    x = batch(SHAPES[name[-2:]])
    assert equal(step(converted, x), step(expected, x))
    assert equal([*converted.buffers()], [*expected.buffers()])
    assert same(converted.eval()(x), expected.eval()(x))


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str)
def test_options_are_kept(name, options):
    theirs = getattr(nn, name)(3, **options)
    before = list(theirs.state_dict())
    assert repr(convert(theirs)) == repr(getattr(cubn.torch, name)(3, **options))
    assert list(theirs.state_dict()) == before
    step(theirs, batch(SHAPES[name[-2:]]))
    assert repr(restore(theirs)) == repr(getattr(nn, name)(3, **options))


@pytest.mark.parametrize("name", FAMILY)
def test_no_bias_is_kept(name):
    bn = getattr(nn, name)(3)
    bn.register_parameter("bias", None)  # a keyword of newer versions of torch
    step(convert(bn), batch(SHAPES[name[-2:]]))
    assert (
        restore(bn).bias is None
        and list(bn.state_dict()) == [*nn.BatchNorm1d(3).state_dict()][:1] + [*nn.BatchNorm1d(3).state_dict()][2:]
    )


def test_parameters_buffers_and_modules_are_the_very_same_objects():
    model = resnet18()
    before, keys = held(model), list(model.state_dict())
    assert convert(model) is model
    assert held(model) == before and list(model.state_dict()) == keys
    assert model.bn1.skipped.tolist() == [0] * 8


def test_a_converted_resnet_is_the_one_built_of_cubns():
    built = resnet18(cubn.torch.BatchNorm2d)
    model = resnet18()
    model.load_state_dict(built.state_dict())
    convert(model)
    assert classes(model) == classes(built)
    assert equal(trained(model), trained(built))


def test_an_optimiser_made_before_trains_the_converted_model():
    model, twin = resnet18(), resnet18()
    twin.load_state_dict(model.state_dict())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    convert(model)
    other = torch.optim.SGD(convert(twin).parameters(), lr=0.1, momentum=0.9)
    start = model.bn1.weight.detach().clone()
    for each, steps in (model, optimiser), (twin, other):
        for _ in range(2):
            steps.zero_grad()
            trained(each)
            steps.step()
    assert not torch.equal(model.bn1.weight, start)
    assert equal(list(model.state_dict().values()), list(twin.state_dict().values()))


def test_hooks_of_every_kind_still_fire_and_can_be_removed():
    bn, fired = nn.BatchNorm2d(3), []
    note = lambda name: lambda *arguments: fired.append(name)  # noqa: E731
    handles = [
        bn.register_forward_pre_hook(note("pre")),
        bn.register_forward_pre_hook(note("pre, keywords"), with_kwargs=True),
        bn.register_forward_hook(note("forward")),
        bn.register_forward_hook(note("forward, keywords"), with_kwargs=True),
        bn.register_forward_hook(note("forward, always"), always_call=True),
        bn.register_full_backward_pre_hook(note("backward pre")),
        bn.register_full_backward_hook(note("backward")),
        bn.register_state_dict_pre_hook(note("state_dict pre")),
        bn._register_state_dict_hook(note("state_dict")),
        bn.register_load_state_dict_pre_hook(note("load pre")),
        bn.register_load_state_dict_post_hook(note("load post")),
    ]

    def all_of_it():
        fired.clear()
        step(bn, batch(SHAPES["2d"]))
        bn.load_state_dict(bn.state_dict())
        return sorted(fired)

    expected = all_of_it()
    assert len(expected) == len(handles)
    convert(bn)
    assert all_of_it() == expected
    with pytest.raises(ValueError, match="4D"):
        bn(torch.zeros(2, 3))
    assert fired[-1] == "forward, always"
    for handle in handles:
        handle.remove()
    assert all_of_it() == []


def test_flags_and_dtypes_are_kept():
    model = nn.Sequential(nn.BatchNorm1d(3, dtype=torch.float64).eval(), nn.BatchNorm1d(3, device="meta"))
    model[0].weight.requires_grad_(False)
    convert(model)
    assert [module.training for module in model] == [False, True]
    assert not model[0].weight.requires_grad and model[0].bias.requires_grad
    assert model[0].running_var.dtype == torch.float64
    assert model[1].skipped.is_meta


def test_statistics_of_16_bits_become_wide_and_narrow_again():
    bn = nn.BatchNorm1d(3).bfloat16()
    with pytest.warns(UserWarning, match="stay in float32"):
        convert(bn)
    assert bn.running_var.dtype == torch.float32 and bn.weight.dtype == torch.bfloat16
    assert restore(bn).running_var.dtype == torch.bfloat16
    assert bn(batch((4, 3), dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_module_used_twice_stays_one():
    bn = nn.BatchNorm1d(3)
    model = convert(nn.ModuleDict({"a": nn.Sequential(bn, bn), "b": bn}))
    assert model["a"][0] is model["a"][1] is model["b"] is bn
    model["a"](batch((4, 3)))
    assert bn.num_batches_tracked == 2


def test_other_normalizations_stay():
    model = nn.Sequential(nn.InstanceNorm2d(3, affine=True), nn.GroupNorm(1, 3), nn.LayerNorm(3))
    before = classes(model)
    assert classes(convert(model)) == before


def test_modules_that_are_cubns_stay():
    bn = cubn.torch.BatchNorm1d(3).freeze()
    bn.skipped += 1
    convert(bn)
    assert bn.frozen and bn.skipped.tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", LAZY)
def test_lazy_modules_count_their_channels_after_conversion(name):
    x = batch(SHAPES[name[-2:]])
    lazy = getattr(nn, name)(momentum=0.3)
    weight = lazy.weight
    convert(lazy)
    assert type(lazy) is getattr(cubn.torch, name)
    expected = getattr(cubn.torch, name.removeprefix("Lazy"))(3, momentum=0.3)
    assert equal(step(lazy, x), step(expected, x))
    assert type(lazy) is type(expected) and lazy.weight is weight
    assert equal([*lazy.buffers()], [*expected.buffers()])
    assert type(restore(lazy)) is getattr(nn, name.removeprefix("Lazy"))


@pytest.mark.parametrize("name", LAZY)
def test_lazy_modules_are_restored_before_they_count(name):
    lazy = restore(convert(getattr(nn, name)()))
    assert type(lazy) is getattr(nn, name)
    lazy(batch(SHAPES[name[-2:]]))
    assert type(lazy) is getattr(nn, name.removeprefix("Lazy"))


def test_a_restored_model_is_what_it_was():
    model = resnet18()
    keys, before, objects, text = list(model.state_dict()), classes(model), held(model), repr(model)
    expected = trained(copy.deepcopy(model))
    restore(convert(model))
    assert classes(model) == before and held(model) == objects and repr(model) == text
    assert not any(path.endswith("skipped") for path, _ in model.named_buffers())
    assert list(model.state_dict()) == keys and vars(model.bn1).keys() == vars(nn.BatchNorm2d(8)).keys()
    assert equal(trained(model), expected)


def test_values_learnt_meanwhile_stay_when_a_model_is_restored():
    model = convert(resnet18())
    trained(model)
    learnt = {name: value.clone() for name, value in model.state_dict().items()}
    restored = restore(model).state_dict()
    assert learnt.keys() == restored.keys() and all(same(learnt[name], restored[name]) for name in learnt)


@pytest.mark.parametrize("name", FAMILY + LAZY)
def test_modules_made_as_cubns_become_torchs(name):
    channels = [] if name in LAZY else [3]
    assert type(restore(getattr(cubn.torch, name)(*channels))) is getattr(nn, name)


def test_a_fused_module_that_was_made_as_one_is_not_restored():
    model = nn.Sequential(cubn.torch.BatchNorm2d(3), cubn.torch.BatchNormReLU2d(3))
    with pytest.raises(TypeError, match=r"^restore: model must have batch norms that torch has; got a .*ReLU2d at 1\."):
        restore(model)
    assert type(model[0]) is cubn.torch.BatchNorm2d


# --- what is refused --------------------------------------------------------------------------------------------------


class OwnForward(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 2


class OwnWeight(nn.BatchNorm2d):
    @property
    def scale(self):
        return self.weight.exp()


class OwnDefaults(nn.BatchNorm2d):
    """A subclass that adds nothing."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-3)


def parametrized():
    bn = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(bn, "weight", nn.Identity())
    return bn


def with_a_forward_set():
    bn = nn.BatchNorm2d(3)
    bn.forward = lambda input: input
    return bn


REFUSED = {
    "OwnForward": lambda: OwnForward(3),
    "OwnWeight": lambda: OwnWeight(3),
    "ParametrizedBatchNorm2d": parametrized,
    "with a forward of its own": with_a_forward_set,
}


@pytest.mark.parametrize("named", REFUSED)
def test_a_batch_norm_with_a_behaviour_of_its_own_is_refused_before_anything_changed(named):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.ReLU(), REFUSED[named]()))
    before, objects = classes(model), held(model)
    with pytest.raises(
        TypeError, match=rf"^convert: model must have batch norms .* got .*{named} at 1\.1\. (Put a|Conv)"
    ):
        convert(model)
    assert classes(model) == before and held(model) == objects and "skipped" not in model[0]._buffers


def test_a_subclass_that_adds_nothing_is_converted_and_restored():
    bn = OwnDefaults(3)
    assert type(convert(bn)) is cubn.torch.BatchNorm2d and bn.eps == 1e-3
    assert type(restore(bn)) is OwnDefaults


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


WRAPPERS = {
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "OptimizedModule": lambda model: torch.compile(model, backend="eager"),
    "TopLevelTracedModule": lambda model: torch.jit.trace(model.eval(), batch(SHAPES["2d"])),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("named", WRAPPERS)
@pytest.mark.parametrize("change", [convert, restore, cubn.torch.fuse, cubn.torch.fold])
def test_a_model_that_somebody_holds_on_to_is_refused(named, change, process_group):
    model = nn.Sequential(nn.BatchNorm2d(3))
    wrapped = nn.ModuleDict({"inside": WRAPPERS[named](model)})
    with pytest.raises(
        TypeError, match=rf"^{change.__name__}: model must be .* got a.*{named} at inside\. Convert the mode"
    ):
        change(wrapped)
    assert type(model[0]) is nn.BatchNorm2d


def test_a_sharded_model_is_refused(process_group):
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.BatchNorm2d(3))
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match="Convert the model before sharding it"):
        convert(model)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"^convert: model must be a torch\.nn\.Module; got a function"):
        convert(lambda x: x)


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_comm_is_that_of_every_converted_module(process_group):
    model = convert(nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3)), comm=process_group)
    assert [module.comm for module in model] == [process_group] * 2
    assert restore(model)[1].process_group is None


def test_sync_batch_norm_finds_its_process_group_when_it_trains(process_group, monkeypatch):
    group = dist.new_group([0])
    own, default = convert(nn.Sequential(nn.SyncBatchNorm(3, process_group=group), nn.SyncBatchNorm(3)))
    assert own.comm is group and default.comm is None
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    assert default.comm is dist.group.WORLD
    assert own.eval().comm is None and default.eval().comm is None


RANK = """
    import sys, torch, torch.distributed as dist
    from torch import nn
    import cubn.torch
    from tests.torch.comparing import batch, step
    rank, meeting = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    model = cubn.torch.convert(nn.Sequential(nn.Linear(4, 3), nn.SyncBatchNorm(3), nn.ReLU()), fuse=True)
    alone = cubn.torch.BatchNormReLU1d(3)
    dist.init_process_group("gloo", store=dist.FileStore(meeting, 2), rank=rank, world_size=2)
    x = batch((10, 3))
    y, dx = step(model[1], x[:7] if rank == 0 else x[7:])
    assert torch.equal(y, alone(x)[:7] if rank == 0 else alone(x)[7:])
    alone.reset_parameters(), alone(x)
    assert torch.equal(model[1].running_var, alone.running_var)
    nn.parallel.DistributedDataParallel(model)(torch.ones(2, 4))
    print("done")
"""


def test_converted_sync_batch_norm_is_one_batch_norm_over_two_processes(tmp_path):
    arguments = [sys.executable, "-c", textwrap.dedent(RANK)]
    ranks = [
        subprocess.Popen([*arguments, str(rank), str(tmp_path / "meeting")], cwd=ROOT, stdout=-1, stderr=-1, text=True)
        for rank in range(2)
    ]
    outcomes = [rank.communicate(timeout=120) for rank in ranks]
    assert [out for out, _ in outcomes] == ["done\n"] * 2, "\n".join(err for _, err in outcomes)


# --- timm -------------------------------------------------------------------------------------------------------------


def timm_class(name, base):
    """A stand-in with timm's names, attributes and meaning."""

    def __init__(self, channels, act):
        base.__init__(self, channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(base.forward(self, x)))

    return types.new_class(
        name,
        (base,),
        {},
        lambda names: names.update(__init__=__init__, forward=forward, __module__="timm.layers.norm_act"),
    )


@pytest.mark.parametrize(("name", "base"), [("BatchNormAct2d", nn.BatchNorm2d), ("SyncBatchNormAct", nn.SyncBatchNorm)])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU(), nn.PReLU(), nn.Identity()], ids=lambda act: type(act).__name__)
def test_timms_activations_are_kept(name, base, act):
    bn = timm_class(name, base)(3, act)
    cls, keys, x = type(bn), list(bn.state_dict()), batch(SHAPES["2d"])
    expected = step(nn.Sequential(cubn.torch.BatchNorm2d(3), copy.deepcopy(act)), x)
    assert equal(step(convert(bn), x), expected)
    assert list(bn.state_dict()) == keys
    fused = cubn.torch.fuse(bn).done
    assert ("ReLU" in type(bn).__name__) == (type(act) is nn.ReLU) == bool(fused)
    assert equal(step(bn, x), expected)
    assert type(restore(bn)) is cls and statistics(bn).keys() == statistics(nn.BatchNorm2d(3)).keys()


def test_an_unknown_class_of_timms_is_refused():
    with pytest.raises(TypeError, match=r"got a timm\.layers\.norm_act\.BatchNormOther at 0\."):
        convert(nn.Sequential(timm_class("BatchNormOther", nn.BatchNorm2d)(3, nn.ReLU())))


@pytest.mark.parametrize("cls", [cubn.torch.BatchNorm2d, cubn.torch.BatchNormReLU2d, cubn.torch.SyncBatchNorm])
def test_torchs_conversion_to_sync_batch_norm_is_refused_and_not_silent(cls):
    model = nn.Sequential(nn.Sequential(cls(3)))
    with pytest.raises(TypeError, match=rf"convert_sync_batchnorm: .*got a cubn\.{cls.__name__}\. Pass comm= to"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[0][0]) is cls


def test_modules_have_a_qconfig_once_it_is_set():
    """As torch.ao does, which first looks for one."""
    module = cubn.torch.BatchNorm2d(3)
    assert getattr(module, "qconfig", None) is None and not hasattr(type(module), "qconfig")
    module.qconfig = "a way to quantize"
    assert copy.deepcopy(module).qconfig == "a way to quantize"
    del module.qconfig
    assert not hasattr(module, "qconfig")


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_parametrized_batch_norm_is_refused_with_what_to_do():
    module = nn.BatchNorm1d(3)
    nn.utils.parametrize.register_parametrization(module, "weight", Doubled())
    with pytest.raises(TypeError, match="Convert the model before you register parametrizations"):
        convert(nn.Sequential(module))
    module = cubn.torch.BatchNorm1d(3)
    nn.utils.parametrize.register_parametrization(module, "weight", Doubled())
    with pytest.raises(TypeError, match="remove_parametrizations"):
        restore(nn.Sequential(module))
    nn.utils.parametrize.remove_parametrizations(module, "weight")
    assert type(restore(module)) is nn.BatchNorm1d


class Scaled(cubn.torch.BatchNorm2d):
    def forward(self, input, mask=None):
        return 2 * super().forward(input, mask)


def test_torch_fx_does_nothing_of_a_module_twice():
    """Its tracers look into modules that are not torch's, and a module stands for itself in a graph."""
    with pytest.raises(
        TypeError, match=r"torch.fx: model must call batch norms whole; got the own forward of .*Scaled"
    ):
        torch.fx.symbolic_trace(nn.Sequential(Scaled(3)))
    activated = BatchNormAct2d(3)
    activated.drop, activated.act = nn.Identity(), nn.SiLU()
    model, x = nn.Sequential(activated).eval(), batch((2, 3, 4, 4))
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
