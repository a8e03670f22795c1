"""More than 2^31 elements: what some channels give is what they give alone, on the CPU."""

import pytest

import cubn
from tests.gpu import device_arrays
from tests.ops import arrays

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("torch_device")]

torch = pytest.importorskip("torch")

GIB = 2**30
SHAPES = {
    "rows": ((1, 2049, 1024, 1024), torch.contiguous_format),
    "odd rows": ((3, 683, 1031, 1033), torch.contiguous_format),
    "channels": ((2, 1056, 1024, 1024), torch.channels_last),
    "odd channels": ((2, 1031, 1030, 1033), torch.channels_last),
    "2-d": ((2**21 + 3, 1056), torch.contiguous_format),
    "long": ((1, 2, 2**30 + 5), torch.contiguous_format),
}


def step(x, dy, residual):
    state = cubn.BatchNormState(x.shape[1], like=x)
    y, saved = cubn.forward_train(x, state, residual=residual, relu=True)
    grads = cubn.backward(dy, saved)
    return {"y": y, "dx": grads.dx, "dresidual": grads.dresidual, "inference": cubn.forward(x, state)}, {
        "dgamma": grads.dgamma,
        "dbeta": grads.dbeta,
        "mean": state.running_mean,
        "var": state.running_var,
    }


@pytest.mark.parametrize("name", SHAPES)
def test_more_than_two_to_the_31_elements(name):
    shape, layout = SHAPES[name]
    if torch.cuda.mem_get_info()[0] < 40 * GIB:
        pytest.skip("needs 40 GiB of device memory")
    torch.manual_seed(0)
    x, dy, residual = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=layout) for _ in range(3)
    )
    assert x.numel() > 2**31
    elementwise, channelwise = step(x, dy, residual)
    C = shape[1]
    for c in sorted({0, C // 2, C - 1}):
        alone = [a[:, c : c + 1].contiguous().cpu() for a in (x, dy, residual)]
        expected_elements, expected_channels = step(*alone)
        for what, expected in expected_elements.items():
            got = elementwise[what][:, c : c + 1].contiguous()
            assert torch.equal(got.cpu().view(torch.int16), expected.view(torch.int16)), f"{what} of channel {c}"
        for what, expected in expected_channels.items():
            got = device_arrays.store_of(channelwise[what])[c : c + 1]
            arrays.assert_same(got, arrays.store_of(expected), f"{what} of channel {c}")
    del elementwise, channelwise, x, dy, residual, alone
    torch.cuda.empty_cache()
