"""What cannot be computed is refused, with a message that says what to do, and with nothing changed."""

import copy
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import cubn
from cubn._arrays import dlpack
from cubn.errors import BackendUnavailable, CollectiveMismatch
from cubn.sync import threads
from tests.backends import forget_backends

F32 = "dtype=float32, device=cpu"


class Elsewhere(dlpack.Exporter):
    """A NumPy array that says it lies on the first CUDA device."""

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **options):
        assert options.pop("stream", 1) == 1, "CUDA arrays are read on the legacy default stream"
        capsule = super().__dlpack__(**options)
        tensor, _ = dlpack._open(capsule)
        tensor.device.type = 2
        return capsule


def elsewhere(shape, dtype="float32"):
    return Elsewhere(np.zeros(shape, dtype), dtype)


class World:
    """A state that has seen a batch, that batch and arrays beside it; knows whether any of it changed."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.x, self.residual, self.dy, self.out = rng.standard_normal((4, 3, 4, 2), dtype=np.float32)
        self.mask = np.ones((3, 2), bool)
        self.state = cubn.BatchNormState(4)
        _, self.saved = cubn.forward_train(self.x, self.state)
        self.moments = cubn.moments(self.x)
        self.also = []

    def contents(self):
        return copy.deepcopy([self.x, self.residual, self.dy, self.out, self.state.to_dict(), *self.also])


@pytest.fixture
def world():
    return World()


def refused(world, error, text, call, *arguments, **options):
    """The call raises exactly this error with exactly this message, and leaves the world as it was."""
    before = world.contents()
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    assert str(caught.value) == text
    assert type(caught.value) is error
    np.testing.assert_equal(world.contents(), before)


def each(world):
    """Every operation on x, by name."""
    return {
        "forward": lambda x: cubn.forward(x, world.state),
        "forward_train": lambda x: cubn.forward_train(x, world.state),
        "forward_frozen": lambda x: cubn.forward_frozen(x, world.state),
        "normalize": lambda x: cubn.normalize(x, world.moments),
        "moments": cubn.moments,
    }


OPERATIONS = ["forward", "forward_train", "forward_frozen", "normalize", "moments"]
WITH_STATE = ["forward", "forward_train", "forward_frozen"]
NORMALIZING = [*WITH_STATE, "normalize"]


def given(world, operation, **options):
    """An operation on x that takes mask, residual and out."""
    second = world.moments if operation == "normalize" else world.state
    return lambda: getattr(cubn, operation)(world.x, second, **options)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_1_not_an_array(world, operation):
    text = f"{operation}: x must be an array with __dlpack__; got a list. Pass numpy.asarray(x)."
    refused(world, TypeError, text, each(world)[operation], world.x.tolist())


@pytest.mark.parametrize("shape", [(), (4,)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_2_fewer_than_two_axes(world, operation, shape):
    text = (
        f"{operation}: x must have 2 axes or more; got a numpy array (shape={shape}, {F32}). "
        "Samples and channels are two axes: a single sample has shape (1, C)."
    )
    refused(world, ValueError, text, each(world)[operation], np.zeros(shape, np.float32))


@pytest.mark.parametrize("axis", [3, -4])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_3_no_such_channel_axis(world, operation, axis):
    text = f"{operation}: channel_axis must be at least -3 and below 3, x having 3 axes; got {axis}."
    world.state.channel_axis = axis
    calls = each(world) | {
        "moments": lambda x: cubn.moments(x, channel_axis=axis),
        "normalize": lambda x: cubn.normalize(x, world.moments, channel_axis=axis),
    }
    refused(world, np.exceptions.AxisError, text, calls[operation], world.x)


def test_3_channel_axis_that_is_no_integer(world):
    text = "BatchNormState: channel_axis must be an integer; got 1.5."
    refused(world, TypeError, text, setattr, world.state, "channel_axis", 1.5)
    text = text.removeprefix("BatchNormState: ")
    refused(world, TypeError, f"moments: {text}", cubn.moments, world.x, channel_axis=1.5)
    refused(world, TypeError, f"normalize: {text}", given(world, "normalize", channel_axis=1.5))


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "object"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_4_dtype_of_x(world, operation, dtype):
    remedy = "Pass x.real and x.imag apart." if dtype == "complex64" else "Pass x.astype('float32')."
    text = (
        f"{operation}: x must have dtype float16, bfloat16, float32 or float64; "
        f"got {dtype} (shape=(3, 4, 2), dtype={dtype}, device=cpu). {remedy}"
    )
    refused(world, TypeError, text, each(world)[operation], world.x.astype(dtype))


def test_4_eight_bits(world):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    text = (
        "forward: x must have dtype float16, bfloat16, float32 or float64; "
        "got float8_e4m3fn (shape=(3, 4, 2), dtype=float8_e4m3fn, device=cpu). Pass x.astype('float32')."
    )
    refused(world, TypeError, text, cubn.forward, world.x.astype(ml_dtypes.float8_e4m3fn), world.state)


@pytest.mark.parametrize("operation", NORMALIZING)
def test_4_dtype_of_mask(world, operation):
    text = (
        f"{operation}: mask must have dtype bool; got int64 (shape=(3, 2), dtype=int64, device=cpu). "
        "Pass mask.astype('bool')."
    )
    refused(world, TypeError, text, given(world, operation, mask=np.ones((3, 2), np.int64)))


@pytest.mark.parametrize("argument", ["residual", "out"])
@pytest.mark.parametrize("operation", NORMALIZING)
def test_4_dtype_beside_x(world, operation, argument):
    text = (
        f"{operation}: {argument} must have x's dtype float32; "
        "got a numpy array (shape=(3, 4, 2), dtype=float64, device=cpu). Convert it first."
    )
    refused(world, TypeError, text, given(world, operation, **{argument: world.x.astype(np.float64)}))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_5_byte_order(world, operation):
    swapped = world.x.astype(world.x.dtype.newbyteorder())
    text = (
        f"{operation}: x must have this machine's byte order; got {swapped.dtype.str} "
        f"(shape=(3, 4, 2), dtype={swapped.dtype.str}, device=cpu). Pass x.astype(x.dtype.newbyteorder('='))."
    )
    refused(world, TypeError, text, each(world)[operation], swapped)


@pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var"])
@pytest.mark.parametrize("shape", [(5,), (4, 1), ()])
def test_6_shape_of_a_parameter(world, name, shape):
    text = (
        f"BatchNormState: {name} must have shape (4,), one value per channel; got a numpy array (shape={shape}, {F32})."
    )
    refused(world, ValueError, text, setattr, world.state, name, np.ones(shape, np.float32))


def test_6_parameters_of_two_sizes(world):
    text = f"BatchNormState: beta must have shape (4,), one value per channel; got a numpy array (shape=(5,), {F32})."
    four, five = np.ones(4, np.float32), np.ones(5, np.float32)
    refused(world, ValueError, text, cubn.BatchNormState.from_arrays, gamma=four, beta=five)


@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_6_shape_of_a_given_parameter(world, name):
    text = f"normalize: {name} must have shape (4,), one value per channel; got a numpy array (shape=(5,), {F32})."
    refused(world, ValueError, text, given(world, "normalize", **{name: np.ones(5, np.float32)}))


AXIS = "channel_axis says which axis that is."


@pytest.mark.parametrize("operation", NORMALIZING)
def test_6_channels_of_x(world, operation):
    text = f"{operation}: x must have 4 channels on axis 1; got a numpy array (shape=(3, 3, 2), {F32}). {AXIS}"
    refused(world, ValueError, text, each(world)[operation], world.x[:, :3])


def test_6_no_channels(world):
    text = f"moments: x must have 1 or more channels on axis 1; got a numpy array (shape=(3, 0, 2), {F32}). {AXIS}"
    refused(world, ValueError, text, cubn.moments, world.x[:, :0])


@pytest.mark.parametrize("argument", ["residual", "out"])
@pytest.mark.parametrize("operation", NORMALIZING)
def test_7_shape_beside_x(world, operation, argument):
    text = f"{operation}: {argument} must have x's shape (3, 4, 2); got a numpy array (shape=(2, 4, 2), {F32})."
    refused(world, ValueError, text, given(world, operation, **{argument: world.out[:2]}))


@pytest.mark.parametrize("argument", ["dy", "out"])
def test_7_shape_of_a_gradient(world, argument):
    text = f"backward: {argument} must have x's shape (3, 4, 2); got a numpy array (shape=(2, 4, 2), {F32})."
    arguments = {"dy": world.dy} | {argument: world.out[:2]}
    refused(world, ValueError, text, cubn.backward, saved=world.saved, **arguments)


@pytest.mark.parametrize("shape", [(3,), (3, 3), (2, 2), (3, 4, 2), (3, 1, 1, 2)])
@pytest.mark.parametrize("operation", [*NORMALIZING, "moments"])
def test_7_mask_that_does_not_fit(world, operation, shape):
    text = (
        f"{operation}: mask must have x's shape without the channel axis, (3, 2), or 1 instead of any extent; "
        f"got a numpy array (shape={shape}, dtype=bool, device=cpu)."
    )
    mask = np.ones(shape, bool)
    call = (lambda: cubn.moments(world.x, mask=mask)) if operation == "moments" else given(world, operation, mask=mask)
    refused(world, ValueError, text, call)


@pytest.mark.parametrize("operation", NORMALIZING)
def test_8_two_devices(world, operation):
    text = (
        f"{operation}: residual must be on x's device, cpu; got a tests array (shape=(3, 4, 2), dtype=float32, "
        "device=cuda:0). Move one of them to the other's device."
    )
    refused(world, ValueError, text, given(world, operation, residual=elsewhere((3, 4, 2))))


@pytest.mark.parametrize("operation", NORMALIZING)
def test_8_mask_on_another_device(world, operation):
    text = (
        f"{operation}: mask must be on x's device, cpu; got a tests array (shape=(3, 2), dtype=bool, "
        "device=cuda:0). Move one of them to the other's device."
    )
    refused(world, ValueError, text, given(world, operation, mask=elsewhere((3, 2), "bool")))


@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_8_parameter_on_another_device(world, name):
    text = (
        f"normalize: {name} must be on x's device, cpu; got a tests array (shape=(4,), dtype=float32, "
        "device=cuda:0). Move one of them to the other's device."
    )
    refused(world, ValueError, text, given(world, "normalize", **{name: elsewhere(4)}))


def test_8_state_on_two_devices(world):
    text = (
        f"BatchNormState: beta must be on the device of gamma, cuda:0; got a numpy array (shape=(4,), {F32}). "
        "Move one of them to the other's device."
    )
    refused(world, ValueError, text, setattr, world.state, "gamma", elsewhere(4))


@pytest.mark.parametrize("operation", WITH_STATE)
def test_8_state_on_another_device(world, operation):
    state = cubn.BatchNormState.from_arrays(gamma=elsewhere(4), running_mean=elsewhere(4), running_var=elsewhere(4))
    text = (
        f"{operation}: x must be on the state's device, cuda:0; got a numpy array (shape=(3, 4, 2), {F32}). "
        "Move one of them to the other's device."
    )
    refused(world, ValueError, text, getattr(cubn, operation), world.x, state)


@pytest.mark.parametrize("argument", ["residual", "out"])
@pytest.mark.parametrize("operation", NORMALIZING)
def test_8_two_libraries(world, operation, argument):
    torch = pytest.importorskip("torch")
    text = (
        f"{operation}: {argument} must be a numpy array, as x is; "
        f"got a torch array (shape=(3, 4, 2), {F32}). Convert it first."
    )
    refused(world, TypeError, text, given(world, operation, **{argument: torch.from_numpy(world.out)}))


def test_8_gradient_of_another_library(world):
    torch = pytest.importorskip("torch")
    text = f"backward: dy must be a numpy array, as x is; got a torch array (shape=(3, 4, 2), {F32}). Convert it first."
    refused(world, TypeError, text, cubn.backward, torch.from_numpy(world.dy), world.saved)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_9_device_without_memory(world, operation):
    torch = pytest.importorskip("torch")
    text = (
        f"{operation}: x must be on a CPU or CUDA device; got meta (shape=(3, 4, 2), dtype=float32). "
        "It holds no numbers: fill torch.empty_like(x, device='cpu') and pass that."
    )
    refused(world, NotImplementedError, text, each(world)[operation], torch.zeros(3, 4, 2, device="meta"))


@pytest.mark.parametrize("operation", NORMALIZING)
def test_10_read_only_out(world, operation):
    world.out.flags.writeable = False
    text = f"{operation}: out must be writable; got a read-only array (shape=(3, 4, 2), {F32}). Pass a copy."
    refused(world, ValueError, text, given(world, operation, out=world.out))


def test_10_read_only_gradient(world):
    world.out.flags.writeable = False
    text = f"backward: out must be writable; got a read-only array (shape=(3, 4, 2), {F32}). Pass a copy."
    refused(world, ValueError, text, cubn.backward, world.dy, world.saved, out=world.out)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("function", ["forward_train", "update"])
def test_10_read_only_statistics(world, function, name):
    getattr(world.state, name).flags.writeable = False
    text = f"{function}: {name} must be writable; got a read-only array (shape=(4,), {F32}). Pass a copy."
    refused(world, ValueError, text, learning(world)[function])


@pytest.mark.parametrize("operation", NORMALIZING)
def test_10_immutable_out(world, operation):
    jnp = pytest.importorskip("jax.numpy")
    x = world.also_x = jnp.array(world.x)
    second = world.moments if operation == "normalize" else world.state
    text = (
        f"{operation}: out must be an array that can be written; got an immutable jax array "
        f"(shape=(3, 4, 2), {F32}). Leave it out."
    )
    refused(world, TypeError, text, getattr(cubn, operation), x, second, out=jnp.zeros((3, 4, 2), "float32"))
    np.testing.assert_array_equal(x, world.x)


def learning(world):
    """The operations that write running statistics."""
    return {
        "forward_train": given(world, "forward_train", out=world.out),
        "update": lambda: cubn.update(world.state, world.moments),
    }


def windows():
    """Two arrays of x's shape whose memory overlaps in part."""
    memory = np.zeros(40, np.float32)
    return memory[:24].reshape(3, 4, 2), memory[8:32].reshape(3, 4, 2)


@pytest.mark.parametrize("operation", NORMALIZING)
def test_11_out_overlaps_x_in_part(world, operation):
    world.x, out = windows()
    text = f"{operation}: out must be exactly x or share no memory with it; got a numpy array (shape=(3, 4, 2), {F32})."
    refused(world, ValueError, text, given(world, operation, out=out))


@pytest.mark.parametrize("operation", NORMALIZING)
def test_11_out_overlaps_residual_in_part(world, operation):
    world.residual, out = windows()
    text = (
        f"{operation}: out must be exactly residual or share no memory with it; "
        f"got a numpy array (shape=(3, 4, 2), {F32})."
    )
    refused(world, ValueError, text, given(world, operation, residual=world.residual, out=out))


def test_11_x_the_other_way_round(world):
    world.x = np.zeros((3, 4, 3), np.float32)
    state = cubn.BatchNormState(4)
    text = f"forward: out must be exactly x or share no memory with it; got a numpy array (shape=(3, 4, 3), {F32})."
    refused(world, ValueError, text, cubn.forward, world.x, state, out=world.x[..., ::-1])


@pytest.mark.parametrize("operation", NORMALIZING)
def test_11_out_overlaps_mask(world, operation):
    world.mask = world.out.view(bool)[:, 0, ::4]
    text = f"{operation}: out must share no memory with mask; got a numpy array (shape=(3, 4, 2), {F32})."
    refused(world, ValueError, text, given(world, operation, mask=world.mask, out=world.out))


@pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var"])
@pytest.mark.parametrize("operation", WITH_STATE)
def test_11_out_overlaps_the_state(world, operation, name):
    world.out = np.abs(world.out)  # no variance is negative
    setattr(world.state, name, world.out.reshape(-1)[4:8])
    text = f"{operation}: out must share no memory with {name}; got a numpy array (shape=(3, 4, 2), {F32})."
    refused(world, ValueError, text, given(world, operation, out=world.out))


@pytest.mark.parametrize("offset", [0, 1])
def test_11_gradient_over_x(world, offset):
    memory = np.random.default_rng(1).standard_normal(25, dtype=np.float32)
    world.x = memory[:24].reshape(3, 4, 2)
    _, saved = cubn.forward_train(world.x, world.state)
    text = f"backward: out must share no memory with x; got a numpy array (shape=(3, 4, 2), {F32})."
    out = memory[offset : 24 + offset].reshape(3, 4, 2)
    refused(world, ValueError, text, cubn.backward, world.dy, saved, out=out)


def test_11_gradient_over_dy_in_part(world):
    world.dy, out = windows()
    text = f"backward: out must be exactly dy or share no memory with it; got a numpy array (shape=(3, 4, 2), {F32})."
    refused(world, ValueError, text, cubn.backward, world.dy, world.saved, out=out)


@pytest.mark.parametrize("offset", [0, 2])
def test_12_running_statistics_share_memory(world, offset):
    memory = np.ones(8, np.float32)
    text = (
        "BatchNormState: running_mean must share no memory with running_var; "
        f"got a numpy array (shape=(4,), {F32}). Pass a copy of one of them."
    )
    mean, var = memory[:4], memory[offset : 4 + offset]
    refused(world, ValueError, text, cubn.BatchNormState.from_arrays, running_mean=mean, running_var=var)


def test_12_running_statistics_share_memory_with_a_parameter(world):
    text = (
        "BatchNormState: running_var must share no memory with gamma; "
        f"got a numpy array (shape=(4,), {F32}). Pass a copy of one of them."
    )
    refused(world, ValueError, text, setattr, world.state, "gamma", world.state.running_var)


@pytest.mark.parametrize("operation", NORMALIZING)
def test_12_broadcast_out(world, operation):
    world.out = np.lib.stride_tricks.as_strided(np.zeros(8, np.float32), (3, 4, 2), (0, 8, 4))
    text = (
        f"{operation}: out must have memory of its own for every element; got elements that share memory, "
        f"strides=(0, 2, 1) (shape=(3, 4, 2), {F32}). Pass a copy."
    )
    refused(world, ValueError, text, given(world, operation, out=world.out))


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("function", ["forward_train", "update"])
def test_12_broadcast_statistics(world, function, name):
    setattr(world.state, name, np.lib.stride_tricks.as_strided(np.ones(1, np.float32), (4,), (0,)))
    text = (
        f"{function}: {name} must have memory of its own for every element; got elements that share memory, "
        f"strides=(0,) (shape=(4,), {F32}). Pass a copy."
    )
    refused(world, ValueError, text, learning(world)[function])


@pytest.mark.parametrize("eps", [0.0, -1e-5, np.nan, np.inf])
def test_13_eps(world, eps):
    text = f"eps must be positive and finite; got {eps}."
    refused(world, ValueError, f"BatchNormState: {text}", cubn.BatchNormState, 4, eps=eps)
    refused(world, ValueError, f"BatchNormState: {text}", setattr, world.state, "eps", eps)
    refused(world, ValueError, f"normalize: {text}", given(world, "normalize", eps=eps))


@pytest.mark.parametrize("momentum", [-0.1, 1.5, np.nan])
def test_14_momentum(world, momentum):
    text = f"BatchNormState: momentum must be None or from 0 to 1, the weight of the new value; got {momentum}."
    refused(world, ValueError, text, cubn.BatchNormState, 4, momentum=momentum)
    refused(world, ValueError, text, setattr, world.state, "momentum", momentum)


@pytest.mark.parametrize("option", ["eps", "momentum"])
def test_13_14_numbers(world, option):
    text = f"BatchNormState: {option} must be a real number; got '0.1'."
    refused(world, TypeError, text, setattr, world.state, option, "0.1")


TRAP = (
    "The variance of one value is 0, so its y would be beta whatever it is: use a larger batch, or forward or "
    "forward_frozen, which use the running statistics."
)


@pytest.mark.parametrize("options", [{}, {"update": False}])
def test_15_one_value_per_channel(world, options):
    text = f"forward_train: x must have more than one value per channel; got 1 (shape=(1, 4, 1), {F32}). {TRAP}"
    refused(
        world, ValueError, text, cubn.forward_train, world.x[:1, :, :1], world.state, out=world.x[:1, :, :1], **options
    )


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_15_one_value_per_channel_behind_a_mask(world, library):
    pytest.importorskip(library)
    from tests.ops.arrays import carry

    text = (
        "forward_train: x must have more than one value per channel; "
        f"got 1 where the mask is True (shape=(3, 4, 2), {F32}). {TRAP}"
    )
    world.mask[:] = False
    world.mask[1, 1] = True
    refused(world, ValueError, text, given(world, "forward_train", mask=carry(world.mask, library)))


def test_15_a_broadcast_mask_counts_in_full(world):
    _, saved = cubn.forward_train(world.x, world.state, mask=np.array([[False], [True], [False]]))
    assert saved.count == 2


def test_15_one_value_per_channel_in_a_group(world):
    call, groups = cubn.forward_train, "groups must be 2 or more where a sample has one value per channel; got 1. "
    text = f"forward_train: {groups}The variance of one value is 0."
    refused(world, ValueError, text, call, world.x[:, :, :1], world.state, groups=1)
    world.mask[2], world.mask[2, 1] = False, True
    text = (
        "forward_train: x must have more than one value per channel in every group; got 1 in group 2, samples 2 to 2. "
        "Use larger groups, or leave those samples out of the batch."
    )
    refused(world, ValueError, text, call, world.x, world.state, mask=world.mask, out=world.out, groups=1)


def test_15_one_value_per_channel_and_no_running_statistics(world):
    rule = "have running statistics, for on_single='running'"
    text = f"forward_train: state must {rule}; got a state with track=False. Make the state with track=True."
    state = cubn.BatchNormState(4, track=False)
    refused(world, ValueError, text, cubn.forward_train, world.x[:1, :, :1], state, on_single="running")


@pytest.mark.parametrize(("on_single", "error"), [("skip", ValueError), (None, TypeError)])
def test_another_word_for_a_single_value(world, on_single, error):
    text = f"forward_train: on_single must be 'raise' or 'running'; got {on_single!r}."
    refused(world, error, text, cubn.forward_train, world.x, world.state, on_single=on_single)


@pytest.mark.parametrize(("groups", "error"), [(0, ValueError), (True, TypeError), (2.0, TypeError)])
def test_groups_that_are_no_number_of_samples(world, groups, error):
    rule = "be an integer" if error is TypeError else "be 1 or more and less than 2**62, the samples of a group"
    text = f"forward_train: groups must {rule}; got {groups}."
    refused(world, error, text, cubn.forward_train, world.x, world.state, groups=groups)


def test_a_double_backward_of_groups(world):
    _, saved = cubn.forward_train(world.x, world.state, groups=2)
    remedy = "Call forward_train, backward and double_backward for each group of samples."
    text = f"double_backward: saved must be of a forward without groups; got groups=2. {remedy}"
    refused(world, ValueError, text, cubn.double_backward, world.dy, None, None, world.dy, saved)


EMPTY = "Skip the empty batch, or use forward, which takes one and returns an empty y."


@pytest.mark.parametrize("shape", [(0, 4, 2), (3, 4, 0)])
def test_16_empty_batch(world, shape):
    text = f"forward_train: x must have values to take statistics of; got 0 (shape={shape}, {F32}). {EMPTY}"
    refused(world, ValueError, text, cubn.forward_train, np.zeros(shape, np.float32), world.state)


def test_16_empty_mask(world):
    text = (
        "forward_train: x must have values to take statistics of; "
        f"got 0 where the mask is True (shape=(3, 4, 2), {F32}). {EMPTY}"
    )
    refused(world, ValueError, text, given(world, "forward_train", mask=np.zeros((3, 2), bool)))


def test_16_moments_of_nothing(world):
    text = "normalize: moments must be of at least one value per channel; got 0."
    refused(world, ValueError, text, cubn.normalize, world.x, cubn.moments(world.x[:0]))


@pytest.mark.parametrize(("alone", "other"), [("running_mean", "running_var"), ("running_var", "running_mean")])
def test_17_one_running_statistic_alone(world, alone, other):
    text = (
        f"BatchNormState: {other} must be given together with {alone}; got None. "
        "Give both for running statistics, or neither."
    )
    refused(world, ValueError, text, cubn.BatchNormState.from_arrays, **{alone: np.ones(4, np.float32)})
    refused(world, ValueError, text, setattr, world.state, other, None)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_18_x_that_requires_a_gradient(world, operation):
    torch = pytest.importorskip("torch")
    text = (
        f"{operation}: x must not require a gradient; got requires_grad=True (shape=(3, 4, 2), {F32}). Pass x.detach()."
    )
    refused(world, TypeError, text, each(world)[operation], torch.zeros(3, 4, 2, requires_grad=True))


@pytest.mark.parametrize("argument", ["residual", "out"])
def test_18_an_array_beside_x_that_requires_a_gradient(world, argument):
    torch = pytest.importorskip("torch")
    array = torch.zeros(3, 4, 2, requires_grad=True)
    text = (
        f"forward: {argument} must not require a gradient; got requires_grad=True (shape=(3, 4, 2), {F32}). "
        f"Pass {argument}.detach()."
    )
    refused(world, TypeError, text, given(world, "forward", **{argument: array}))


@pytest.mark.parametrize("argument", ["mask", "residual", "out"])
def test_1_the_remedy_names_the_argument(world, argument):
    text = f"forward: {argument} must be an array with __dlpack__; got a list. Pass numpy.asarray({argument})."
    refused(world, TypeError, text, given(world, "forward", **{argument: [0.0]}))


def test_19_tracers(world):
    jax = pytest.importorskip("jax")
    text = (
        "forward: x must hold numbers in memory, not stand for them; got a jax.DynamicJaxprTracer "
        "(shape=(3, 4, 2), dtype=float32). Call it outside tracing, vmap and the like."
    )
    refused(world, TypeError, text, jax.jit(each(world)["forward"]), world.x)


def test_19_vmap(world):
    torch = pytest.importorskip("torch")
    text = (
        f"forward: x must hold numbers in memory, not stand for them; got a torch.Tensor (shape=(3, 4, 2), {F32}). "
        "Call it outside tracing, vmap and the like."
    )
    refused(world, TypeError, text, torch.func.vmap(each(world)["forward"]), torch.zeros(2, 3, 4, 2))


@pytest.mark.parametrize(
    ("wrap", "text"),
    [
        (
            np.ma.array,
            "got a numpy.MaskedArray (shape=(3, 4, 2), dtype=float32, device=cpu). "
            "Pass x.filled(0), with mask=~numpy.ma.getmaskarray(x).any(channel_axis): a position is present in all "
            "channels or in none.",
        ),
        (
            lambda x: np.matrix(x[0]),
            "got a numpy.matrix (shape=(4, 2), dtype=float32, device=cpu). Pass numpy.asarray(x).",
        ),
    ],
    ids=["masked", "matrix"],
)
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_20_more_than_numbers(world, wrap, text):
    refused(
        world, TypeError, f"forward: x must be a plain numpy.ndarray; {text}", cubn.forward, wrap(world.x), world.state
    )


def test_20_sparse(world):
    torch = pytest.importorskip("torch")
    text = f"forward: x must be a dense tensor; got a sparse_coo one (shape=(3, 4, 2), {F32}). Pass x.to_dense()."
    refused(world, TypeError, text, cubn.forward, torch.zeros(3, 4, 2).to_sparse(), world.state)


def test_21_deleted(world):
    jnp = pytest.importorskip("jax.numpy")
    x = jnp.array(world.x)
    x.delete()
    text = (
        "forward: x must not be deleted; got a deleted array (shape=(3, 4, 2), dtype=float32). Donate a copy instead."
    )
    refused(world, ValueError, text, cubn.forward, x, world.state)


def on_ranks(world, call):
    """What call(comm, state) raised on each of three ranks, whose states did not change."""
    states = [world.state.copy() for _ in range(3)]
    with pytest.raises(ExceptionGroup) as caught:
        threads.run(3, lambda comm: call(comm, states[comm.rank]))
    for state in states:
        np.testing.assert_equal(state.to_dict(), world.state.to_dict())
    return {error.__notes__[0]: error for error in caught.value.exceptions}


def test_22_ranks_that_disagree(world):
    def call(comm, state):
        return cubn.forward_train(world.x, state, comm=comm, relu=comm.rank == 1)

    errors = on_ranks(world, call)
    assert sorted(errors) == ["on rank 0", "on rank 1", "on rank 2"]
    for error in errors.values():
        assert type(error) is CollectiveMismatch
        assert "got update on ranks 0, 2; update, relu on rank 1." in str(error)


def test_23_an_argument_that_one_rank_cannot_use(world):
    def call(comm, state):
        return cubn.forward_train(world.x, state, comm=comm, mask=np.ones((2, 2), bool) if comm.rank == 1 else None)

    errors = on_ranks(world, call)
    assert type(errors.pop("on rank 1")) is ValueError
    assert sorted(errors) == ["on rank 0", "on rank 2"]
    for error in errors.values():
        assert type(error) is CollectiveMismatch
        assert "got an error on rank 1. Its own error says more." in str(error)


def test_24_a_cuda_array_without_cupy(world, monkeypatch):
    forget_cuda(monkeypatch)
    monkeypatch.setitem(sys.modules, "cupy", None)
    text = (
        "cubn: arrays on CUDA devices need CuPy, which is not installed. Install it with: pip install cupy-cuda13x "
        "(or cupy-cuda12x, as the driver allows)"
    )
    refused(world, ImportError, text, cubn.moments, elsewhere((3, 4, 2)))


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        (
            {"driver": False},
            "cubn: CuPy found no usable CUDA driver (no driver). Install NVIDIA's driver, or a CuPy for the CUDA "
            "version it supports: cupy-cuda12x or cupy-cuda13x",
        ),
        ({"devices": 0}, "cubn: there is no CUDA device 0; CuPy sees 0. Check CUDA_VISIBLE_DEVICES"),
        (
            {"capability": "70"},
            "cubn: CUDA device 0 has compute capability 7.0; 7.5 or newer is needed. Move the arrays to the CPU",
        ),
    ],
    ids=["driver", "device", "capability"],
)
def test_24_a_cuda_device_that_cannot_be_used(world, monkeypatch, facts, text):
    forget_cuda(monkeypatch)
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(**facts))
    refused(world, BackendUnavailable, text, cubn.moments, elsewhere((3, 4, 2)))


def forget_cuda(monkeypatch):
    """As in a process that has met no CUDA array yet."""
    monkeypatch.delitem(sys.modules, "cubn.backends.cuda.cupy_device", raising=False)
    if "cubn.backends.cuda" in sys.modules:
        monkeypatch.delattr(sys.modules["cubn.backends.cuda"], "cupy_device", raising=False)
    forget_backends()


def fake_cupy(driver=True, devices=1, capability="90"):
    """As much of CuPy as is asked before a device is used."""

    def count():
        if not driver:
            raise CudaError("no driver")
        return devices

    class CudaError(RuntimeError):
        pass

    runtime = SimpleNamespace(getDeviceCount=count, CUDARuntimeError=CudaError, is_hip=False)
    device = SimpleNamespace(compute_capability=capability, attributes={})
    return SimpleNamespace(
        cuda=SimpleNamespace(runtime=runtime, Device=lambda index: device), ndarray=type("A", (), {})
    )


@pytest.mark.parametrize("operation", OPERATIONS)
def test_25_alignment(world, operation):
    memory = np.zeros(97, np.uint8)
    x = memory[1:].view(np.float32).reshape(3, 4, 2)
    text = (
        f"{operation}: x must be aligned to its elements; got address {x.ctypes.data:#x} "
        f"(shape=(3, 4, 2), {F32}). Pass a copy."
    )
    refused(world, ValueError, text, each(world)[operation], x)


# --- beyond the arrays ----------------------------------------------------------------------------------------------


UPDATES = {
    "forward_train": lambda world, state: cubn.forward_train(world.x, state),
    "update": lambda world, state: cubn.update(state, world.moments),
    "reset": lambda world, state: state.reset(),
}


@pytest.mark.parametrize("operation", UPDATES)
def test_an_update_of_statistics_in_16_bits(world, operation):
    mean, var = np.zeros(4, np.float16), np.ones(4, np.float16)
    state = cubn.BatchNormState.from_arrays(running_mean=mean, running_var=var)
    world.also = [mean, var]
    text = (
        f"{operation}: running_mean must have dtype float32 or float64 to be updated; got a numpy array "
        "(shape=(4,), dtype=float16, device=cpu). "
        "Make a state of float32 copies: at small momenta a variance of 16 bits stops moving."
    )
    refused(world, TypeError, text, UPDATES[operation], world, state)
    assert not state.tracked.any()


@pytest.mark.parametrize("operation", UPDATES)
def test_an_update_with_a_momentum_that_is_no_weight(world, operation):
    """As a module of a framework may have it that is only used in inference."""
    torch = pytest.importorskip("torch")
    state = cubn.BatchNormState.from_module(torch.nn.BatchNorm1d(4, momentum=1.5))
    cubn.forward(world.x, state)
    text = f"{operation}: momentum must be None or from 0 to 1, the weight of the new value; got 1.5."
    refused(world, ValueError, text, UPDATES[operation], world, state)
    assert not state.tracked.any()


@pytest.mark.parametrize("operation", ["forward", "forward_frozen"])
def test_no_running_statistics(world, operation):
    text = (
        f"{operation}: state must have running statistics; got a state with track=False. "
        "Use forward_train, or normalize by moments(x)."
    )
    refused(world, ValueError, text, getattr(cubn, operation), world.x, cubn.BatchNormState(4, track=False))


def test_no_running_statistics_to_update(world):
    text = "update: state must have running statistics; got a state with track=False. Make the state with track=True."
    refused(world, ValueError, text, cubn.update, cubn.BatchNormState(4, track=False), world.moments)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_of_two_dtypes(world, name):
    dtypes = {"running_mean": "float32", "running_var": "float32"} | {name: "float64"}
    text = (
        f"BatchNormState: running_var must have running_mean's dtype {dtypes['running_mean']}; got a numpy array "
        f"(shape=(4,), dtype={dtypes['running_var']}, device=cpu). Convert one of them; from_arrays takes both at once."
    )
    refused(world, TypeError, text, setattr, world.state, name, np.ones(4))
    arrays = {name: np.ones(4, dtype) for name, dtype in dtypes.items()}
    refused(world, TypeError, text, lambda: cubn.BatchNormState.from_arrays(**arrays))


@pytest.mark.parametrize("operation", WITH_STATE)
def test_running_statistics_of_which_a_framework_converted_one(world, operation):
    torch = pytest.importorskip("torch")
    state = cubn.BatchNormState(4, like=torch.zeros(1))
    state.running_var.data = state.running_var.data.double()
    with pytest.raises(TypeError, match=f"^{operation}: running_var must have running_mean's dtype float32"):
        getattr(cubn, operation)(world.x, state)


def test_the_number_of_channels_of_a_state_stays(world):
    with pytest.raises(AttributeError):
        world.state.num_features = 5


@pytest.mark.parametrize("name", ["training", "weight", "running_varaince"])
def test_a_state_takes_no_other_attributes(world, name):
    with pytest.raises(AttributeError):
        setattr(world.state, name, True)


def test_a_dictionary_that_is_not_of_a_state():
    """The state_dict of a torch module, say."""
    with pytest.raises(KeyError) as caught:
        cubn.BatchNormState.from_dict({"weight": np.ones(4), "running_mean": np.ones(4), "running_var": np.ones(4)})
    assert caught.value.args == (
        "from_dict: d must have the entries of to_dict; got no num_features, eps, channel_axis, tracked, skipped. "
        "For arrays of another origin there is from_arrays.",
    )


@pytest.mark.parametrize("name", ["tracked", "skipped"])
def test_counters_of_other_channels(world, name):
    rule = "be a number or have shape (4,), one count per channel"
    text = f"BatchNormState: {name} must {rule}; got an array (shape=(3,))."
    written = world.state.to_dict() | {name: np.array([1, 2, 3])}
    refused(world, ValueError, text, cubn.BatchNormState.from_dict, written)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_saved_is_not_copied(world, copied):
    with pytest.raises(
        TypeError,
        match=r"^Saved: it cannot be copied or pickled, since it knows x by its address\. Keep x and the state",
    ):
        copied(world.saved)


OVERWRITTEN = "Give the forward an `out` of its own, and change x only after the last backward."


@pytest.mark.parametrize("operation", ["forward_train", "forward_frozen"])
def test_backward_of_an_overwritten_x(world, operation):
    _, saved = getattr(cubn, operation)(world.x, world.state, out=world.x)
    text = (
        "backward: x must be kept until backward, but y was written over it; "
        f"got a numpy array (shape=(3, 4, 2), {F32}). {OVERWRITTEN}"
    )
    refused(world, ValueError, text, cubn.backward, world.dy, saved)


@pytest.mark.parametrize("how", ["in place", "by cubn", "data"])
def test_backward_of_a_changed_tensor(world, how):
    torch = pytest.importorskip("torch")
    x, dy = torch.from_numpy(world.x), torch.from_numpy(world.dy)
    _, saved = cubn.forward_train(x, world.state)
    match how:
        case "in place":
            x.add_(1)
        case "by cubn":
            cubn.forward(x, world.state, out=x)
        case "data":
            x.data = torch.zeros(3, 4, 2)
    text = (
        "backward: x must be as it was in the forward, but was changed since; "
        f"got a torch array (shape=(3, 4, 2), {F32}). {OVERWRITTEN}"
    )
    refused(world, ValueError, text, cubn.backward, dy, saved)


def test_backward_of_a_changed_mask(world):
    torch = pytest.importorskip("torch")
    x, dy = torch.from_numpy(world.x), torch.from_numpy(world.dy)
    mask = torch.ones(3, 2, dtype=torch.bool)
    _, saved = cubn.forward_train(x, world.state, mask=mask)
    mask[0] = False
    text = (
        "backward: mask must be as it was in the forward, but was changed since; "
        "got a torch array (shape=(3, 2), dtype=bool, device=cpu). Change it only after the last backward."
    )
    refused(world, ValueError, text, cubn.backward, dy, saved)


def test_running_statistics_that_require_a_gradient(world):
    torch = pytest.importorskip("torch")
    mean, var = torch.zeros(4, requires_grad=True), torch.ones(4)
    state = cubn.BatchNormState.from_arrays(running_mean=mean, running_var=var)
    text = (
        "forward_train: running_mean must be writable; got a tensor that requires a gradient "
        f"(shape=(4,), {F32}). Pass running_mean.detach()."
    )
    refused(world, ValueError, text, cubn.forward_train, torch.from_numpy(world.x), state)


MAKE_ONE = "BatchNormState.from_module makes one of a torch batch norm, from_arrays of any arrays."


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda w: cubn.forward(w.x, 3), f"forward: state must be a BatchNormState; got int. {MAKE_ONE}"),
        (
            lambda w: cubn.backward(w.dy, w.out),
            "backward: saved must be a Saved; got ndarray. "
            "It is the second result of forward_train and forward_frozen.",
        ),
        (
            lambda w: cubn.normalize(w.x, w.state),
            "normalize: moments must be Moments; got BatchNormState. Use cubn.moments(x) to take them.",
        ),
        (
            lambda w: cubn.update(w.state, w.x),
            "update: moments must be Moments; got ndarray. Use cubn.moments(x) to take them.",
        ),
        (lambda w: cubn.update(w.x, w.moments), f"update: state must be a BatchNormState; got ndarray. {MAKE_ONE}"),
        (lambda w: cubn.fold(w.x), f"fold: state must be a BatchNormState; got ndarray. {MAKE_ONE}"),
        (
            lambda w: cubn.fold_into(w.x[0], None, w.x),
            f"fold_into: state must be a BatchNormState; got ndarray. {MAKE_ONE}",
        ),
        (
            lambda w: cubn.fold_into(w.x[0], None, w.state, groups=1.5),
            "fold_into: groups must be an integer; got 1.5.",
        ),
        (lambda w: w.moments.merge(w.x), "merge: other must be Moments; got ndarray."),
        (lambda w: w.moments.blend(w.x, 0.5), "blend: other must be Moments or a BatchNormState; got ndarray."),
        (lambda w: w.moments.blend(w.state, "0.5"), "blend: weight must be a real number; got '0.5'."),
        (lambda w: cubn.moments(w.x, start=1.5), "moments: start must be an integer; got 1.5."),
        (lambda w: cubn.BatchNormState(2.5), "BatchNormState: num_features must be an integer; got 2.5."),
        (
            lambda w: cubn.BatchNormState(4, dtype="float16"),
            "BatchNormState: dtype must be 'float32' or 'float64'; got 'float16'.",
        ),
    ],
    ids=[
        "state",
        "saved",
        "normalize",
        "update",
        "updated",
        "fold",
        "fold_into",
        "groups",
        "merge",
        "blend",
        "weight of blend",
        "start",
        "num_features",
        "dtype",
    ],
)
def test_arguments_of_another_kind(world, call, text):
    refused(world, TypeError, text, call, world)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda w: w.moments.merge(cubn.moments(w.x, start=2)),
            "merge: other must begin at sample 3 or end at 0, beside these Moments; got [2, 5). "
            "Give `moments` the global index of its first sample as start, and merge neighbours; or, where samples "
            "have no order, add them: a + b.",
        ),
        (
            lambda w: w.moments.merge(cubn.moments(w.x[:, :2], start=3)),
            "merge: other must have 4 channels, as these Moments have; got 2.",
        ),
        (lambda w: w.moments.blend(w.state, 1.5), "blend: weight must be from 0 to 1; got 1.5."),
        (lambda w: w.moments.blend(w.state, np.nan), "blend: weight must be from 0 to 1; got nan."),
        (
            lambda w: w.moments.blend(cubn.BatchNormState(3), 0.5),
            "blend: other must have 4 channels, as these Moments have; got 3.",
        ),
        (
            lambda w: w.moments.blend(cubn.BatchNormState(4, track=False), 0.5),
            "blend: other must have running statistics; got a state with track=False. Make the state with track=True.",
        ),
        (
            lambda w: w.moments.blend(cubn.moments(w.x[:0]), 0.5),
            "blend: other must be of at least one value per channel; got 0.",
        ),
        (
            lambda w: cubn.moments(w.x[:0]).blend(w.state, 0.5),
            "blend: moments must be of at least one value per channel; got 0.",
        ),
        (
            lambda w: cubn.update(w.state, cubn.moments(w.x[:, :2])),
            "update: moments must have 4 channels, as the state has; got 2.",
        ),
        (
            lambda w: cubn.moments(w.x, start=-1),
            "moments: start must be 0 or more and less than 2**62, a global sample index; got -1.",
        ),
        (
            lambda w: cubn.moments(w.x, start=1 << 62),
            "moments: start must be 0 or more and less than 2**62, a global sample index; got 4611686018427387904.",
        ),
        *(
            (
                lambda w, operation=operation: operation(w, sizes=[3]),
                f"{name}: sizes must be given together with comm; got comm=None. They are the samples of its ranks.",
            )
            for name, operation in {
                "moments": lambda w, **given: cubn.moments(w.x, **given),
                "forward_train": lambda w, **given: cubn.forward_train(w.x, w.state, **given),
                "forward_frozen": lambda w, **given: cubn.forward_frozen(w.x, w.state, **given),
            }.items()
        ),
        (
            lambda w: cubn.BatchNormState(0),
            "BatchNormState: num_features must be 1 or more and less than 2**48; got 0.",
        ),
        (
            lambda w: cubn.BatchNormState.from_arrays(),
            "BatchNormState: num_features must be given where there are no arrays; got None.",
        ),
    ],
    ids=[
        *("merge", "merge channels", "blend above", "blend nan", "blend channels", "blend untracked"),
        *("blend with nothing", "blend nothing", "update channels", "start", "start too large"),
        *("sizes of moments", "sizes of forward_train", "sizes of forward_frozen", "num_features", "no arrays"),
    ],
)
def test_values_out_of_range(world, call, text):
    refused(world, ValueError, text, call, world)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("renorm", "error", "text"),
    [
        (3, TypeError, "renorm must be None or (r_max, d_max), two numbers; got 3."),
        ("35", TypeError, "renorm must be None or (r_max, d_max), two numbers; got '35'."),
        ((3, 5, 1), TypeError, "renorm must be None or (r_max, d_max), two numbers; got (3, 5, 1)."),
        ((3, "5"), TypeError, "renorm's d_max must be a real number; got '5'."),
        ((True, 5), TypeError, "renorm's r_max must be a real number; got True."),
        ((10**400, 5), ValueError, "renorm's r_max must be a number that a float can hold; got 1"),
        ((0.5, 5), ValueError, "renorm's r_max must be 1 or more; got 0.5."),
        ((np.nan, 5), ValueError, "renorm's r_max must be 1 or more; got nan."),
        ((3, -1e-300), ValueError, "renorm's d_max must be 0 or more; got -1e-300."),
        ((3, np.nan), ValueError, "renorm's d_max must be 0 or more; got nan."),
    ],
    ids=str,
)
def test_limits_of_renorm(world, renorm, error, text):
    before = world.contents()
    for out in (None, world.out):
        with pytest.raises(error) as caught:
            cubn.forward_train(world.x, world.state, renorm=renorm, out=out)
        assert str(caught.value).startswith(f"forward_train: {text}")
    np.testing.assert_equal(world.contents(), before)


def test_renorm_without_running_statistics(world):
    text = (
        "forward_train: state must have running statistics; got a state with track=False. "
        "renorm compares the batch with them: make the state with track=True."
    )
    for update in (True, False):
        state = cubn.BatchNormState(4, track=False)
        refused(world, ValueError, text, cubn.forward_train, world.x, state, renorm=(3, 5), update=update)


def test_renorm_of_one_value_per_channel(world):
    text = f"forward_train: x must have more than one value per channel; got 1 (shape=(1, 4, 1), {F32}). {TRAP}"
    refused(world, ValueError, text, cubn.forward_train, world.x[:1, :, :1], world.state, renorm=(3, 5))


def test_after_renorm_over_x_there_is_no_backward(world):
    x = world.x.copy()
    _, saved = cubn.forward_train(x, world.state.copy(), renorm=(3, 5), out=x)
    with pytest.raises(ValueError, match="x must be kept until backward, but y was written over it"):
        cubn.backward(world.dy, saved)


FLAGS = [
    *((operation, "relu") for operation in [*NORMALIZING, "backward_from"]),
    ("forward_train", "update"),
    ("backward", "statistics"),
    ("backward_from", "frozen"),
    ("backward_from", "statistics"),
]


def with_option(world, function, **options):
    """A call of a function with one of its options."""
    C = world.state.num_features
    return {
        "backward": lambda: cubn.backward(world.dy, world.saved, **options),
        "backward_from": lambda: cubn.backward_from(world.dy, world.x, mean=np.zeros(C), invstd=np.ones(C), **options),
        **{name: given(world, name, **options) for name in NORMALIZING},
    }[function]


@pytest.mark.parametrize("value", ["no", "False", 0, 1, 1.0, None, [], np.int64(1), np.ones(2, bool)], ids=repr)
@pytest.mark.parametrize(("function", "option"), FLAGS)
def test_what_is_neither_true_nor_false(world, function, option, value):
    text = f"{function}: {option} must be True or False; got {value!r}."
    refused(world, TypeError, text, with_option(world, function, **{option: value}))


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("operation", NORMALIZING)
def test_numpy_s_true_is_true(world, operation, value):
    world.state.momentum = 0.0
    plain, numpy = (given(world, operation, relu=flag)() for flag in (value, np.bool_(value)))
    y, expected = (a[0] if isinstance(a, tuple) else a for a in (numpy, plain))
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    ("call", "function", "argument"),
    [
        (lambda w: cubn.moments(w.x, start=True), "moments", "start"),
        (lambda w: cubn.moments(w.x, channel_axis=True), "moments", "channel_axis"),
        (lambda w: cubn.normalize(w.x, w.moments, channel_axis=True), "normalize", "channel_axis"),
        (lambda w: cubn.finite_mask(w.x, channel_axis=True), "finite_mask", "channel_axis"),
        (lambda w: cubn.BatchNormState(True), "BatchNormState", "num_features"),
        (lambda w: cubn.fold_into(w.x, None, w.state, output_axis=True), "fold_into", "output_axis"),
        (lambda w: cubn.fold_into(w.x, None, w.state, output_axis=1, groups=True), "fold_into", "groups"),
        (
            lambda w: cubn.forward_train(w.x, w.state, comm=threads.communicators(1)[0], sizes=[True]),
            "forward_train",
            "sizes",
        ),
    ],
)
def test_true_is_no_number(world, call, function, argument):
    refused(world, TypeError, f"{function}: {argument} must be an integer; got True.", call, world)


@pytest.mark.parametrize("value", ["mean", "Local", ""])
def test_whose_parameter_gradients(world, value):
    text = f"backward: parameter_gradients must be 'local' or 'global'; got {value!r}."
    refused(world, ValueError, text, cubn.backward, world.dy, world.saved, parameter_gradients=value)


@pytest.mark.parametrize("value", [None, True, ["local"], np.array(["local", "global"])], ids=repr)
def test_parameter_gradients_of_another_kind(world, value):
    text = f"backward: parameter_gradients must be 'local' or 'global'; got {value!r}."
    refused(world, TypeError, text, cubn.backward, world.dy, world.saved, parameter_gradients=value)


@pytest.mark.parametrize("groups", [0, -2, 5])
def test_groups_out_of_range(world, groups):
    text = f"fold_into: groups must be from 1 to the 4 channels; got {groups}."
    refused(world, ValueError, text, cubn.fold_into, world.x, None, world.state, output_axis=1, groups=groups)


HUGE = 10**5000
WITH_HUGE_NUMBERS = {
    "num_features": lambda world: cubn.BatchNormState(HUGE),
    "eps": lambda world: cubn.BatchNormState(4, eps=HUGE),
    "channel_axis": lambda world: cubn.moments(world.x, channel_axis=HUGE),
    "start": lambda world: cubn.moments(world.x, start=HUGE),
    "tracked": lambda world: setattr(world.state, "tracked", HUGE),
    "output_axis": lambda world: cubn.fold_into(np.ones((4, 2)), None, world.state, output_axis=HUGE),
    "groups": lambda world: cubn.fold_into(np.ones((4, 2)), None, world.state, groups=HUGE),
    "count": lambda world: cubn.Moments.from_statistics(HUGE, np.ones(4), np.ones(4)),
    "backward_from's count": lambda world: with_option(world, "backward_from", count=HUGE)(),
    "Moments' start": lambda world: cubn.Moments.from_dict(world.moments.to_dict() | {"start": HUGE}),
    "Moments' stop": lambda world: cubn.Moments.from_dict(world.moments.to_dict() | {"stop": HUGE}),
    "sizes": lambda world: threads.run(1, lambda comm: cubn.moments(world.x, comm=comm, sizes=[HUGE])),
}


@pytest.mark.parametrize("call", WITH_HUGE_NUMBERS.values(), ids=WITH_HUGE_NUMBERS)
def test_a_number_of_too_many_digits_is_refused_in_words(world, call):
    """Python does not write down an integer of more than 4300 digits."""
    with pytest.raises((ValueError, ExceptionGroup)) as caught:
        call(world)
    error = caught.value.exceptions[0] if isinstance(caught.value, ExceptionGroup) else caught.value
    assert " must " in str(error) and "digits" not in str(error)


class Unspeakable:
    def __repr__(self):
        raise RuntimeError("deleted")


@pytest.mark.parametrize(("function", "option"), FLAGS)
def test_an_option_that_has_no_repr(world, function, option):
    text = f"{function}: {option} must be True or False; got a tests.Unspeakable."
    refused(world, TypeError, text, with_option(world, function, **{option: Unspeakable()}))
