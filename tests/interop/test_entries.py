"""What from_dict finds in a dict: whatever holds no numbers is refused by name, in cubn's own words."""

import re

import numpy as np
import pytest

import cubn

C = 4


def uninitialised():
    return pytest.importorskip("torch").nn.UninitializedParameter()


def meta():
    return pytest.importorskip("torch").zeros(C, device="meta")


def meta_number():
    return pytest.importorskip("torch").zeros((), device="meta")


def keys():
    jax = pytest.importorskip("jax")
    return jax.random.split(jax.random.key(0), C)


def a_key():
    return pytest.importorskip("jax").random.key(0)


def deleted():
    array = pytest.importorskip("jax").numpy.ones(C)
    array.delete()
    return array


def deleted_number():
    array = pytest.importorskip("jax").numpy.ones(()) + 0
    array.delete()
    return array


def masked():
    return np.ma.ones(C)


class Unreadable:
    def __array__(self, *arguments, **options):
        raise RuntimeError


WITHOUT_NUMBERS = [
    uninitialised,
    meta,
    meta_number,
    keys,
    a_key,
    deleted,
    deleted_number,
    masked,
    Unreadable,
    lambda: [[1.0], [1.0, 2.0]],
    lambda: [uninitialised()] * C,
]


def stored():
    state = cubn.BatchNormState(C)
    return {
        "state": (state.to_dict() | {"momentum": 0.1}, cubn.BatchNormState.from_dict),
        "moments": (cubn.moments(np.ones((3, C), np.float32)).to_dict(), cubn.Moments.from_dict),
    }


ENTRIES = [(of, name) for of, (entries, _) in stored().items() for name in entries]


@pytest.mark.parametrize("make", WITHOUT_NUMBERS)
@pytest.mark.parametrize(("of", "name"), ENTRIES, ids=[f"{of} {name}" for of, name in ENTRIES])
def test_an_entry_without_numbers_is_refused_by_name(of, name, make):
    entries, from_dict = stored()[of]
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=rf"^\w+: {name} must .*; got "):
        from_dict({**entries, name: make()})


def test_the_message_is_that_of_an_argument():
    entries, from_dict = stored()["state"]
    with pytest.raises(TypeError, match="^" + re.escape("BatchNormState: gamma must be initialized; got ")):
        from_dict({**entries, "gamma": uninitialised()})


def test_what_a_signal_handler_raises_is_not_taken_for_an_entry_s_fault():
    class Interrupted:
        def __index__(self):
            raise TimeoutError

    for (entries, from_dict), name in zip(stored().values(), ("num_features", "start"), strict=True):
        with pytest.raises(TimeoutError):
            from_dict({**entries, name: Interrupted()})


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_numbers_that_a_library_stored_without_axes(library):
    """As torch.save of a dict of tensors and numpy.savez have them."""
    array = (
        np.asarray
        if library == "numpy"
        else pytest.importorskip(library if library == "torch" else "jax.numpy").asarray
    )
    entries, from_dict = stored()["state"]
    numbers = {name: value for name, value in entries.items() if isinstance(value, (int, float))}
    assert set(numbers) == {"num_features", "eps", "momentum", "channel_axis"}
    state = from_dict({**entries, **{name: array(value) for name, value in numbers.items()}})
    found = {name: np.float32(value) for name, value in state.to_dict().items() if name in numbers}
    assert found == {name: np.float32(value) for name, value in numbers.items()}
    entries, from_dict = stored()["moments"]
    moments = from_dict({**entries, **{name: array(entries[name]) for name in ("start", "stop", "exact")}})
    assert (moments.start, moments.stop, moments.exact) == (0, 3, True)
