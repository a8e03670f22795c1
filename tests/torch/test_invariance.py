"""`batch_invariance` names the layer that depends on the batch, blames no other, and leaves everything as it was."""

import runpy
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import cubn.torch  # noqa: E402
from cubn.torch import batch_invariance  # noqa: E402
from cubn.torch._models import bits  # noqa: E402


class Function(nn.Module):
    """A layer that is a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


class Around(nn.Module):
    """A model: modules by name, and a function that calls them."""

    def __init__(self, function, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def per_sample():
    """A linear layer whose bits do not depend on the batch."""
    return Function(lambda x: x * torch.arange(1.0, 1 + x.shape[-1]) + 0.25)


def mixing():
    return Function(lambda x: x - x.mean(0))


@pytest.fixture
def x():
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def verdicts(report):
    return {layer.name: layer.verdict for layer in report.layers}


INNOCENT, GUILTY = "invariant", "depends on the batch"

# --- who is named -----------------------------------------------------------------------------------------------------


def test_a_model_of_layers_that_are_independent_of_the_batch_is_true(x):
    model = nn.Sequential(per_sample(), cubn.torch.BatchNorm1d(4), nn.ReLU(), per_sample()).eval()
    report = batch_invariance(model, x)
    assert report and report.invariant and report.first is None and report.guilty == ()
    assert [layer.path for layer in report.layers] == ["0", "1", "2", "3", "(whole model)"]
    assert set(verdicts(report).values()) == {INNOCENT}
    assert report.batch_sizes == (1, 2, 3, 4, 5)


def test_the_layer_that_mixes_is_named_and_none_behind_it(x):
    model = nn.Sequential(per_sample(), cubn.torch.BatchNorm1d(4), mixing(), nn.ReLU(), cubn.torch.BatchNorm1d(4))
    report = batch_invariance(model.eval(), x)
    assert not report and report.first.path == "2" and report.first.kind == "Function"
    assert verdicts(report) == dict.fromkeys("0134", INNOCENT) | {"2": GUILTY, "(whole model)": GUILTY}


def test_a_difference_has_its_batch_sizes_and_its_size(x):
    layer = Function(lambda x: x * (2 if len(x) == 1 else 1) + (x != x[0]) * 0)
    report = batch_invariance(nn.Sequential(layer).eval(), torch.full((6, 4), 1.5))
    assert report.first.batch_sizes == (1,)
    assert (report.first.max_abs, report.first.max_ulp) == (1.5, 2**23)


def test_what_depends_on_the_place_in_the_batch_is_found():
    """At the end, kernels have remainders."""
    last = Function(lambda x: torch.cat([x[:-1], 2 * x[-1:]]))
    first = Function(lambda x: torch.cat([2 * x[:1], x[1:]]))
    for layer in (first, last):
        assert batch_invariance(layer.eval(), torch.ones(6, 4), batch_sizes=(2,)).first.path == "(model)"


def test_two_that_mix_are_both_named_in_order(x):
    report = batch_invariance(nn.Sequential(mixing(), nn.ReLU(), mixing()).eval(), x)
    assert [layer.path for layer in report.guilty] == ["0", "2", "(whole model)"]


@pytest.mark.parametrize(
    ("function", "where"),
    [
        (lambda m, x: m.b(m.a(x - x.mean(0))), "input → a"),
        (lambda m, x: m.b(m.a(x) - x.mean(0)), "a → b"),
        (lambda m, x: m.b(m.a(x)) - x.mean(0), "b → output"),
    ],
)
def test_functions_that_mix_are_named_between_the_modules(function, where, x):
    report = batch_invariance(Around(function, a=per_sample(), b=cubn.torch.BatchNorm1d(4)).eval(), x)
    assert report.first.path == where and report.first.kind == "between the modules"
    assert verdicts(report) == {"a": INNOCENT, "b": INNOCENT, where: GUILTY, "(whole model)": GUILTY}


def test_on_the_tower_no_batch_norm_is_blamed():
    example = Path(__file__).parents[2] / "examples" / "output_independent_of_batch_torch.py"
    names = runpy.run_path(str(example))
    model, x = names["tower"](), names["boards"](63)
    report = batch_invariance(model, x, batch_sizes=(1, 3, 32))
    assert len(report.layers) > 2 * 39
    assert {layer.kind for layer in report.guilty[:-1]} <= {"Conv2d", "Linear"}
    assert all(layer.verdict == INNOCENT for layer in report.layers if layer.kind.startswith("BatchNorm"))


# --- training ---------------------------------------------------------------------------------------------------------


def trained():
    return nn.Sequential(
        per_sample(), cubn.torch.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4, momentum=None), nn.ReLU()
    )


def test_in_training_batch_norms_mix_by_definition_and_are_the_only_ones(x):
    report = batch_invariance(trained(), x)
    assert report and report.first is None
    expected = {"1": "mixes by definition", "2": "random by definition", "3": "mixes by definition"}
    whole = {"(whole model)": "mixes by definition"}
    assert verdicts(report) == {"0": INNOCENT, "4": INNOCENT} | expected | whole


def test_another_mixer_in_training_is_guilty(x):
    model = trained().append(mixing()).append(nn.ReLU())
    report = batch_invariance(model, x)
    assert not report and [layer.path for layer in report.guilty] == ["5"]
    model = Around(lambda m, x: m.layers(x) + m.layers(x).mean(0), layers=trained())
    assert batch_invariance(model, x).first.path == "layers.4 → output"


def test_what_mixes_by_definition_is_not_run_again(x):
    """Other ranks would wait for it, or it for them."""
    runs = []

    class Counted(cubn.torch.BatchNorm1d):
        def forward(self, x):
            runs.append(len(x))
            return super().forward(x)

    assert not batch_invariance(nn.Sequential(Counted(4), mixing()), x)
    assert runs == [6]


def test_a_batch_norm_left_in_training_in_a_model_that_is_not_is_guilty(x):
    model = trained().eval()
    model[1].train()
    assert batch_invariance(model, x, batch_sizes=(2, 3)).first.path == "1"


def test_a_batch_norm_without_running_statistics_is_guilty_in_inference(x):
    model = nn.Sequential(cubn.torch.BatchNorm1d(4, track_running_stats=False)).eval()
    assert batch_invariance(model, x, batch_sizes=(2, 3)).first.path == "0"


def test_a_frozen_batch_norm_is_compared_in_training(x):
    model = nn.Sequential(cubn.torch.BatchNorm1d(4), nn.ReLU())
    model[0].frozen = True
    assert verdicts(batch_invariance(model, x)) == dict.fromkeys(["0", "1", "(whole model)"], INNOCENT)


# --- what cannot be compared is not passed ----------------------------------------------------------------------------


def reasons(report):
    return {layer.name: layer.reason for layer in report.layers if layer.verdict == "not comparable"}


class Box:
    """No tensor, and not known to torch."""

    def __init__(self, x):
        self.x = x


def test_results_without_tensors_are_not_comparable_and_nothing_behind_is_blamed(x):
    opened = Function(lambda box: box.x)
    model = nn.Sequential(Function(Box), opened, nn.ReLU()).eval()
    report = batch_invariance(model, x)
    assert not report and report.first is None
    assert reasons(report) == {"0": "a Box instead of tensors", "0 → 1": "a Box instead of tensors"}


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda x: (x, x.mean().item()), "a float instead of tensors"),
        (lambda x: (x, None if len(x) < 6 else x), "a NoneType instead of tensors"),
        (lambda x: (x, x if len(x) < 6 else 6), "not always a dense tensor"),
        (lambda x: (x, x.to_sparse()), "not always a dense tensor"),
        (lambda x: (x, x.double() if len(x) < 6 else x), "torch.float32 of the whole batch, torch.float64 of a part"),
        (lambda x: (x,) * len(x), "other values of 1 samples than of 6"),
    ],
)
def test_results_that_are_not_all_dense_tensors_are_not_comparable(layer, reason, x):
    report = batch_invariance(Around(lambda m, x: m.a(x)[0], a=Function(layer)).eval(), x, batch_sizes=(1,))
    assert not report and reasons(report) == {"a": reason}


def test_sizes_and_options_may_be_among_arguments_and_results(x):
    layer = Function(lambda x, size, scale, name: (x.reshape(size, 4) * scale, size, scale, name, None))
    assert batch_invariance(Around(lambda m, x: m.a(x, len(x), 0.5, "a")[0], a=layer).eval(), x)


def test_what_mixes_in_a_box_is_not_blamed_on_who_opens_it(x):
    model = nn.Sequential(Function(lambda x: Box(x - x.mean(0))), Function(lambda box: box.x)).eval()
    report = batch_invariance(model, x)
    assert not report and [layer.path for layer in report.guilty] == ["(whole model)"]
    assert reasons(report)["1"] == "inputs that could not be compared"


def test_what_mixes_in_a_box_is_not_blamed_on_what_is_between_the_modules(x):
    boxed = Function(lambda x: Box(x - x.mean(0)))
    report = batch_invariance(Around(lambda m, x: m.b(m.a(x).x), a=boxed, b=nn.ReLU()).eval(), x)
    assert not report and [layer.path for layer in report.guilty] == ["(whole model)"]
    assert reasons(report) == {"a": "a Box instead of tensors", "a → b": "behind what could not be compared"}


def test_a_shape_that_depends_on_the_values_is_not_comparable(x):
    model = nn.Sequential(Function(lambda x: x[x > 0]), nn.ReLU()).eval()
    report = batch_invariance(model, x, batch_sizes=(1,))
    assert not report and report.first is None
    assert reasons(report)["0"].startswith("no axis is the batch: shape (")


def test_random_numbers_are_not_comparable(x):
    noise = Function(lambda x: x + torch.randn_like(x))
    report = batch_invariance(nn.Sequential(per_sample(), noise, nn.ReLU()).eval(), x)
    assert not report and report.first is None
    assert reasons(report) == dict.fromkeys(["1", "(whole model)"], "draws random numbers")
    report = batch_invariance(Around(lambda m, x: m.a(nn.functional.dropout(x)), a=nn.ReLU()), x)
    assert report.first is None and reasons(report)["input → a"] == "draws random numbers"


def test_who_mixes_behind_random_numbers_is_guilty_all_the_same(x):
    model = Around(lambda m, x: m.a(nn.functional.dropout(x)), a=mixing())
    assert verdicts(batch_invariance(model, x))["a"] == GUILTY


def test_other_bits_from_the_same_inputs_are_not_the_batch_s_fault(x):
    counter = iter(range(1000))
    model = nn.Sequential(Function(lambda x: x + next(counter)), nn.ReLU()).eval()
    report = batch_invariance(model, x)
    assert not report and report.first is None
    assert reasons(report) == dict.fromkeys(["0", "(whole model)"], "other bits from the same inputs")


@pytest.mark.parametrize(
    ("forward", "where", "which"),
    [
        (lambda m, x: m.a(m.b(x) if len(x) == 1 else x), "input → a", "other"),
        (lambda m, x: m.b(m.a(x)) if len(x) > 1 else m.a(x), "a → b", "fewer"),
        (lambda m, x: m.a(x) if len(x) > 1 else m.b(m.a(x)), "a → output", "other"),
    ],
)
def test_another_way_through_the_model_is_not_comparable_but_what_comes_of_it(forward, where, which, x):
    report = batch_invariance(Around(forward, a=nn.ReLU(), b=nn.ReLU()).eval(), x)
    assert not report and report.first is None
    assert reasons(report)[where] == f"{which} modules are called for a batch of 1"
    assert verdicts(report)["(whole model)"] == INNOCENT
    report = batch_invariance(Around(forward, a=nn.ReLU(), b=mixing()).eval(), x)
    assert verdicts(report)["(whole model)"] == GUILTY


def test_what_a_model_raises_on_few_samples_is_a_reason(x):
    model = Around(lambda m, x: m.b(m.a(x).reshape(-1, 2, 4)), a=nn.ReLU(), b=nn.ReLU()).eval()
    report = batch_invariance(model, x, batch_sizes=(1, 4))
    assert verdicts(report)["a"] == INNOCENT
    assert reasons(report)["b"].startswith("RuntimeError for 1: ")


# --- where the batch is -----------------------------------------------------------------------------------------------


def positions_first(m, x):
    """Positions, then samples, then both in one axis; and a table that is of no sample."""
    x = m.first(x.transpose(0, 1)) + m.table(torch.arange(6)).unsqueeze(1)
    return m.rows(x.reshape(-1, 4)).reshape(6, -1, 4)


def samples_first(m, x):
    return m.rows(x.reshape(-1, 4)).reshape(-1, 6, 4)


def samples_between(m, x):
    """Half of the positions, samples, the other half, in one axis."""
    return m.rows(x.reshape(-1, 2, 3, 4).transpose(0, 1).reshape(-1, 4)).reshape(2, -1, 3, 4)


FORWARDS = [positions_first, samples_first, samples_between]


@pytest.mark.parametrize("forward", FORWARDS)
def test_the_batch_need_not_be_the_first_axis_nor_one_of_its_own(forward):
    x = torch.randn(5, 6, 4)

    def examined(training=False, **others):
        parts = dict(first=per_sample(), table=nn.Embedding(6, 4), rows=per_sample())
        report = batch_invariance(Around(forward, **parts | others).train(training), x)
        return [layer.path for layer in report.layers[:-1] if not layer.invariant]

    assert examined() == []
    assert examined(rows=mixing()) == ["rows"]
    assert examined(rows=nn.BatchNorm1d(4), training=True) == ["rows"]
    if forward is positions_first:
        assert examined(first=Function(lambda x: x - x.mean(1, keepdim=True))) == ["first"]


def test_a_part_of_the_batch_may_not_be_whole_rows(x):
    pairs = Around(lambda m, x: m.a(x.reshape(-1, 8)), a=nn.ReLU()).eval()
    assert batch_invariance(pairs, x, batch_sizes=(2, 4))
    assert reasons(batch_invariance(Around(lambda m, x: m.a(x[::2]), a=nn.ReLU()).eval(), x, batch_sizes=(3,)))


def test_a_statistic_of_the_batch_depends_on_it(x):
    assert batch_invariance(Function(lambda x: x.mean()).eval(), x).first.path == "(model)"


def test_arguments_by_name_and_in_a_tuple(x):
    model = Around(lambda m, x, *, scale: m.a(x * scale), a=mixing()).eval()
    for given in ({"x": x, "scale": 2.0}, {"x": x, "scale": torch.ones(6, 1)}):
        assert batch_invariance(model, given).first.path == "a"
    assert batch_invariance(Around(lambda m, x, y: m.a(x) + y, a=nn.ReLU()).eval(), (x, x))


def test_results_in_tuples_and_dicts_are_compared(x):
    model = Around(lambda m, x: m.a(x)["mean"][1], a=Function(lambda x: {"mean": (x, x - x.mean(0))})).eval()
    assert [layer.path for layer in batch_invariance(model, x).guilty] == ["a", "(whole model)"]


# --- which modules are layers -----------------------------------------------------------------------------------------


def test_every_call_of_a_module_has_a_row(x):
    odd = Function(lambda x, mix=False: x - x.mean(0) if mix else x)
    report = batch_invariance(Around(lambda m, x: m.a(m.a(m.a(x), mix=True)), a=odd).eval(), x)
    assert verdicts(report) == {"a": INNOCENT, "a (call 2)": GUILTY, "a (call 3)": INNOCENT, "(whole model)": GUILTY}


def test_a_module_that_computes_by_functions_is_a_layer():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    model = Around(lambda m, x: m.b(m.a(x, x, x, need_weights=False)[0]), a=attention, b=nn.ReLU()).eval()
    report = batch_invariance(model, torch.randn(6, 5, 4), batch_sizes=(1,))
    assert [layer.path for layer in report.layers] == ["a", "b", "(whole model)"]


class WithActivation(nn.BatchNorm1d):
    """As timm's: batch norm by a function, and a module that is its activation."""

    def __init__(self):
        super().__init__(4)
        self.act = nn.ReLU()

    def forward(self, x):
        y = nn.functional.batch_norm(x, self.running_mean, self.running_var, training=self.training)
        return self.act(y)


def test_a_batch_norm_with_modules_in_it_is_a_layer(x):
    report = batch_invariance(nn.Sequential(WithActivation(), nn.ReLU()), x)
    assert report and verdicts(report)["0"] == "mixes by definition" and len(report.layers) == 3


def test_a_parametrized_module_is_a_layer(x):
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU()).eval()
    report = batch_invariance(model, x)
    assert [layer.path for layer in report.layers] == ["0", "1", "(whole model)"]


def test_a_compiled_module_is_a_layer(x):
    inside = nn.Sequential(nn.ReLU(), mixing())
    inside.compile(backend="eager", dynamic=True, fullgraph=True)
    for compiled in (inside, torch.compile(nn.Sequential(nn.ReLU(), mixing()), backend="eager", dynamic=True)):
        report = batch_invariance(nn.Sequential(per_sample(), compiled).eval(), x, batch_sizes=(2,))
        assert verdicts(report) == {"0": INNOCENT, "1": GUILTY, "(whole model)": GUILTY}


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_module_is_a_layer(x):
    scripted = torch.jit.script(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)))
    assert batch_invariance(scripted.eval(), x)
    scripted.train()
    report = batch_invariance(nn.Sequential(scripted).eval().append(scripted.train()), x, batch_sizes=(2,))
    assert report.first.path == "0"


def test_hooks_are_no_part_of_a_layer(x):
    model = nn.Sequential(nn.ReLU(), nn.ReLU()).eval()
    model[0].register_forward_hook(lambda module, given, y: y - y.mean(0))
    assert batch_invariance(model, x).first.path == "0 → 1"


def test_layers_that_work_in_place(x):
    twice = Function(lambda x: x.mul_(2))
    model = nn.Sequential(per_sample(), nn.ReLU(inplace=True), twice, mixing(), nn.ReLU(inplace=True), mixing()).eval()
    guilty = dict.fromkeys(["3", "5", "(whole model)"], GUILTY)
    for given in (x, x.clone().requires_grad_()):
        assert verdicts(batch_invariance(model, given)) == dict.fromkeys("0124", INNOCENT) | guilty
    before = x.clone()
    assert batch_invariance(nn.Sequential(twice, nn.ReLU()).eval(), x) and torch.equal(x, before)


# --- what is left behind ----------------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.count = self.count + 1
        return x * torch.rand(())


class FailsOnFew(nn.Module):
    def forward(self, x):
        if len(x) < 3:
            raise ValueError("few")
        return x


class Stops(nn.Module):
    def forward(self, x):
        raise KeyboardInterrupt


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("last", [nn.ReLU, FailsOnFew, Stops])
def test_everything_is_as_before_even_after_an_exception(training, last, x):
    model = nn.Sequential(trained(), Counting(), last()).train(training)
    model[0][1].eval()
    model[1].forward = model[1].forward  # its own, as accelerate has
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    attributes = [vars(module).copy() for module in model.modules()]
    flags = [module.training for module in model.modules()]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        before = torch.get_rng_state()
        try:
            batch_invariance(model, x)
        except KeyboardInterrupt:
            assert last is Stops
        assert torch.equal(torch.get_rng_state(), before)
    for name, buffer in model.named_buffers():
        same, value = buffers[name]
        assert buffer is same and torch.equal(buffer, value)
    assert attributes == [vars(module) for module in model.modules()]
    assert flags == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_buffers_may_be_sparse(x):
    """As the adjacency of a graph is."""
    model = Around(lambda m, x: m.a(m.graph @ x.T).T, a=nn.ReLU()).eval()
    model.register_buffer("graph", torch.eye(4).to_sparse())
    assert batch_invariance(model, x)
    assert model.graph.is_sparse and torch.equal(model.graph.to_dense(), torch.eye(4))


@pytest.mark.parametrize("enabled", [True, False])
def test_the_model_runs_in_the_caller_s_grad_mode(enabled, x):
    modes = set()
    with torch.set_grad_enabled(enabled):
        batch_invariance(nn.Sequential(Function(lambda x: modes.add(torch.is_grad_enabled()) or x)).eval(), x)
        assert torch.is_grad_enabled() == enabled
    assert modes == {enabled}


def test_gradients_are_required_where_they_are_in_the_model(x):
    seen = []
    watch = Function(lambda x: seen.append(x.requires_grad) or x)
    batch_invariance(nn.Sequential(mixing(), watch, nn.BatchNorm1d(4), watch), x.requires_grad_())
    assert seen and all(seen)


def test_where_nothing_differs_the_model_runs_once_for_each_part(x):
    runs = []
    batch_invariance(nn.Sequential(Function(lambda x: runs.append(len(x)) or x)).eval(), x, batch_sizes=(1, 3))
    assert sorted(runs) == [1, 1, 3, 3, 6, 6]


# --- what is said -----------------------------------------------------------------------------------------------------


def test_the_table_is_aligned_and_names_the_first(x):
    noise = Function(lambda x: x + torch.randn_like(x))
    report = batch_invariance(nn.Sequential(nn.ReLU(), mixing(), noise).eval(), x, batch_sizes=(1, 3))
    head, _, header, *rows, _, summary = str(report).splitlines()
    assert head == "6 samples, compared with 1, 3 of them, the first and the last."
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "(whole"]
    assert [row.index(verdict) for row, verdict in zip(rows, (INNOCENT, GUILTY, "not"), strict=False)] == [
        header.index("batch sizes") - len(GUILTY) - 2
    ] * 3
    assert rows[1].index("1 3") == header.index("batch sizes")
    assert rows[2].endswith("not comparable: draws random numbers")
    assert summary == "1 of 3 layers depend on the batch, first 1 (Function); 1 not comparable."
    assert repr(report) == f"<BatchInvariance: {summary[:-1]}>"


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((lambda x: x, torch.ones(3, 4)), TypeError, "model must be a torch.nn.Module; got a function"),
        ((nn.LazyLinear(3), torch.ones(3, 4)), ValueError, "model must have all its parameters; got a lazy weight"),
        ((nn.ReLU(), [1.0]), TypeError, "x must be a tensor, or a tuple or mapping"),
        ((nn.ReLU(), torch.ones(1, 4)), ValueError, "x must have at least two samples; got 1"),
        ((nn.ReLU(), torch.ones(3, 4), 2), TypeError, "batch_sizes must be integers"),
        ((nn.ReLU(), torch.ones(3, 4), [1.5]), TypeError, "batch_sizes must be an integer; got 1.5"),
        ((nn.ReLU(), torch.ones(3, 4), [0, 1]), ValueError, "batch_sizes must be from 1 to the 3 samples of x"),
        ((nn.ReLU(), torch.ones(3, 4), [4]), ValueError, "batch_sizes must be from 1 to the 3 samples of x"),
        ((nn.ReLU(), torch.ones(3, 4), []), ValueError, "batch_sizes must be from 1 to the 3 samples of x; got none"),
    ],
)
def test_bad_arguments(arguments, error, says):
    with pytest.raises(error, match=f"^batch_invariance: {says}"):
        batch_invariance(*arguments)


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_size_of_a_difference(dtype):
    def of(a, b):
        a, b = torch.tensor([0.0, a], dtype=dtype), torch.tensor([0.0, b], dtype=dtype)
        assert not bits.equal(a, b) and bits.equal(a, a.clone())
        return bits.difference(a, b)

    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).eps * torch.finfo(dtype).tiny
    assert of(1.0, 1.0 + 3 * eps) == (3 * eps, 3)
    assert of(-1.0 - eps, -1.0) == (eps, 1)
    assert of(0.0, -0.0) == (0.0, 1)
    assert of(-2 * tiny, tiny) == (3 * tiny, 4)
    assert of(float("nan"), 1.0).max_abs == of(1.0, float("inf")).max_abs == float("inf")
    assert bits.equal(*[torch.tensor([float("nan")], dtype=dtype)] * 2)
    assert 0 < of(float("inf"), float("-inf")).max_ulp <= 2**63 - 1


def test_the_size_of_a_difference_of_other_types():
    assert bits.difference(torch.tensor([1, 5]), torch.tensor([1, 2])) == (3.0, 0)
    assert bits.difference(torch.tensor([True]), torch.tensor([False])) == (1.0, 0)
    assert bits.difference(torch.tensor([1 + 2j]), torch.tensor([1 + 4j])) == (2.0, 2**23)
    assert not bits.equal(torch.ones(2), torch.ones(3)) and not bits.equal(torch.ones(2), torch.ones(2).double())
