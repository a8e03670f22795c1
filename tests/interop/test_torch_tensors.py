"""Tensors that are more, or less, than a block of numbers: tangents, storages that are gone, modules not yet built."""

import re
import warnings

import numpy as np
import pytest

import cubn

torch = pytest.importorskip("torch")
forward_ad = torch.autograd.forward_ad

X = torch.arange(24.0).reshape(4, 3, 2)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch scripts its decompositions at the first dual
        yield


def dual(*shape):
    return forward_ad.make_dual(torch.ones(*shape), torch.ones(*shape))


def state(**arrays):
    held = {name: torch.ones(3) for name in ("gamma", "beta", "running_mean", "running_var")}
    return cubn.BatchNormState.from_arrays(**(held | arrays))


# --- forward-mode tangents ------------------------------------------------------------------------------------------

BESIDE = {
    "x": lambda d: cubn.forward(d, state()),
    "residual": lambda d: cubn.forward_train(X, state(), residual=d),
    "out": lambda d: cubn.forward(X, state(), out=d),
    "dy": lambda d: cubn.backward(d, cubn.forward_train(X, state())[1]),
    "weight": lambda d: cubn.fold_into(d, None, state(), output_axis=1),
}
PER_CHANNEL = {
    "gamma": lambda d: cubn.normalize(X, cubn.moments(X), gamma=d),
    "beta": lambda d: cubn.normalize(X, cubn.moments(X), beta=d),
    "bias": lambda d: cubn.fold_into(X, d, state(), output_axis=1),
    "like": lambda d: cubn.BatchNormState(3, like=d),
}


@pytest.mark.parametrize("argument", [*BESIDE, *PER_CHANNEL])
def test_a_tangent_is_never_dropped(argument):
    use, shape = (BESIDE[argument], (4, 3, 2)) if argument in BESIDE else (PER_CHANNEL[argument], (3,))
    text = rf": {argument} must have no forward-mode tangent; got a dual tensor \(.*\)\. Pass {argument}\.detach\(\)\.$"
    with forward_ad.dual_level():
        given = dual(*shape)
        with pytest.raises(TypeError, match=text):
            use(given)
        use(given.detach())


@pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var"])
def test_a_state_takes_no_tangents(name):
    text = rf"^BatchNormState: {name} must have no forward-mode tangent"
    held = state()
    with forward_ad.dual_level():
        with pytest.raises(TypeError, match=text):
            state(**{name: dual(3)})
        with pytest.raises(TypeError, match=text):
            setattr(held, name, dual(3))
        assert torch.equal(getattr(held, name), torch.ones(3))


@pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var"])
def test_a_tangent_that_a_state_s_array_got_later(name):
    held = state()
    cubn.forward(X, held)
    with forward_ad.dual_level():
        getattr(held, name).mul_(dual(3))
        for use in (lambda: cubn.forward(X, held), lambda: cubn.forward_train(X, held), lambda: cubn.fold(held)):
            with pytest.raises(TypeError, match=rf": {name} must have no forward-mode tangent"):
                use()
    cubn.forward(X, held)


def test_a_level_without_duals_changes_nothing():
    expected = cubn.forward(X, state())
    with forward_ad.dual_level():
        assert torch.equal(cubn.forward(X, state()), expected)


# --- storages -------------------------------------------------------------------------------------------------------


def cut(tensor, size):
    """The tensor over a storage of `size` bytes."""
    tensor.untyped_storage().resize_(size)
    return tensor


STORAGES = {
    "freed": lambda: cut(torch.ones(24).view(4, 3, 2), 0),
    "freed under a view": lambda: cut(torch.ones(30)[6:].view(4, 3, 2), 0),
    "cut": lambda: cut(torch.ones(24).view(4, 3, 2), 92),
    "cut under a view": lambda: cut(torch.ones(30)[6:].view(4, 3, 2), 116),
    "cut under a view with steps": lambda: cut(torch.ones(4, 3, 4)[:, :, ::2], 184),
    "freed under a transposed view": lambda: cut(torch.ones(30)[6:].view(2, 3, 4).permute(2, 1, 0), 0),
}


@pytest.mark.parametrize("case", STORAGES)
def test_a_tensor_that_leaves_its_storage(case):
    x = STORAGES[case]()
    text = rf"x must lie inside its storage; got a storage of {x.untyped_storage().nbytes()} bytes \(shape=\(4, 3, 2\)"
    for use in (cubn.moments, lambda x: cubn.forward_train(x, state())):
        with pytest.raises(ValueError, match=text):
            use(x)


@pytest.mark.parametrize(("size", "fits"), [(120, True), (119, False)])
def test_the_last_byte_counts(size, fits):
    x = cut(torch.ones(31)[6:30].view(4, 3, 2), size)
    if fits:
        assert cubn.moments(x).count == 8
    else:
        with pytest.raises(ValueError, match="x must lie inside its storage"):
            cubn.moments(x)


@pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var"])
@pytest.mark.parametrize("offset", [0, 2])
def test_a_state_whose_storage_was_freed(name, offset):
    array = torch.ones(3 + offset)[offset:]
    held = state(**{name: array})
    cubn.forward(X, held)
    cut(array, 0)
    with pytest.raises(ValueError, match=rf"{name} must lie inside its storage; got a storage of 0 bytes"):
        cubn.forward(X, held)


def test_a_saved_x_whose_storage_was_freed():
    x = torch.arange(30.0)[6:].view(4, 3, 2)
    _, saved = cubn.forward_train(x, state())
    cut(x, 0)
    with pytest.raises(ValueError, match="x must lie inside its storage"):
        cubn.backward(torch.ones(4, 3, 2), saved)


def test_empty_views_need_no_storage():
    assert cubn.moments(cut(torch.ones(0, 3), 0)).count == 0
    assert cubn.moments(torch.ones(4, 3)[4:]).count == 0
    assert cubn.moments(torch.ones(4, 3)[4:, :].expand(0, 3)).count == 0


# --- what is not there yet, or not only numbers ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["UninitializedParameter", "UninitializedBuffer"])
def test_what_a_lazy_module_has_not_made_yet(kind):
    lazy = getattr(torch.nn.parameter, kind)()
    text = rf"must be initialized; got a torch\.{kind} \(.*\)\. Run its module once, or materialize it\.$"
    with pytest.raises(TypeError, match=f"^moments: x {text}"):
        cubn.moments(lazy)
    with pytest.raises(TypeError, match=f"^BatchNormState: gamma {text}"):
        state(gamma=lazy)
    lazy.materialize((3,))
    torch.nn.init.ones_(lazy)
    state(gamma=lazy)


def test_parameters_and_buffers_are_tensors_like_others():
    gamma, mean = torch.nn.Parameter(torch.ones(3)), torch.nn.Buffer(torch.ones(3))
    assert torch.equal(cubn.forward(X, state(gamma=gamma, running_mean=mean)), cubn.forward(X, state()))


def test_a_tensor_that_a_gradient_flows_through():
    x = X.clone().requires_grad_() * 2
    with pytest.raises(TypeError, match=r"x must not require a gradient; got requires_grad=True"):
        cubn.moments(x)
    gamma = torch.ones(3)
    assert torch.equal(
        cubn.forward(X, state(gamma=gamma.requires_grad_() * 2)), cubn.forward(X, state(gamma=2 * gamma))
    )


def test_lazily_conjugated_and_negated_tensors():
    numbers = torch.complex(torch.zeros(4, 3), torch.arange(12.0).reshape(4, 3))
    with pytest.raises(TypeError, match=r"x must have dtype .*; got complex64 .* Pass x\.real and x\.imag apart\."):
        cubn.moments(numbers.conj())
    np.testing.assert_array_equal(cubn.moments(numbers.conj().imag).mean, -numbers.imag.numpy().mean(0))


class Distributed(torch.Tensor):
    """As torch.distributed's DTensor: numbers that are a part of others, behind a dispatch of its own."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("nothing is asked of it")


def test_subclasses_that_dispatch_for_themselves():
    x = torch.Tensor._make_subclass(Distributed, X)
    text = "x must hold numbers in memory, not stand for them; got a tests.Distributed"
    with pytest.raises(TypeError, match=re.escape(text)):
        cubn.moments(x)


# --- layout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5, 2, 2), (4, 5, 0, 2), (4, 5, 2, 0), (0, 5, 0, 0), (0, 1, 2, 2)])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_an_empty_tensor_keeps_its_memory_format(shape, memory_format):
    x = torch.empty(shape).to(memory_format=memory_format)
    held = cubn.BatchNormState(shape[1], like=x)
    y, saved = cubn.forward_frozen(x, held)
    for made in (cubn.forward(x, held), y, cubn.backward(x, saved).dx):
        assert made.shape == x.shape and made.stride() == x.stride() == torch.empty_like(x).stride()
