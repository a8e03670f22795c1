"""The benchmark of networks: contestants train the same networks, and intervals are what they are said to be."""

import json
import subprocess
import sys
import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import cubn

torch = pytest.importorskip("torch")

FOLDER = Path(__file__).parents[2] / "asv_benchmarks"
sys.path.append(str(FOLDER))

import idle  # noqa: E402
import networks  # noqa: E402
from benchmarks import models, numpy_loop, shares  # noqa: E402
from benchmarks.layers import BatchNorm, Torch, contestants, with_relu_apart, with_relu_timed  # noqa: E402

SMALL = {
    "resnet20": (2, 3, 16, 16),
    "resnet50": (2, 3, 64, 64),
    "tower": (3, 2, 7, 6),
    "mlp": (6, 1024),
    "pointnet": (5, 3, 16),
}
TRAINED = [(name, layout) for name in models.NETWORKS for layout in networks.LAYOUTS.get(name, ())]


@pytest.fixture(autouse=True)
def one_thread():
    """Small arrays gain nothing of more, and other tests run beside these."""
    before = torch.get_num_threads(), cubn.get_num_threads()
    torch.set_num_threads(1), cubn.set_num_threads(1)
    yield
    torch.set_num_threads(before[0]), cubn.set_num_threads(before[1])


def trained(name, layout, contestant):
    network = models.NETWORKS[name]._replace(x=SMALL[name])
    return models.trained(network, layout, contestants(len(network.x))[contestant])


def weights(model):
    return [parameter.shape for parameter in model.parameters() if parameter.ndim > 1]


def gradients(one):
    one.step()
    return {name: parameter.grad for name, parameter in one.model.named_parameters()}


# --- layers -----------------------------------------------------------------------------------------------------------


def layer_s_results(layer, residual, layout):
    """y and the gradients of x, the residual, gamma and beta."""
    generator = torch.Generator().manual_seed(0)
    format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    x, r, dy = (t.contiguous(memory_format=format) for t in torch.randn((3, 4, 8, 5, 5), generator=generator))
    x, r = x.requires_grad_(), r.requires_grad_()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(8, generator=generator))
    needed = [x, *([r] if residual else []), *layer.parameters()]
    y = layer(x, r) if residual else layer(x)
    return [y, *torch.autograd.grad(y, needed, dy)]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("contestant", ["cubn", "fused"])
def test_a_layer_has_torch_s_output_and_gradients(contestant, residual, layout):
    by_contestant = contestants(4)
    got, expected = (
        layer_s_results(getattr(by_contestant[name], "norm_add_relu" if residual else "norm_relu")(8), residual, layout)
        for name in (contestant, "torch")
    )
    bound = 4 * 5 * 5 * torch.finfo(torch.float32).eps  # of sums of so many values
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_the_timed_calls_of_torch_are_those_of_its_modules(residual):
    expected = layer_s_results(contestants(4)["torch"].norm_relu(8), residual, "nchw")
    got = layer_s_results(with_relu_timed(Torch).norm_relu(8), residual, "nchw")
    apart = layer_s_results(with_relu_apart(lambda C: BatchNorm(C, calls=Torch)).norm_relu(8), residual, "nchw")
    assert all(map(torch.equal, got, expected))
    assert all(map(torch.equal, apart, expected))


def test_a_layer_frees_its_input_in_the_backward():
    x = torch.randn(3, 8, 5, 5, requires_grad=True) + 0
    alive = weakref.ref(x.untyped_storage())
    y = contestants(4)["fused"].norm_relu(8)(x)
    del x
    assert alive() is not None
    y.sum().backward()
    assert alive() is None


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layout"), TRAINED)
def test_a_network_fused_has_the_bits_of_one_that_is_not(name, layout):
    """y in float32 is rounded after each operation either way."""
    cubn_s, fused = (trained(name, layout, contestant) for contestant in ("cubn", "fused"))
    for (of, ours), theirs in zip(gradients(cubn_s).items(), gradients(fused).values(), strict=True):
        assert torch.equal(ours, theirs), of
    buffers = [
        [b for of, b in one.model.named_buffers() if of.endswith(("running_mean", "running_var"))]
        for one in (cubn_s, fused)
    ]
    assert buffers[0] and all(map(torch.equal, *buffers))
    assert all(mean.abs().max() > 0 for mean in buffers[0][::2])


@pytest.mark.parametrize("name", models.NETWORKS)
def test_cubn_trains_the_network_that_torch_trains(name):
    ours, theirs = (trained(name, "nchw", contestant) for contestant in ("fused", "torch"))
    got, expected = (one.model(one.x) for one in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", models.NETWORKS)
@pytest.mark.parametrize("contestant", ["none", "bare"])
def test_without_batch_norm_all_the_rest_is_computed_on_normal_numbers(contestant, name):
    one = trained(name, "nchw", contestant)
    assert not [part for part in one.model.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
    with torch.device("meta"):
        whole = models.NETWORKS[name].build(contestants(4)["torch"])
    assert weights(one.model) == weights(whole)
    for of, gradient in gradients(one).items():
        assert 1e-20 < gradient.abs().max() < 1e20, of


def test_the_program_knows_the_networks():
    assert list(networks.LAYOUTS) == [*models.NETWORKS, "numpy"]


# --- in NumPy ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_loop(monkeypatch):
    for name, value in {"BATCH": 16, "WIDTH": 32, "LAYERS": 2}.items():
        monkeypatch.setattr(numpy_loop, name, value)


@pytest.mark.usefixtures("small_loop")
def test_the_loop_in_numpy_has_the_gradients_of_a_batch_norm_in_numpy():
    plain, ours = numpy_loop.Perceptron(numpy_loop.Plain, True), numpy_loop.Perceptron(cubn, True)
    bound = 16 * 32 * np.finfo(np.float32).eps  # of sums of so many values, layer by layer
    for (dw, of_norm), (dw_plain, of_plain) in zip(ours.step(), plain.step(), strict=True):
        for got, expected in zip((dw, *of_norm[:3]), (dw_plain, *of_plain[:3]), strict=True):
            assert np.abs(got - expected).max() <= bound * np.abs(expected).max()
    for got, expected in zip(ours.states, plain.states, strict=True):
        np.testing.assert_allclose(got.running_mean, expected.running_mean, rtol=bound, atol=bound)
        np.testing.assert_allclose(got.running_var, expected.running_var, rtol=bound)


@pytest.mark.usefixtures("small_loop")
@pytest.mark.parametrize("calls", [cubn, numpy_loop.Plain])
def test_the_loop_fused_has_the_bits_of_the_one_that_is_not(calls):
    apart, fused = (numpy_loop.Perceptron(calls, fused).step() for fused in (False, True))
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(apart, fused, strict=True))


def test_the_process_of_the_loop_in_numpy_has_no_torch():
    program = "import sys, networks; networks.contestants('numpy', '2-d', False); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=FOLDER, check=True)


# --- blocks and intervals ---------------------------------------------------------------------------------------------


class Clock:
    """Of the module `shares`: time passes only in steps and pauses."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(shares.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(shares.time, "sleep", lambda seconds: self.log.append("pause"))

    def step(self, name, *seconds):
        """A step that takes these seconds in turns, but none of them the first time."""
        durations = iter([0.0, *(seconds * 1000)])

        def run():
            self.log.append(name)
            self.now += next(durations)

        return run


def test_the_first_step_of_a_block_does_not_count_where_there_are_more(monkeypatch):
    clock = Clock(monkeypatch)
    blocks = shares.alternate_blocks({"short": clock.step("short", 0.09, 0.05, 0.04, 0.07)}, 2)
    assert blocks["short"] == pytest.approx([0.05, 0.05])


def test_a_long_step_is_a_block(monkeypatch):
    clock = Clock(monkeypatch)
    blocks = shares.alternate_blocks({"a": clock.step("a", 0.5, 0.7), "b": clock.step("b", 0.3)}, 2)
    assert blocks["a"] == pytest.approx([0.5, 0.7])
    assert clock.log == ["a", "b", *("pause", "a", "pause", "b"), *("pause", "a", "pause", "b")]


def test_everybody_is_run_in_every_place_and_behind_every_other():
    names = list("abcde")
    orders = [shares.turn(names, i) for i in range(10)]
    assert all(sorted(order) == names for order in orders)
    assert all({order[i] for order in orders} == set(names) for i in range(5))
    assert len({pair for order in orders for pair in pairwise(order)}) == 10


def test_calls_are_timed_and_their_results_returned(monkeypatch):
    clock = Clock(monkeypatch)

    class Calls:
        @staticmethod
        def forward_train(x, relu):
            clock.now += 2
            return x, relu

        @staticmethod
        def backward(dy, saved):
            clock.now += 3
            return dy, saved

    timed = shares.Timed(Calls)

    def step():
        clock.now += 10
        assert timed.forward_train(1, relu=True) == (1, True)
        assert timed.backward(4, 5) == (4, 5)

    assert shares.seconds_in_calls({"it": shares.TimedStep(step, timed)}, 3) == {"it": (2, 3)}


def blocks_of(noise, **steps):
    """30 blocks around these seconds, under a load that slows all contestants of a round down alike."""
    rng = np.random.default_rng(1)
    load = rng.uniform(0, 0.5, 30)
    return {name: step + load + rng.normal(0, noise, 30) for name, step in steps.items()}


KNOWN = {"torch": 1.20, "cubn": 1.15, "fused": 1.06, "none": 1.00, "bare": 0.90}


def test_intervals_contain_what_was_put_in_and_are_those_of_the_differences():
    row = networks.estimates(blocks_of(0.01, **KNOWN), "torch")
    for figure, truth in (
        (row["share_ms"]["torch"], 200),
        (row["share_ms"]["cubn"], 150),
        (row["share_with_relu_ms"]["fused"], 160),
        (row["cubn_minus_reference_ms"], -50),
        (row["fused_minus_reference_ms"], -140),
    ):
        value, low, high = figure
        assert low < truth < high and low < value < high
        assert high - low < 30  # the load, of 500 ms, is not in it
    for figure, truth in ((row["share_ratio"], 0.75), (row["share_ratio_with_relu"], 0.16 / 0.30)):
        assert figure[1] < truth < figure[2] and figure[2] - figure[1] < 0.2
    assert row["step_ms"]["torch"][0] == pytest.approx(1450, rel=0.1)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        blocks = {"a": rng.normal(3, 1, 30), "b": rng.normal(1, 1, 30)}
        _, low, high = shares.estimate(blocks, shares.difference("a", "b"))
        covered += low <= 2 <= high
    assert 52 <= covered <= 60


def test_a_share_that_is_lost_in_noise_decides_nothing_in_favour():
    row = networks.estimates(blocks_of(0.001, **{**KNOWN, "torch": 0.95}), "torch")
    assert row["share_ratio"] == [None, None, None]
    assert not networks.holds(row["share_ratio"], 1.0)
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def with_calls(row):
    names = ("torch", "cubn", "torch + ReLU", "cubn + ReLU")
    of_process = {"network": "n", "layout": "nchw", "cubn_threads": "2"}
    return of_process | row | {"in_calls_ms": {name: [1.0, 2.5] for name in names}}


@pytest.mark.parametrize(
    ("changed", "refuted"),
    [({}, 0), ({"cubn": 1.25}, 2), ({"fused": 1.15}, 1)],
    ids=["all hold", "share and step", "share with ReLU"],
)
def test_the_lower_end_of_an_interval_decides(changed, refuted):
    row = with_calls(networks.estimates(blocks_of(0.001, **{**KNOWN, **changed}), "torch"))
    said = networks.text(row)
    assert said.count(": holds") == 3 - refuted and said.count("DOES NOT HOLD") == refuted
    assert networks.holds([1.1, 0.99, 1.2], 1.0) and not networks.holds([1.1, 1.01, 1.2], 1.0)


def test_the_compiled_network_is_shown_and_decides_nothing():
    row = with_calls(networks.estimates(blocks_of(0.001, compiled=1.0, **KNOWN), "torch"))
    assert networks.text(row).count("torch.compile") == 2 and networks.text(row).count(": holds") == 3


def test_a_table_has_a_line_for_each_row():
    row = with_calls(networks.estimates(blocks_of(0.001, **KNOWN), "torch"))
    header, rule, *lines = networks.table([row, row]).splitlines()
    assert len(lines) == 2 and "3.5, 3.5" in lines[0]
    assert {line.count("|") for line in (header, rule, *lines)} == {10}


# --- idle -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", idle.CASES)
def test_every_idle_case_makes_its_call(case):
    made = idle.CASES[case]()()
    assert (made is None) == (case == "nothing")


def test_what_info_says_about_threads_is_found(monkeypatch):
    monkeypatch.setattr("cubn.cli.info._mpi", lambda: {"library": "not asked: it takes a second"})
    cubn.set_num_threads(3)
    assert "3" in networks.threads()
