"""A folded layer is the layer followed by batch norm, in any library and weight layout."""

import warnings

import numpy as np
import pytest

import cubn
from tests.ops import arrays
from tests.ops.arrays import carry

C = 6


def state_of(*, affine=True, dtype="float32", library="numpy", channel_axis=1):
    rng = np.random.default_rng(0)
    drawn = {
        "gamma": rng.normal(1.0, 0.5, C),
        "beta": rng.normal(0.0, 1.0, C),
        "running_mean": rng.normal(0.5, 1.0, C),
        "running_var": rng.uniform(0.1, 3.0, C),
    }
    names = list(drawn) if affine else ["running_mean", "running_var"]
    return cubn.BatchNormState.from_arrays(
        **{name: carry(drawn[name].astype(dtype), library) for name in names}, eps=1e-3, channel_axis=channel_axis
    )


def textbook(y, state, axis=1):
    """Batch norm by running statistics, in float64."""
    held = state.to_dict()
    shape = [C if i == axis % y.ndim else 1 for i in range(y.ndim)]
    gamma = held["gamma"].astype(np.float64) if "gamma" in held else np.ones(C)
    beta = held["beta"].astype(np.float64) if "beta" in held else np.zeros(C)
    mean, var = held["running_mean"].astype(np.float64), held["running_var"].astype(np.float64)
    out = (y - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + state.eps)
    return out * gamma.reshape(shape) + beta.reshape(shape)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scale_and_shift_are_those_of_the_formula(dtype, affine):
    state = state_of(affine=affine, dtype=dtype)
    scale, shift = cubn.fold(state)
    assert scale.dtype == shift.dtype == np.dtype(dtype)
    x = np.random.default_rng(1).standard_normal((9, C))
    ulps = 4 * np.finfo(dtype).eps
    np.testing.assert_allclose(x * scale + shift, textbook(x, state), rtol=ulps, atol=8 * ulps)


def test_scale_and_shift_are_rounded_once():
    state = state_of()
    held = {name: v.astype(np.float64) for name, v in state.to_dict().items() if isinstance(v, np.ndarray)}
    scale = held["gamma"] / np.sqrt(held["running_var"] + state.eps)
    np.testing.assert_array_equal(cubn.fold(state)[0], scale.astype(np.float32))
    np.testing.assert_array_equal(cubn.fold(state)[1], (held["beta"] - held["running_mean"] * scale).astype(np.float32))


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_bfloat16_is_rounded_once(library):
    """Not by way of float32: what lies just above the middle of two would become the middle, and then even."""
    pytest.importorskip("ml_dtypes")
    pytest.importorskip(library)
    gamma = np.array([1 + 2**-8 + 2**-40, 1 + 3 * 2**-8 - 2**-40])
    mean, var = (
        carry(arrays.normal(np.random.default_rng(0), 2, "bfloat16") * 0 + bits, library) for bits in (0, 0x3F80)
    )
    state = cubn.BatchNormState.from_arrays(gamma=gamma, running_mean=mean, running_var=var, eps=1e-300)
    scale, _ = cubn.fold(state)
    np.testing.assert_array_equal(arrays.store_of(scale), [0x3F81, 0x3F81])
    weight, _ = cubn.fold_into(carry(np.full((2, 1), 0x3F80, np.uint16), library), None, state)
    np.testing.assert_array_equal(arrays.store_of(weight), [[0x3F81], [0x3F81]])


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_folding_what_is_not_finite_comes_with_a_warning(name):
    state = state_of()
    getattr(state, name)[2] = np.nan
    text = f"^{{}}: {name} is not finite in channel 2, and neither"
    with pytest.warns(cubn.StateWarning, match=text.format("fold")) as caught:
        cubn.fold(state)
    assert caught[0].filename == __file__ and "check=False" not in str(caught[0].message)
    with pytest.warns(cubn.StateWarning, match=text.format("fold_into")) as caught:
        cubn.fold_into(np.ones((C, 1)), None, state)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_scale_and_shift_in_the_library_of_the_state(library):
    pytest.importorskip(library)
    for folded, expected in zip(cubn.fold(state_of(library=library)), cubn.fold(state_of()), strict=True):
        assert arrays.library_of(folded) == library
        np.testing.assert_array_equal(np.asarray(folded), expected)


@pytest.mark.parametrize("into", [False, True])
def test_what_is_not_finite_is_folded_without_a_word_of_numpy_s(into):
    """inf - inf, 0 * inf and what float32 cannot hold; cubn itself may warn of such a state."""
    inf, nan = np.inf, np.nan
    gamma, beta, mean = (np.array(v, np.float32) for v in ([1, inf, nan, 3e38], [inf, 1, 1, 0], [inf, 1, 0, 0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cubn.StateWarning)
        var = np.array([1, inf, 1, 1e-9], np.float32)
        state = cubn.BatchNormState.from_arrays(gamma=gamma, beta=beta, running_mean=mean, running_var=var, eps=1e-9)
        if into:
            scale, shift = cubn.fold_into(np.ones((4, 1), np.float32), None, state)
            scale = scale[:, 0]
        else:
            scale, shift = cubn.fold(state)
    np.testing.assert_array_equal(scale[1:], [nan, nan, inf])
    np.testing.assert_array_equal(shift, [nan, nan, nan, 0])


# --- into a layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_a_folded_linear_layer_is_the_layer_and_its_norm(library, biased):
    pytest.importorskip(library)
    rng = np.random.default_rng(2)
    weight, bias, x = rng.normal(size=(C, 5)), rng.normal(size=C), rng.normal(size=(7, 5))
    state = state_of(dtype="float64")
    got = cubn.fold_into(carry(weight, library), carry(bias, library) if biased else None, state)
    assert [arrays.library_of(a) for a in got] == [library, library]
    folded, shift = (np.asarray(a) for a in got)
    assert folded.dtype == shift.dtype == np.float64
    np.testing.assert_allclose(
        x @ folded.T + shift, textbook(x @ weight.T + biased * bias, state), rtol=1e-12, atol=1e-12
    )


def test_output_channels_last():
    rng = np.random.default_rng(3)
    kernel, x = rng.normal(size=(3, 3, 5, C)), rng.normal(size=(4, 3, 3, 5))
    state = state_of(dtype="float64")
    weight, bias = cubn.fold_into(kernel, None, state, output_axis=-1)
    got = np.einsum("nhwi,hwio->no", x, weight) + bias
    np.testing.assert_allclose(got, textbook(np.einsum("nhwi,hwio->no", x, kernel), state), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_folded_convolution_is_the_layer_and_its_norm(rank, transposed, groups, biased):
    torch = pytest.importorskip("torch")
    kind = getattr(torch.nn, f"Conv{'Transpose' if transposed else ''}{rank}d")
    torch.manual_seed(0)
    layer = kind(12, C, 3, stride=2, padding=1, groups=groups, bias=biased, dtype=torch.float64)
    x = torch.randn(2, 12, *[5] * rank, dtype=torch.float64)
    state = state_of(dtype="float64")
    expected = textbook(layer(x).detach().numpy(), state)
    options = {"output_axis": 1, "groups": groups} if transposed else {}
    weight, bias = cubn.fold_into(layer.weight, layer.bias, state, **options)
    assert not weight.requires_grad and weight.dtype == bias.dtype == torch.float64
    plain = kind(12, C, 3, stride=2, padding=1, groups=groups, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(weight)
        plain.bias.copy_(bias)
    np.testing.assert_allclose(plain(x).detach().numpy(), expected, rtol=1e-11, atol=1e-11)


def test_dtypes_of_weight_and_bias():
    torch = pytest.importorskip("torch")
    weight, bias = torch.randn(C, 3).to(torch.bfloat16), torch.randn(C)
    folded = cubn.fold_into(weight, bias, state_of())
    assert [a.dtype for a in folded] == [torch.bfloat16, torch.float32]
    assert cubn.fold_into(weight, None, state_of())[1].dtype == torch.bfloat16
    scale = cubn.fold(state_of())[0].astype(np.float64)
    np.testing.assert_allclose(folded[0].double().numpy(), weight.double().numpy() * scale[:, None], rtol=2**-8)


def test_the_layer_is_left_alone():
    weight, bias = np.ones((C, 3)), np.ones(C)
    state = state_of()
    before = state.copy()
    cubn.fold_into(weight, bias, state)
    np.testing.assert_array_equal(weight, np.ones((C, 3)))
    np.testing.assert_array_equal(bias, np.ones(C))
    np.testing.assert_equal(state.to_dict(), before.to_dict())


@pytest.mark.parametrize(
    ("shape", "options", "text"),
    [
        (
            (5, 6),
            {},
            "fold_into: weight must have 6 output channels on axis 0; got a numpy array (shape=(5, 6), FACTS). "
            "output_axis says which axis that is.",
        ),
        (
            (4, 3, 3),
            {"output_axis": 1, "groups": 3},
            "fold_into: weight must have 6 output channels on axis 1 in 3 groups; "
            "got a numpy array (shape=(4, 3, 3), FACTS). A transposed convolution of 2 groups fits: pass groups=2.",
        ),
        (
            (4, 3, 3),
            {"output_axis": 1},
            "fold_into: weight must have 6 output channels on axis 1; got a numpy array (shape=(4, 3, 3), FACTS). "
            "A transposed convolution of 2 groups fits: pass groups=2.",
        ),
        (
            (6, 2, 3),
            {"groups": 2},
            "fold_into: weight must have 6 output channels on axis 0 in 2 groups; got a numpy array "
            "(shape=(6, 2, 3), FACTS). It has all of them on that axis: leave groups at 1.",
        ),
        (
            (3, 5, 3),
            {"output_axis": 1},
            "fold_into: weight must have 6 output channels on axis 1; got a numpy array (shape=(3, 5, 3), FACTS). "
            "output_axis says which axis that is.",
        ),
        (
            (4, 2, 3),
            {"output_axis": 1, "groups": 3},
            "fold_into: weight must have input channels on axis 0, a multiple of groups=3, and outputs on another; "
            "got a numpy array (shape=(4, 2, 3), FACTS).",
        ),
        (
            (2, 3),
            {"groups": 3},
            "fold_into: weight must have input channels on axis 0, a multiple of groups=3, and outputs on another; "
            "got a numpy array (shape=(2, 3), FACTS).",
        ),
    ],
)
def test_weights_that_do_not_fit(shape, options, text):
    with pytest.raises(ValueError) as caught:
        cubn.fold_into(np.ones(shape), None, state_of(), **options)
    assert str(caught.value) == text.replace("FACTS", "dtype=float64, device=cpu")


@pytest.mark.parametrize("output_axis", [2, -3])
def test_no_such_axis(output_axis):
    with pytest.raises(np.exceptions.AxisError) as caught:
        cubn.fold_into(np.ones((6, 5)), None, state_of(), output_axis=output_axis)
    assert str(caught.value) == f"fold_into: output_axis must be at least -2 and below 2; got {output_axis}."


def test_a_bias_that_does_not_fit():
    with pytest.raises(ValueError) as caught:
        cubn.fold_into(np.ones((6, 5)), np.ones(5), state_of())
    text = "fold_into: bias must have shape (6,), one value per channel; got a numpy array (shape=(5,), FACTS)."
    assert str(caught.value) == text.replace("FACTS", "dtype=float64, device=cpu")


def test_no_running_statistics():
    for function, arguments in ((cubn.fold, ()), (cubn.fold_into, (np.ones((6, 5)), None))):
        with pytest.raises(ValueError) as caught:
            function(*arguments, cubn.BatchNormState(6, track=False))
        text = f"{function.__name__}: state must have running statistics; got a state with track=False. "
        text += "Only running statistics can be folded: a batch's own differ from batch to batch."
        assert str(caught.value) == text
