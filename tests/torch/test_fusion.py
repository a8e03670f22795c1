"""Fusing: the same bits in fewer passes, where nothing else reads the values between, and nowhere else."""

import copy
import logging
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import cubn.torch  # noqa: E402
from cubn.torch import convert, fuse, restore  # noqa: E402
from tests.torch.comparing import batch, same, step  # noqa: E402
from tests.torch.networks import resnet18  # noqa: E402

SHAPE = (4, 3, 6, 6)


class Own(nn.Module):
    """A block whose forward is a function of it and x."""

    def __init__(self, forward):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), cubn.torch.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 1), cubn.torch.BatchNorm2d(3)
        self.relu, self.inplace = nn.ReLU(), nn.ReLU(inplace=True)
        self.rate, self.other = 0.25, None
        self.run = [forward]  # in a list: not an attribute of plain value

    def forward(self, x):
        return self.run[0](self, x)


def results(module, shape=SHAPE, dtype=torch.float32):
    """y, the gradients and the buffers after a step."""
    module.zero_grad()
    found = [*step(module, batch(shape, dtype=dtype))]
    found += [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return found + [buffer.clone() for buffer in module.buffers()]


def equal(a, b):
    return len(a) == len(b) and all(map(same, a, b))


def iadd(a, b):
    a += b
    return a


def names(model):
    return [(path, type(module).__name__) for path, module in model.named_modules()]


RELUS = {
    "module": lambda m, x: m.relu(m.bn(x)),
    "module in place": lambda m, x: m.inplace(m.bn(x)),
    "F.relu": lambda m, x: F.relu(m.bn(x)),
    "F.relu in place": lambda m, x: F.relu(m.bn(x), inplace=True),
    "torch.relu": lambda m, x: torch.relu(m.bn(x)),
    "torch.relu_": lambda m, x: torch.relu_(m.bn(x)),
    "relu": lambda m, x: m.bn(x).relu(),
    "relu_": lambda m, x: m.bn(x).relu_(),
}
SUMS = {
    "+": lambda m, x: F.relu(m.bn(m.conv(x)) + x),
    "residual first": lambda m, x: m.relu(x + m.bn(m.conv(x))),
    "+=": lambda m, x: m.inplace(iadd(m.bn(m.conv(x)), x)),
    "torch.add": lambda m, x: torch.add(m.bn(m.conv(x)), x).relu(),
    "add": lambda m, x: m.bn(m.conv(x)).add(x).relu(),
    "add_": lambda m, x: m.bn(m.conv(x)).add_(x).relu_(),
    "residual later": lambda m, x: iadd(m.bn(m.conv(x)), m.conv2(x)).relu(),
}


@pytest.mark.parametrize("written", RELUS)
def test_a_relu_is_fused_however_it_is_written(written):
    model = Own(RELUS[written])
    plain = copy.deepcopy(model)
    report = fuse(model)
    assert report.done == {"bn": "BatchNormReLU2d"} and type(model.bn) is cubn.torch.BatchNormReLU2d
    assert report.left == {"bn2": "no forward calls it"}
    assert equal(results(model), results(plain))
    assert same(model.eval()(batch(SHAPE)), plain.eval()(batch(SHAPE)))


@pytest.mark.parametrize("written", SUMS)
def test_a_residual_is_fused_however_it_is_written(written):
    model = Own(SUMS[written])
    plain = copy.deepcopy(model)
    assert fuse(model).done == {"bn": "BatchNormAddReLU2d"}
    assert equal(results(model), results(plain))
    assert same(model.eval()(batch(SHAPE)), plain.eval()(batch(SHAPE)))


def test_a_residual_in_16_bits_is_one_rounding_nearer():
    torch.manual_seed(0)
    plain, x = Own(SUMS["+"]).eval(), batch(SHAPE, dtype=torch.bfloat16)
    plain.conv.to(torch.bfloat16)
    model = copy.deepcopy(plain)
    fuse(model)
    with torch.no_grad():
        exact = F.relu(plain.bn(plain.conv(x).double()) + x.double())
        apart = [(each(x).double() - exact).abs().sum() for each in (plain, model)]
    assert apart[1] < apart[0]


def two_readers(m, x):
    y = m.bn(x)
    return F.relu(y) + y


def sum_read_twice(m, x):
    y = m.bn(m.conv(x)) + x
    return F.relu(y) * y


def in_place_read_later(m, x):
    y = m.bn(x)
    m.inplace(y)
    return y + 1


def input_changes_between(m, x):
    h = x * 1
    y = m.bn(h)
    h += 1
    return F.relu(y + h)


def residual_overwritten(m, x):
    h = x * 1
    r = h
    r += m.bn(m.conv(x))
    return F.relu(r) + h


def with_a_mode(m, x):
    with torch.no_grad():
        return F.relu(m.bn(x))


def with_autocast(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.relu(m.bn(m.conv(x)))


def sets_an_attribute(m, x):
    m.other = F.relu(m.bn(x))
    return m.other


def asks_for_a_type(m, x):
    return F.relu(m.bn(x if isinstance(x, torch.Tensor) else x[0]))


def decides(m, x):
    return F.relu(m.bn(x)) if x.sum() > 0 else x


LEFT = [
    ("no ReLU follows", lambda m, x: torch.sigmoid(m.bn(x))),
    ("no ReLU follows", lambda m, x: F.relu(m.bn(x) + 1)),
    ("no ReLU follows", lambda m, x: F.relu(torch.add(m.bn(m.conv(x)), x, alpha=2))),
    ("no ReLU follows", lambda m, x: (lambda y: F.relu(y + y))(m.bn(x))),
    ("no ReLU alone follows the addition", lambda m, x: torch.sigmoid(m.bn(m.conv(x)) + x)),
    ("no ReLU alone follows the addition", sum_read_twice),
    ("no ReLU follows", residual_overwritten),
    ("its output is read in several places", two_readers),
    ("its output is read in several places", in_place_read_later),
    ("its input may change before the addition", input_changes_between),
    ("it is called in several places", lambda m, x: F.relu(m.bn(F.relu(m.bn(x))))),
    ("it is called with more than its input", lambda m, x: F.relu(m.bn(x, None))),
    ("it sets a mode of torch's", with_a_mode),
    ("it sets a mode of torch's", with_autocast),
    ("it sets a mode of torch's", lambda m, x: checkpoint(lambda t: F.relu(m.bn(t)), x, use_reentrant=False)),
    ("it sets attributes", sets_an_attribute),
    ("it asks for the type of a value", asks_for_a_type),
    ("it decides by a value", decides),
    ("is another in training mode", lambda m, x: F.relu(m.bn(x)) if m.training else m.bn(x)),
    ("reads its weight", lambda m, x: F.relu(m.bn(x)) * m.bn.weight.sum()),
]


@pytest.mark.parametrize(("why", "forward"), LEFT)
def test_nothing_is_fused_without_proof(why, forward):
    model = Own(forward)
    plain, before = copy.deepcopy(model), names(model)
    report = fuse(model)
    assert not report.done and why in report.left["bn"]
    assert names(model) == before and type(model) is Own
    with torch.no_grad():
        assert same(model(batch(SHAPE)), plain(batch(SHAPE)))


def test_of_two_batch_norms_that_are_added_one_takes_the_other_as_its_residual():
    model = Own(lambda m, x: F.relu(m.bn(m.conv(x)) + m.bn2(m.conv2(x))))
    plain = copy.deepcopy(model)
    report = fuse(model)
    assert report.done == {"bn": "BatchNormAddReLU2d"} and report.left == {"bn2": "another batch norm takes the sum"}
    assert equal(results(model), results(plain))


@pytest.mark.parametrize("hooked", ["bn", "relu"])
def test_nothing_with_hooks_is_fused(hooked):
    model, fired = Own(RELUS["module"]), []
    getattr(model, hooked).register_forward_hook(lambda *arguments: fired.append(hooked))
    assert not fuse(model).done
    model(batch(SHAPE))
    assert fired == [hooked]


def test_hooks_of_a_block_that_is_written_anew_still_fire():
    model, fired = nn.Sequential(Own(SUMS["+"])), []
    model[0].register_forward_hook(lambda *arguments: fired.append("block"))
    assert fuse(model).done
    model(batch(SHAPE))
    assert fired == ["block"]


def test_a_forward_that_cannot_be_traced_holds_back_its_own_part_only():
    model = nn.Sequential(Own(decides), Own(RELUS["F.relu"]))
    report = fuse(model)
    assert report.done == {"1.bn": "BatchNormReLU2d"}
    assert report.left["0.bn"] == "the forward of 0 cannot be traced: it decides by a value"


def test_a_forward_that_is_another_in_training_holds_back_what_it_calls_only():
    outer = Own(lambda m, x: F.dropout(m.inner(x), m.rate, m.training))
    outer.inner = Own(RELUS["F.relu"])
    assert fuse(outer).done == {"inner.bn": "BatchNormReLU2d"}


def test_none_as_default_is_no_proof():
    class Optional(Own):
        def forward(self, x, residual=None):
            return F.relu(self.bn(x)) + (x if residual is None else residual)

    model = Optional(None)
    assert fuse(model).left["bn"].endswith("its argument residual is None by default")
    assert model(batch(SHAPE)).shape == SHAPE


def test_an_attribute_that_was_read_while_tracing_must_stay():
    model = Own(lambda m, x: F.relu(m.bn(x)) * m.rate)
    assert fuse(model).done
    model(batch(SHAPE))
    model.rate = 0.5
    with pytest.raises(ValueError, match=r"^fuse: rate must stay 0\.25; got 0\.5\. .*restore the model"):
        model(batch(SHAPE))
    assert torch.equal(restore_fusion(model)(batch(SHAPE)), F.relu(model.bn(batch(SHAPE))) * 0.5)


def restore_fusion(model):
    """Without the conversion."""
    convert(restore(model))
    return model


def test_a_residual_of_another_shape_is_an_error():
    model = Own(lambda m, x: F.relu(m.bn(m.conv(x)) + m.conv2(x[..., :1])))
    assert fuse(model).done
    with pytest.raises(ValueError, match="residual must have input's shape"):
        model(batch(SHAPE))
    assert model.bn.num_batches_tracked == 0


def test_a_relu_module_that_others_call_too_stays():
    relu = nn.ReLU()
    model = nn.Sequential(cubn.torch.BatchNorm2d(3), relu, nn.Conv2d(3, 3, 1), relu)
    plain = copy.deepcopy(model)
    assert fuse(model).left == {"0": "its ReLU cannot be taken out of the forward of a Sequential"}
    assert model[1] is model[3] is relu and equal(results(model), results(plain))


def test_a_relu_module_of_two_names_stays_one():
    model = Own(lambda m, x: m.alias(m.bn(x)))
    model.alias = model.relu
    plain = copy.deepcopy(model)
    assert fuse(model).done and model.alias is model.relu and type(model.relu) is nn.ReLU
    assert equal(results(model), results(plain))


def test_a_block_that_is_used_twice_is_fused_once():
    block = Own(RELUS["F.relu"])
    model = nn.Sequential(block, nn.Conv2d(3, 3, 1), block)
    plain = copy.deepcopy(model)
    assert fuse(model).done == {"0.bn": "BatchNormReLU2d"}
    assert equal(results(model), results(plain))


@pytest.mark.parametrize("forward", [RELUS["module"], RELUS["F.relu"], SUMS["+"]])
def test_of_a_graph_module_only_modules_are_replaced(forward):
    model = convert(torch.fx.symbolic_trace(restore(Own(forward))))
    plain = copy.deepcopy(model)
    assert bool(fuse(model).done) == (forward is RELUS["module"])
    assert equal(results(copy.deepcopy(model)), results(plain))


def test_a_lazy_module_is_fused_after_its_first_input():
    model = convert(nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU()))
    assert fuse(model).left == {"0": "its channels are still to be counted: call the model once before"}
    model(batch(SHAPE))
    assert fuse(model).done == {"0": "BatchNormReLU2d"}


def test_sequentials_are_still_sliced():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), cubn.torch.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    plain = copy.deepcopy(model)
    fuse(model)
    assert equal(results(model[:3]), results(plain[:3]))


# --- a whole network --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def networks():
    """Converted, and fused too."""
    model = resnet18()
    return convert(copy.deepcopy(model)), convert(copy.deepcopy(model), fuse=True)


IMAGES = (4, 3, 32, 32)


def test_every_relu_and_sum_of_a_resnet_is_fused(networks, caplog):
    plain, _ = networks
    model = copy.deepcopy(plain)
    with caplog.at_level(logging.INFO, "cubn.torch"):
        report = fuse(model)
    blocks = [f"layer{stage}.{i}" for stage in range(1, 5) for i in range(2)]
    expected = {"bn1": "BatchNormReLU2d"}
    expected |= {f"{block}.bn1": "BatchNormReLU2d" for block in blocks}
    expected |= {f"{block}.bn2": "BatchNormAddReLU2d" for block in blocks}
    assert report.done == expected
    assert report.left == {f"layer{stage}.0.downsample.1": "no ReLU follows" for stage in range(2, 5)}
    assert caplog.messages == [f"fuse: {line}" for line in str(report).splitlines()]
    assert "layer1.0.bn2: BatchNormAddReLU2d" in str(report)


def test_a_fused_resnet_has_the_same_bits(networks):
    plain, fused = map(copy.deepcopy, networks)
    assert equal(results(fused, IMAGES), results(plain, IMAGES))
    assert same(fused.eval()(batch(IMAGES)), plain.eval()(batch(IMAGES)))


def test_a_fused_resnet_is_of_its_class_and_its_checkpoints_fit(networks):
    plain, fused = networks
    assert type(fused) is type(plain) and isinstance(fused.layer1[0], type(plain.layer1[0]))
    assert list(fused.state_dict()) == list(plain.state_dict())
    copy.deepcopy(fused).load_state_dict(plain.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_of_a_fused_model_are_fused(networks, duplicate):
    fused = duplicate(networks[1])
    assert names(fused) == names(networks[1])
    fused.layer1[0].conv1.weight.data.zero_()  # its own
    assert networks[1].layer1[0].conv1.weight.any()
    fused = duplicate(networks[1])
    assert equal(results(fused, IMAGES), results(copy.deepcopy(networks[0]), IMAGES))


def test_a_restored_model_is_not_fused():
    model = resnet18()
    before, text, keys = [type(module) for module in model.modules()], repr(model), list(model.state_dict())
    dictionaries = [vars(module).keys() for module in model.modules()]
    expected = results(copy.deepcopy(model), IMAGES)
    convert(model.eval(), fuse=True)
    assert not any(module.training for module in model.modules())
    restore(model.train())
    assert all(module.training for module in model.modules())
    assert [type(module) for module in model.modules()] == before and repr(model) == text
    assert list(model.state_dict()) == keys and [vars(module).keys() for module in model.modules()] == dictionaries
    assert equal(results(model, IMAGES), expected)


def test_fusing_twice_changes_nothing_more():
    model = convert(resnet18(), fuse=True)
    before = names(model)
    assert not fuse(model).done and names(model) == before


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
def test_a_fused_model_compiles_without_a_break():
    model = nn.Sequential(Own(SUMS["+="]), Own(RELUS["module"]))
    fuse(model)
    plain = copy.deepcopy(model)
    assert equal(results(torch.compile(model, backend="aot_eager", fullgraph=True)), results(plain))
