"""torch.compile: one graph, eager's bits, no recompilation beyond the second size; collectives as in eager."""

import pytest

torch = pytest.importorskip("torch")

from torch._functorch import config as of_graphs  # noqa: E402
from torch._inductor import config as of_inductor  # noqa: E402

import cubn.torch as ct  # noqa: E402
from cubn.sync import threads  # noqa: E402
from cubn.sync.transport import Communicator  # noqa: E402
from tests.torch.comparing import batch, same  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, at every turn
BACKENDS = ["eager", "aot_eager", "inductor"]
SIZES = 4, 7, 9, 12


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Neither now nor earlier: inductor's graphs on disk know an operator by its name and schema, not by its fake."""
    torch._dynamo.reset()
    with of_inductor.patch(fx_graph_cache=False), of_graphs.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


class Everything(torch.nn.Module):
    """Every kind of module, rank, layout and narrow dtype, in one graph."""

    def __init__(self):
        super().__init__()
        self.plain = ct.BatchNorm2d(3)
        self.residual = ct.BatchNormAddReLU2d(3, momentum=None)
        self.masked = ct.BatchNormReLU2d(3, momentum=None)
        self.stateless = ct.BatchNorm2d(3, affine=False, track_running_stats=False)
        self.frozen = ct.BatchNorm1d(5).freeze()
        self.flat = ct.BatchNormAddReLU1d(5, bias=False)
        for i, parameter in enumerate(self.parameters()):
            parameter.data.copy_(torch.linspace(0.5, 1 + i, len(parameter)))

    def forward(self, image, narrow, flat, mask):
        y = self.residual(self.plain(image), self.stateless(image))
        return y, self.masked(narrow, mask), self.flat(self.frozen(flat), flat)


def inputs(n):
    image = batch((n, 3, 4, 2), seed=n)
    narrow = batch((n, 3, 3, 2), seed=n + 1, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    flat = batch((n, 5), seed=n + 2, dtype=torch.float16)
    return image, narrow, flat, torch.arange(n * 6).reshape(n, 3, 2) % 5 > 0


def step(run, module, n):
    """What a call gives: outputs, gradients where there are any, and buffers."""
    given = [each.requires_grad_(each.is_floating_point()) for each in inputs(n)]
    outputs = run(*given)
    if torch.is_grad_enabled():
        torch.autograd.backward(outputs, [batch(y.shape, seed=3, dtype=y.dtype) for y in outputs])
    sources = [*given, *module.parameters()]
    gradients = [each.grad for each in sources if each.grad is not None]
    module.zero_grad()
    return [y.detach() for y in outputs], gradients, [b.clone() for b in module.buffers()]


def all_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        if isinstance(a, list):
            all_same(a, b)
        else:
            assert same(a, b) and a.stride() == b.stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_step_has_the_bits_of_eager_for_every_batch_size(backend):
    module, expected = Everything(), Everything()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for training, grad in ((True, True), (False, True), (False, False)):
        for each in (module, expected):
            each.train(training)
        for i, n in enumerate(SIZES if training else SIZES[2:]):
            stable = training and i >= 2
            with torch.set_grad_enabled(grad), torch._dynamo.config.patch(error_on_recompile=stable):
                all_same(step(compiled, module, n), step(expected, expected, n))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_every_extent_may_be_a_symbol(backend):
    module = ct.BatchNormAddReLU2d(3, track_running_stats=False)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for i, shape in enumerate([(4, 3, 6, 7), (3, 3, 19, 2), (8, 3, 4, 4)]):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            found, expected = (_gradients(run, batch(shape), batch(shape, seed=1)) for run in (compiled, module))
        all_same(found, expected)


def _gradients(run, *given):
    given = [each.requires_grad_() for each in given]
    y = run(*given)
    return [y.detach(), *torch.autograd.grad(y, given, batch(y.shape, seed=3))]


def test_nothing_breaks_a_graph():
    found = torch._dynamo.explain(Everything())(*inputs(4))
    assert (found.graph_count, found.graph_break_count, found.break_reasons) == (1, 0, [])


def test_cuda_graphs_where_there_are_none_change_no_bit():
    module, expected = ct.BatchNormReLU1d(5), ct.BatchNormReLU1d(5)
    compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    for n in (4, 4):
        assert same(compiled(batch((n, 5))), expected(batch((n, 5))))
    all_same(list(module.buffers()), list(expected.buffers()))


def test_a_gradient_transform_compiles():
    module, x = ct.BatchNorm1d(3), batch((4, 3))

    def gradient(x):
        return torch.func.grad(lambda x: (module(x) * x).sum())(x)

    expected = gradient(x)
    assert same(torch.compile(gradient, fullgraph=True, backend="aot_eager")(x), expected)


# --- with other ranks -----------------------------------------------------------------------------------------------


class Alone(Communicator):
    """The one rank of a communicator, which writes down how many bytes it gathers."""

    def __init__(self):
        super().__init__(0, 1)
        self.gathered = []

    def gather(self, record, received, sizes):
        self.gathered.append(len(record))
        received[...] = record
        return self

    def wait(self):
        pass


class Branches(torch.nn.Module):
    """Layers without running statistics, of 1 to 4 channels: one whose y nobody uses, and those that could as well be
    computed in another order.
    """

    def __init__(self, comm):
        super().__init__()
        options = dict(track_running_stats=False, comm=comm)
        self.layers = torch.nn.ModuleList(ct.BatchNorm1d(C, **options) for C in range(1, 5))

    def forward(self, x):
        unused, a, b, c = self.layers
        first = a(x[:, :2])
        second = b(x.sin()[:, :3])
        unused(x[:, :1].cos())
        return first.sum() + second.sum() + c(x).sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_collective_is_removed_or_moved(backend):
    """A record holds 16 bytes for each channel, and 8 more."""
    comm = Alone()
    compiled = torch.compile(Branches(comm), fullgraph=True, backend=backend)
    x = batch((4, 4)).requires_grad_()
    y = compiled(x)
    records = [(n - 8) // 16 for n in comm.gathered[1::2]]
    assert records == [2, 3, 1, 4]
    comm.gathered.clear()
    y.backward()
    assert sorted((n - 8) // 16 for n in comm.gathered[1::2]) == [2, 3, 4]
    comm.gathered.clear()
    with torch.no_grad():
        compiled(x)
    assert [(n - 8) // 16 for n in comm.gathered[1::2]] == [2, 3, 1, 4]


class Synchronised(torch.nn.Module):
    def __init__(self, comm):
        super().__init__()
        self.first = ct.BatchNormReLU2d(3, comm=comm)
        self.second = ct.BatchNormAddReLU2d(3, comm=comm)

    def forward(self, x):
        return self.second(self.first(x), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_ranks_have_the_bits_of_eager_ones(backend):
    def rank(compiles):
        def steps(comm):
            module = Synchronised(comm)
            run = torch.compile(module, fullgraph=True, backend=backend) if compiles else module
            found = []
            for seed in range(2):
                x = batch((2 + comm.rank, 3, 2, 2), seed=2 * comm.rank + seed).requires_grad_()
                y = run(x)
                y.backward(batch(y.shape, seed=5))
                found += [
                    y.detach(),
                    x.grad,
                    *(p.grad for p in module.parameters()),
                    *(b.clone() for b in module.buffers()),
                ]
                module.zero_grad()
            return found, comm.exchanges

        return steps

    for (found, exchanges), (expected, as_many) in zip(
        threads.run(2, rank(True)), threads.run(2, rank(False)), strict=True
    ):
        assert exchanges == as_many == 8
        all_same(found, expected)


class InParts(torch.nn.Module):
    """Two synchronised batch norms, of communicators that may differ."""

    def __init__(self, *comms):
        super().__init__()
        self.layers = torch.nn.Sequential(*(ct.BatchNorm1d(3, comm=comm) for comm in comms))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which a compiler reads of what a graph is given
@pytest.mark.parametrize("backend", BACKENDS)
def test_synchronised_graphs_that_follow_one_another_have_a_backward(backend):
    """As torch.compile makes of a model in DistributedDataParallel, and of blocks that are compiled one by one."""
    model, expected = InParts(Alone(), Alone()), InParts(None, None)
    for layer in model.layers:
        layer.compile(backend=backend, fullgraph=True)
    found = []
    for module in model, expected:
        x, again = (batch((4, 3), seed=seed).requires_grad_() for seed in range(2))
        (module(x) * module(again)).sum().backward()
        found.append([x.grad, again.grad, *(p.grad for p in module.parameters())])
    all_same(*found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_of_two_communicators_compiles(backend):
    model, expected = InParts(Alone(), Alone()), InParts(None, None)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    found = []
    for module in compiled, expected:
        x = batch((4, 3)).requires_grad_()
        module(x).square().sum().backward()
        found.append([x.grad])
    all_same(*found)


def test_a_process_group_compiles():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module, expected = (ct.BatchNorm1d(3, comm=comm) for comm in (dist.group.WORLD, None))
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert same(compiled(batch((4, 3))), expected(batch((4, 3))))
        all_same(list(module.buffers()), list(expected.buffers()))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_an_input_may_be_its_own_residual(backend):
    layer = ct.BatchNormAddReLU2d(3)
    results = []
    for run in (layer, torch.compile(layer, backend=backend, fullgraph=True)):
        x = batch((4, 3, 2, 2)).requires_grad_()
        y = run(x, x)
        y.sum().backward()
        results.append((y, x.grad))
    assert all(map(same, *results))
