"""Models recalibrated: statistics of the inputs that layers get in eval mode, and nothing else of the model changed."""

import copy
import sys
import types

import numpy as np
import pytest

import cubn

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.optim.swa_utils import AveragedModel  # noqa: E402

import cubn.torch  # noqa: E402
from cubn.sync import threads  # noqa: E402


class Net(nn.Module):
    """Two ways that meet, dropout, batch norms of torch and cubn, one that is never called."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.unused = nn.BatchNorm2d(3)
        self.last = nn.BatchNorm1d(5, momentum=None)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), norm(6), nn.ReLU())
        self.way = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(6, 6, 1), cubn.torch.BatchNorm2d(6))
        self.short = nn.Sequential(nn.Conv2d(6, 6, 1), norm(6))
        self.add = cubn.torch.BatchNormAddReLU2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.add(self.way(x), self.short(x))
        return self.last(self.head(x.mean((2, 3))))


LAYERS = ["stem.1", "way.2", "short.1", "add", "last"]
"""As they are called."""


@pytest.fixture(autouse=True)
def one_thread():
    """For models this small others only cost."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads_before)


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    net.way.eval()
    for parameter in net.head.parameters():
        parameter.requires_grad_(False)
    net.stem.register_forward_hook(lambda *arguments: None)
    net(torch.randn(16, 3, 7, 7) * 5)  # statistics that are wrong
    return net


@pytest.fixture
def x():
    return torch.randn(21, 3, 7, 7, generator=torch.Generator().manual_seed(1)) * 3 + 1


class Everything:
    """All of a model that a recalibration may not change; and all of it."""

    def __init__(self, model):
        self.entries = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
        self.rest = (
            {name: module.training for name, module in model.named_modules()},
            {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            {name: len(module._forward_pre_hooks) for name, module in model.named_modules()},
            {name: getattr(module, "momentum", 0) for name, module in model.named_modules()},
            {name: getattr(module, "_ranks", 0) for name, module in model.named_modules()},
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
        )

    def assert_same_but(self, other, layers):
        assert self.rest == other.rest and self.buffers == other.buffers
        for name, tensor in self.entries.items():
            is_statistic = name.rpartition(".")[0] in layers and "weight" not in name and "bias" not in name
            assert is_statistic or torch.equal(tensor, other.entries[name]), name


def given_in_eval_mode(model, batches, layer):
    """Moments of what a layer is given."""
    inputs = []
    hook = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        model.eval()
        for batch in batches:
            model(batch)
    for module, mode in modes.items():
        module.training = mode
    hook.remove()
    return cubn.moments(torch.cat(inputs))


@pytest.mark.parametrize("size", [5, 4])
def test_layer_by_layer_each_gets_the_statistics_of_its_inputs_in_eval_mode(net, x, size):
    """Also where the last batch is a single sample, as of batches of 5."""
    before, batches = Everything(net), x.split(size)
    pooled = cubn.recalibrate(net, batches)
    assert [*pooled] == LAYERS
    before.assert_same_but(Everything(net), LAYERS)
    for name, module in net.named_modules():
        if name in LAYERS:
            expected = given_in_eval_mode(net, batches, module)
            assert (pooled[name].mean == expected.mean).all() and (pooled[name].m2 == expected.m2).all(), name
            assert (module.running_mean.numpy() == expected.mean.astype(np.float32)).all()
            assert (module.running_var.numpy() == expected.var_unbiased().astype(np.float32)).all()
            assert module.num_batches_tracked == len(batches)


def test_all_at_once_layers_normalise_each_batch_by_its_own_statistics(net, x):
    before, batches = Everything(net), x.split(7)
    pooled = cubn.recalibrate(net, (batch for batch in batches), layerwise=False)
    before.assert_same_but(Everything(net), LAYERS)
    assert set(pooled) == set(LAYERS)
    training = copy.deepcopy(net).train()
    training.way[0].eval()
    inputs = []
    training.last.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().clone()))
    for batch in batches:
        training(batch)
    expected = cubn.moments(torch.cat(inputs))
    np.testing.assert_allclose(pooled["last"].mean, expected.mean, atol=1e-5)  # a mean of a few float32 roundings
    np.testing.assert_allclose(pooled["last"].m2, expected.m2, rtol=1e-4)


class OfItsOwn(nn.BatchNorm2d):
    """A layer that reads its statistics, and never takes a batch's own in eval mode."""

    def forward(self, x):
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        ) * torch.sign(self.running_var.sum())


@pytest.mark.parametrize("layerwise", [True, False])
def test_layers_may_read_their_statistics(x, layerwise):
    nets = [nn.Sequential(kind(3), nn.ReLU(), kind(3)) for kind in (OfItsOwn, nn.BatchNorm2d)]
    own, usual = (cubn.recalibrate(net, x.split(7), layerwise=layerwise) for net in nets)
    assert all((own[path].m2 == usual[path].m2).all() for path in ("0", "2"))


class Looping(nn.Module):
    """Whose layers are called as often as batches are long, and the last one for long ones alone."""

    def __init__(self):
        super().__init__()
        self.first, self.looped, self.last = (nn.BatchNorm1d(3) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for _ in range(len(x) // 4):
            x = self.looped(x) + 1
        return self.last(x) if len(x) > 8 else x


def test_calls_that_the_first_batch_does_not_have_are_not_missed():
    batches = torch.randn(21, 3, generator=torch.Generator().manual_seed(0)).split([4, 8, 9])
    for order, text in (([0, 1], "2 calls of looped"), ([1, 2], "1 calls of last"), ([0, 2], "2 calls of looped")):
        model = Looping()
        before = Everything(model)
        with pytest.raises(
            ValueError, match=f"^recalibrate: .*as often with the first batch .*{text}.*layerwise=False"
        ):
            cubn.recalibrate(model, [batches[i] for i in order])
        before.assert_same_but(Everything(model), [])
    for order, layerwise in (([2, 1, 0], True), ([0, 1, 2], False)):
        pooled = cubn.recalibrate(Looping(), [batches[i] for i in order], layerwise=layerwise)
        assert {path: moments.count for path, moments in pooled.items()} == {
            "first": 21,
            "looped": 4 + 2 * 8 + 2 * 9,
            "last": 9,
        }


class Training(nn.Module):
    """A forward with a mode of its own."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net.train()(x)


def test_a_forward_that_trains_counts_nothing(net, x):
    before = Everything(net)
    with pytest.raises(ValueError, match="finite statistics"):
        cubn.recalibrate(Training(net), [x, x * np.nan])
    before.assert_same_but(Everything(net), [])


def test_a_model_of_one_layer_needs_no_order(x):
    """So nothing is read of batches that come once, whatever they say of themselves."""

    class Once:
        def __init__(self, batches):
            self.left = iter(batches)

        def __iter__(self):
            return self.left

    assert cubn.recalibrate(nn.Sequential(nn.BatchNorm2d(3)), Once(x.split(7)))["0"].stop == 21


def test_weights_of_any_layout_are_known_again(x, tmp_path):
    net = nn.Sequential(nn.BatchNorm2d(3))
    for name, tensor in {
        "sparse": torch.eye(3).to_sparse(),
        "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
        "eighth": torch.zeros(2).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0),
    }.items():
        net.register_buffer(name, tensor)

    def broken(model, batch):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        cubn.recalibrate(net, [x], checkpoint=tmp_path / "pooled", forward=broken)
    cubn.recalibrate(net, [x], checkpoint=tmp_path / "pooled")


def test_a_last_batch_of_one_does_no_harm_in_one_pass(net, x):
    net = nn.Sequential(nn.Flatten(), nn.Linear(147, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4))
    pooled = cubn.recalibrate(net, [x[:20], x[20:]], layerwise=False)
    assert pooled["4"].count == 21
    assert torch.isfinite(net[4].running_var).all()


class Failing(nn.Module):
    def __init__(self, net, at, error):
        super().__init__()
        self.net, self.left, self.error = net, at, error

    def forward(self, x):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.net(x)


@pytest.mark.parametrize("at", [0, 1, 2, 9])
@pytest.mark.parametrize("error", [RuntimeError("forward"), KeyboardInterrupt()])
@pytest.mark.parametrize("layerwise", [True, False])
def test_whatever_is_raised_all_is_as_it_was(net, x, at, error, layerwise):
    model, at = Failing(net, min(at, at if layerwise else 2), error), at
    before = Everything(net)
    with pytest.raises(type(error)):
        cubn.recalibrate(model, x.split(5), layerwise=layerwise)
    before.assert_same_but(Everything(net), [])


@pytest.mark.parametrize("layerwise", [True, False])
def test_an_interrupted_one_goes_on_where_it_was_and_comes_to_the_same(net, x, layerwise, tmp_path):
    whole, batches, path = copy.deepcopy(net), x.split(5), tmp_path / "pooled"
    expected = cubn.recalibrate(whole, batches, layerwise=layerwise)
    forwards, calls = [], []

    def forward(model, batch):
        forwards.append(1)
        if len(forwards) == stop:
            raise KeyboardInterrupt
        return model(batch)

    stop, interrupts = 3, 0
    while True:
        forwards.clear()
        try:
            pooled = cubn.recalibrate(net, batches, layerwise=layerwise, checkpoint=path, forward=forward)
            break
        except KeyboardInterrupt:
            interrupts += 1
            calls.append(path.exists())
    assert interrupts >= 2 and all(calls) and not path.exists()
    for name in LAYERS:
        assert (pooled[name].mean == expected[name].mean).all() and (pooled[name].m2 == expected[name].m2).all()
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), whole.buffers(), strict=True))


def test_the_file_of_a_model_with_other_weights_is_refused(net, x, tmp_path):
    with pytest.raises(RuntimeError):
        cubn.recalibrate(Failing(net, 3, RuntimeError()), x.split(5), checkpoint=tmp_path / "pooled")
    with torch.no_grad():
        net.head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="whose weights differ"):
        cubn.recalibrate(Failing(net, 100, RuntimeError()), x.split(5), checkpoint=tmp_path / "pooled")


def test_every_pass_draws_the_same_from_a_loader_that_shuffles(net, x):
    data = torch.utils.data.TensorDataset(x, torch.zeros(21))
    torch.manual_seed(3)
    seen = []

    def forward(model, batch):
        seen.append(batch[0].sum().item())
        return model(batch[0])

    before = torch.get_rng_state()
    cubn.recalibrate(net, torch.utils.data.DataLoader(data, 7, shuffle=True), forward=forward)
    assert torch.equal(torch.get_rng_state(), before)
    passes = [seen[i : i + 3] for i in range(1, len(seen), 3)]  # behind the first, which looks for the order
    assert len(passes) == len(LAYERS) and all(one == passes[0] for one in passes)


def test_a_forward_ends_where_the_layer_was_seen(net, x):
    calls = []
    net.head.register_forward_hook(lambda *arguments: calls.append(1))
    cubn.recalibrate(net, x.split(7))
    assert len(calls) == 1 + 3  # to find the order, and for the layer behind it


def test_how_batches_go_into_the_model(net, x):
    labelled = [(batch, torch.zeros(7)) for batch in x.split(7)]
    expected = cubn.recalibrate(copy.deepcopy(net), x.split(7))
    for batches, options in (
        (labelled, {}),
        ([{"x": batch} for batch in x.split(7)], {}),
        ([{"image": batch} for batch in x.split(7)], {"forward": lambda model, batch: model(batch["image"])}),
    ):
        pooled = cubn.recalibrate(copy.deepcopy(net), batches, **options)
        assert all((pooled[name].m2 == expected[name].m2).all() for name in LAYERS)


def test_a_layer_that_runs_twice_gets_the_statistics_of_all_its_inputs_for_any_cut():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = cubn.torch.BatchNorm1d(3)

        def forward(self, x):
            return self.bn(x), self.bn(10 - x)

    x = torch.randn(20, 3, dtype=torch.float64)
    results = [cubn.recalibrate(Twice().double(), x.split(size), layerwise=size > 4)["bn"] for size in (20, 7, 4)]
    assert all((one.m2 == results[0].m2).all() and one.count == 40 for one in results)
    np.testing.assert_allclose(results[0].mean, torch.cat([x, 10 - x]).mean(0), rtol=1e-13)


def averaged(net):
    model = AveragedModel(net)
    model.update_parameters(net)
    return model


WRAPPED = {"averaged": (averaged, "module."), "data parallel": (nn.DataParallel, "")}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_models(net, x, name):
    expected = cubn.recalibrate(copy.deepcopy(net), x.split(7))
    wrap, prefix = WRAPPED[name]
    pooled = cubn.recalibrate(wrap(net), x.split(7))
    assert all((pooled[prefix + path].m2 == expected[path].m2).all() for path in LAYERS)


COMPILED = {
    "whole": lambda net: torch.compile(net, backend="eager"),
    "in place": lambda net: net.compile(backend="eager") or net,
    "a layer": lambda net: net[1].compile(backend="eager") or net,
}


@pytest.mark.full
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_models(x, name):
    """Which do not call hooks that are new."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    expected = cubn.recalibrate(copy.deepcopy(net), x.split(7))
    model = COMPILED[name](net)
    with torch.no_grad():
        model(x)
    pooled = cubn.recalibrate(model, x.split(7))
    assert all((pooled[path].m2 == expected[path].m2).all() for path in ("1", "3"))


def test_swa_s_averaged_model_gets_what_update_bn_can_only_estimate(net, x):
    """Torch averages variances of batches, without what lies between them."""
    model = averaged(net)
    cubn.recalibrate(model, x.split(3))
    theirs = averaged(net)
    torch.optim.swa_utils.update_bn(x.split(3), theirs)
    expected = given_in_eval_mode(model, x.split(3), model.module.stem[1])
    ours, torchs = model.module.stem[1].running_var, theirs.module.stem[1].running_var
    np.testing.assert_allclose(ours, expected.var_unbiased(), rtol=1e-7)
    assert np.abs(torchs.numpy() / expected.var_unbiased() - 1).max() > 1e-3


def test_synchronised_layers_and_layers_with_a_comm_wait_for_nobody(x):
    class Deaf(threads.ThreadCommunicator):
        def gather(self, *arguments):
            raise AssertionError("a forward of a recalibration met other ranks")

    net = nn.Sequential(nn.SyncBatchNorm(3), cubn.torch.SyncBatchNorm(3), cubn.torch.BatchNorm2d(3))
    net[2].comm = Deaf(0, threads._Board(2))
    for layerwise in (True, False):
        pooled = cubn.recalibrate(net, x.split(7), layerwise=layerwise)
        assert [*pooled] == ["0", "1", "2"]
        assert isinstance(net[2].comm, Deaf)


def two_layers():
    """Whose inputs do not depend on the batch."""
    return nn.Sequential(cubn.torch.BatchNorm1d(3), nn.Flatten(0, 1), nn.BatchNorm1d(4))


@pytest.mark.parametrize("layerwise", [True, False])
def test_ranks_get_the_bits_of_one_process(layerwise):
    """Also beside a rank without batches."""
    x = torch.randn(12, 3, 4)
    expected = cubn.recalibrate(two_layers(), [x])
    cuts = [(0, 5), (5, 5), (5, 12)]

    def body(comm):
        lo, hi = cuts[comm.rank]
        batches = x[lo:hi].split(3) if hi > lo else []
        return cubn.recalibrate(two_layers(), batches, comm=comm, start=lo, layerwise=layerwise)

    for pooled in threads.run(3, body):
        assert (pooled["0"].m2 == expected["0"].m2).all()
        if layerwise:
            assert (pooled["2"].m2 == expected["2"].m2).all() and pooled["2"].exact


def test_a_rank_whose_file_is_older_takes_over_what_another_one_has(tmp_path):
    x = torch.randn(12, 3, 4)
    expected = cubn.recalibrate(two_layers(), [x])

    def interrupted_at(last):
        """The forward of rank 1 in which it is interrupted: the first one finds the order of the layers."""

        def body(comm):
            forwards = []

            def forward(model, batch):
                forwards.append(batch)
                if comm.rank and len(forwards) == last:
                    raise InterruptedError
                return model(batch)

            part, start = x.split(6)[comm.rank], 6 * comm.rank
            options = {"comm": comm, "start": start, "checkpoint": tmp_path / "pooled", "forward": forward}
            try:
                return cubn.recalibrate(two_layers(), part.split(2), **options)
            except (InterruptedError, cubn.CollectiveMismatch):
                return None

        return threads.run(2, body)

    assert interrupted_at(3) == [None, None]  # in the pass of the first layer
    older = (tmp_path / "pooled.1").read_bytes()
    assert interrupted_at(5) == [None, None]  # in that of the second, of which rank 0 has its part
    (tmp_path / "pooled.1").write_bytes(older)
    for pooled in interrupted_at(None):
        assert all((pooled[path].m2 == expected[path].m2).all() for path in ("0", "2"))


def half(net):
    return nn.Sequential(nn.BatchNorm1d(3)).half()


REFUSED = {
    "one-shot": (lambda net: net, lambda x: iter([x]), {}, TypeError, "batches must be iterable again .*layerwise=F"),
    "generator": (lambda net: net, lambda x: (b for b in [x]), {}, TypeError, "a generator, which ends after one pass"),
    "no batch norm": (lambda net: nn.Linear(3, 3), lambda x: [x], {}, ValueError, "have batch norms with running"),
    "lazy": (lambda net: nn.LazyBatchNorm2d(), lambda x: [x], {}, ValueError, "have seen a batch"),
    "half": (half, lambda x: [x], {}, TypeError, "running_mean must have dtype float32 or float64 to be updated"),
    "no batches": (lambda net: net, lambda x: [], {}, ValueError, "batches must hold a batch"),
    "a NaN": (lambda net: net, lambda x: [x, x * np.nan], {}, ValueError, "finite statistics in every channel of stem"),
    "forward": (lambda net: net, lambda x: [x], {"forward": 3}, TypeError, "forward must be a function"),
    "layerwise": (lambda net: net, lambda x: [x], {"layerwise": 1}, TypeError, "layerwise must be True or False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(net, x, name):
    make, batches, options, kind, text = REFUSED[name]
    model, before = make(net), Everything(net)
    with pytest.raises(kind, match=f"^recalibrate: .*{text}"):
        cubn.recalibrate(model, batches(x), **options)
    before.assert_same_but(Everything(net), [])


def test_sharded_models_are_refused(net, x, monkeypatch):
    """By the class of what holds them, for which a plain one stands here."""
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", types.SimpleNamespace(FSDPModule=nn.Linear))
    with pytest.raises(TypeError, match=r"^recalibrate: .* be whole on every rank; got a torch.Linear at head\."):
        cubn.recalibrate(net, [x])


def test_after_it_the_eval_loss_is_the_train_mode_loss():
    """Story 2 on the digits: running statistics that do not describe the batches any more, as after a collapse."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(digits.images[:512, None], dtype=torch.float32) / 16
    labels = torch.tensor(digits.target[:512])
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)),
    )
    optimizer = torch.optim.SGD(net.parameters(), 0.2)
    for _ in range(2):
        for batch in torch.randperm(len(x)).split(32):
            loss = nn.functional.cross_entropy(net(x[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for layer in (net[1], net[4], net[8]):
        layer.running_var.fill_(5.6e-45)
    momenta = [layer.momentum for layer in (net[1], net[4], net[8])]

    def loss_of(mode):
        with torch.no_grad():
            copied = copy.deepcopy(net).train(mode)
            return nn.functional.cross_entropy(copied(x), labels).item()

    assert loss_of(False) > 10 * loss_of(True)
    cubn.recalibrate(net, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), 64))
    assert abs(loss_of(False) / loss_of(True) - 1) < 0.02
    assert momenta == [layer.momentum for layer in (net[1], net[4], net[8])] and net.training
