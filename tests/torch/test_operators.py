"""The operators: schemas, fakes and mutation as torch checks them, and fakes held to the real ones over layouts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch._subclasses import FakeTensorMode  # noqa: E402

from cubn.torch import _passes  # noqa: E402
from cubn.torch._routes import operators as ops  # noqa: E402

CASES = {
    "plain": dict(),
    "masked": dict(masked=True),
    "2-D residual relu": dict(shape=(6, 5), residual=True, relu=True),
    "channels_last residual relu": dict(residual=True, relu=True, layout="channels_last", dtype=torch.bfloat16),
    "no parameters, cumulative": dict(affine=False, momentum=None, relu=True),
    "no running statistics": dict(track=False),
}


def tensor(shape, dtype=torch.float32, layout="contiguous", seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.stack([x, x], -1)[..., 0]
    return x


def arguments(
    shape=(4, 5, 3, 2),
    dtype=torch.float32,
    layout="contiguous",
    residual=False,
    masked=False,
    affine=True,
    track=True,
    relu=False,
    momentum=0.1,
):
    """Those of batch_norm_train."""
    C = shape[1]
    mask = torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(2)) < 0.7 if masked else None
    parameters = (torch.linspace(0.5, 2, C), torch.linspace(-1, 1, C)) if affine else (None, None)
    counters = torch.tensor(3), torch.zeros(C, dtype=torch.int64)
    running = (torch.zeros(C), torch.ones(C), *counters) if track else (None,) * 4
    x = tensor(shape, dtype, layout)
    r = tensor(shape, dtype, layout, seed=1) if residual else None
    return [x, *parameters, r, mask, *running, None, momentum, 1e-5, relu, 0]


def frozen_arguments(case):
    *vectors, _, _, _, _, eps, relu, comm = arguments(**{**case, "track": True})
    return [*vectors, eps, relu, comm]


def backward_arguments(case, frozen=False):
    forward = frozen_arguments(case) if frozen else arguments(**case)
    x, gamma, beta, residual, mask, *_ = forward
    y, statistics, bits, _ = (ops.batch_norm_frozen if frozen else ops.batch_norm_train)(*forward)
    bits = bits if residual is not None and forward[-2] else None
    dtypes = (None if a is None else a.dtype for a in (gamma, beta))
    return [torch.cos(y), x, mask, statistics, bits, None, None, *dtypes, residual is not None, forward[-2], frozen, 0]


def double_backward_arguments(case, frozen=False):
    backward = backward_arguments(case, frozen)
    dx, dgamma, dbeta, dresidual = (d if d.numel() else None for d in ops.batch_norm_backward(*backward))
    return [torch.sin(dx), dgamma, dbeta, dresidual, *backward]


def check(operator, given):
    torch.library.opcheck(operator, given)


@pytest.mark.parametrize("case", CASES)
def test_torch_finds_nothing_wrong_with_training(case):
    check(ops.batch_norm_train, arguments(**CASES[case]))


@pytest.mark.parametrize("case", ["plain", "channels_last residual relu"])
def test_torch_finds_nothing_wrong_with_given_statistics(case):
    given = frozen_arguments(CASES[case])
    check(ops.batch_norm_frozen, given)
    check(ops.batch_norm_inference, given[:-1])


@pytest.mark.parametrize("case", CASES)
def test_torch_finds_nothing_wrong_with_the_backward(case):
    check(ops.batch_norm_backward, backward_arguments(CASES[case]))


def test_torch_finds_nothing_wrong_with_the_frozen_backward():
    check(ops.batch_norm_backward, backward_arguments(CASES["2-D residual relu"], frozen=True))


@pytest.mark.parametrize("case", ["no parameters, cumulative", "channels_last residual relu"])
def test_torch_finds_nothing_wrong_with_the_double_backward(case):
    check(ops.batch_norm_double_backward, double_backward_arguments(CASES[case]))


LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced"]


@st.composite
def any_case(draw):
    layout = draw(st.sampled_from(LAYOUTS))
    rank = 4 if layout == "channels_last" else draw(st.integers(2, 5))
    extent = st.sampled_from([1, 2, 3, 17])
    shape = (2, *(draw(extent) for _ in range(rank - 1)))
    flags = {name: draw(st.booleans()) for name in ("residual", "masked", "affine", "track", "relu")}
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    if flags["masked"]:  # of which at least two positions have to be present
        shape = (17, *shape[1:])
    return dict(shape=shape, dtype=dtype, layout=layout, **flags)


def facts(results):
    results = results if isinstance(results, tuple) else (results,)
    return [(r.shape, r.stride(), r.dtype, r.device) for r in results]


def check_fake(operator, given, dynamic):
    """The fake's facts are those of what is computed, also where extents are symbols."""
    real = operator(*given)
    shape_env = torch.fx.experimental.symbolic_shapes.ShapeEnv() if dynamic else None
    with FakeTensorMode(shape_env=shape_env) as mode:
        fake = operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in given))
    assert facts(fake) == facts(real)


@settings(max_examples=20)
@given(any_case(), st.booleans())
def test_fakes_know_every_shape_stride_and_type(case, dynamic):
    check_fake(ops.batch_norm_train, arguments(**case), dynamic)
    frozen = frozen_arguments(case)
    check_fake(ops.batch_norm_frozen, frozen, dynamic)
    check_fake(ops.batch_norm_inference, frozen[:-1], dynamic)
    check_fake(ops.batch_norm_backward, backward_arguments(case), dynamic)
    check_fake(ops.batch_norm_backward, backward_arguments(case, frozen=True), dynamic)
    check_fake(ops.batch_norm_double_backward, double_backward_arguments(case), dynamic)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_what_is_written_has_one_more_version(momentum):
    given = arguments(momentum=momentum)
    for _ in range(3):  # the full way, then the prepared one
        before = [a._version for a in given[5:9]]
        ops.batch_norm_train(*given)
        assert [a._version - b for a, b in zip(given[5:9], before, strict=True)] == [1] * 4


def test_a_residual_of_another_layout_changes_no_bit(backend):
    """Nor do two forwards before two backwards, which cannot know how each residual lay."""
    results = []
    for change in (lambda residual: residual, torch.Tensor.contiguous):
        given = arguments(**CASES["channels_last residual relu"])
        given[3] = change(given[3])
        results.append((given[3].stride(), given[0], *ops.batch_norm_train(*given)))
    gradients = [
        ops.batch_norm_backward(
            torch.cos(y), x, None, statistics, bits, None, None, *[torch.float32] * 2, True, True, False, 0
        )
        for _, x, y, statistics, bits, _ in results
    ]
    assert results[0][0] != results[1][0]
    assert torch.equal(results[0][2], results[1][2])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("case", ["masked", "2-D residual relu", "channels_last residual relu"])
@pytest.mark.parametrize("frozen", [False, True])
def test_operators_have_the_bits_of_eager(backend, case, frozen):
    x, gamma, beta, residual, mask, *rest = frozen_arguments(CASES[case]) if frozen else arguments(**CASES[case])
    *running, eps, relu, _ = rest
    vectors = gamma, beta, *running[:2]
    options = dict(eps=eps, mask=mask, residual=residual, relu=relu)
    for _ in range(2):
        if frozen:
            expected, left, relu_mask = _passes.frozen(x, vectors, **options)
        else:
            expected, left, relu_mask = _passes.train(x, (*vectors[:2], None, None), **options)
        dy, *given = backward_arguments(CASES[case], frozen)
        y = (ops.batch_norm_frozen if frozen else ops.batch_norm_train)(x, gamma, beta, residual, mask, *rest)[0]
        assert torch.equal(y, expected)
        for found, wanted in zip(
            ops.batch_norm_backward(dy, *given), _passes.backward(dy, x, mask, left, relu_mask), strict=True
        ):
            assert found.numel() == 0 if wanted is None else torch.equal(found, wanted)
