"""The modules of cubn.torch on a GPU: the bits of the CPU, in eager mode and compiled."""

import copy

import pytest

torch = pytest.importorskip("torch")

import cubn.torch  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("torch_device")]

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def step(module, *inputs):
    """y, the gradients of inputs and parameters, and the buffers, on the CPU."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = module(*inputs)
    y.backward(torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).reshape(y.shape))
    found = [y.detach(), *(x.grad for x in inputs), *(p.grad for p in module.parameters()), *module.buffers()]
    return [t.cpu() for t in found]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", ["BatchNorm2d", "BatchNormReLU2d", "BatchNormAddReLU2d"])
def test_a_step_has_the_bits_of_the_cpu(name, layout, training, compiled):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn((2, 8, 16, 9, 9), generator=generator)
    inputs = [x.contiguous(memory_format=FORMATS[layout]) for x in drawn[: 2 if "Add" in name else 1]]
    on_cpu = getattr(cubn.torch, name)(16).train(training)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    run = torch.compile(on_gpu, fullgraph=True) if compiled else on_gpu
    for _ in range(2):
        expected, got = step(on_cpu, *inputs), step(run, *(x.cuda() for x in inputs))
        assert all(map(torch.equal, got, expected))


def test_autocast_and_16_bit_data_have_the_bits_of_the_cpu():
    on_cpu = cubn.torch.BatchNorm2d(16)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    x = torch.randn((8, 16, 9, 9), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    expected, got = step(on_cpu, x), step(on_gpu, x.cuda())
    assert all(map(torch.equal, got, expected))
    assert got[0].dtype is torch.bfloat16 and on_gpu.running_var.dtype is torch.float32
