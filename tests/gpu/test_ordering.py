"""What one stream writes and another reads or frees: each access is ordered behind the one before, without a wait.

Streams are kept busy, so that what is not ordered comes too early.
"""

import copy
import pickle
import threading
import warnings

import numpy as np
import pytest

import cubn
from tests.gpu import device_arrays, queues
from tests.ops import arrays

pytestmark = pytest.mark.gpu

cupy = pytest.importorskip("cupy")

SHAPE = (8, 16, 28, 28)
C = SHAPE[1]


def batch(seed, shape=SHAPE):
    return arrays.normal(np.random.default_rng(seed), shape, "float32", centre=seed)


def state_that_has_seen_one(library, **options):
    """A state after a step whose kernels are compiled, all of it done."""
    x = library.carry(batch(0))
    state = cubn.BatchNormState(C, like=x, **options)
    cubn.forward_train(x, state)
    cupy.cuda.runtime.deviceSynchronize()
    return state


def on_host(**options):
    """The same state, and after one step more."""
    before = cubn.BatchNormState(C, **options)
    cubn.forward_train(batch(0), before)
    after = before.copy()
    cubn.forward_train(batch(1), after)
    return before, after


@pytest.fixture
def late(library):
    """A step on the library's busy side stream, whose x is there only once the stream has come that far."""

    def train(state, seed=1):
        source = library.carry(batch(seed))
        x = library.zeros_like(source)
        cupy.cuda.runtime.deviceSynchronize()
        with library.current():
            library.busy()
            library.copy(x, source)
            return cubn.forward_train(x, state)

    return train


READERS = {
    "tracked": lambda state: state.tracked,
    "to_dict": lambda state: state.to_dict()["tracked"],
    "copy": lambda state: state.copy().tracked,
    "deepcopy": lambda state: copy.deepcopy(state).tracked,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)).tracked,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_counters_are_read_behind_the_step_that_counts(library, late, read):
    state = state_that_has_seen_one(library)
    late(state)
    assert np.asarray(device_arrays.store_of(read(state))).tolist() == [2] * C


def test_counters_that_are_set_are_set_behind_the_step_that_counts(library, late):
    state = state_that_has_seen_one(library)
    late(state)
    state.tracked = np.full(C, 7)
    with library.current():
        cubn.forward_train(library.carry(batch(2)), state)
    library.stream.synchronize()
    assert np.asarray(device_arrays.store_of(state.tracked)).tolist() == [8] * C


def test_counters_are_on_the_device_before_the_first_step_reads_them(library):
    """With momentum=None they are its weight. The default stream is busy, and the step is on another."""
    x = library.carry(batch(1))
    state_that_has_seen_one(library, momentum=None)  # compiles
    state = cubn.BatchNormState(C, like=x, momentum=None)
    cupy.cuda.runtime.deviceSynchronize()
    with cupy.cuda.Stream.null:
        queues.keep_busy()
    with library.current():
        cubn.forward_train(x, state)
    expected = cubn.BatchNormState(C, momentum=None)
    cubn.forward_train(batch(1), expected)
    library.stream.synchronize()
    for name in ("running_mean", "running_var", "tracked"):
        arrays.assert_same(device_arrays.store_of(getattr(state, name)), getattr(expected, name), name)


def test_saved_statistics_are_read_behind_the_forward(library, late):
    """On the stream that is current where they are asked for. Of a batch of their own: memory comes again with what was
    in it.
    """
    state = state_that_has_seen_one(library)
    _, saved = late(state, seed=8)
    _, expected = cubn.forward_train(batch(8), on_host()[0])
    for name in ("mean", "var", "invstd"):
        arrays.assert_same(np.asarray(library.to_host(getattr(saved, name))), getattr(expected, name), name)


def test_saved_statistics_are_arrays_of_x_s_library(library):
    x = library.carry(batch(0))
    _, saved = cubn.forward_train(x, cubn.BatchNormState(C, like=x))
    assert type(saved.mean) is type(x)


def test_a_backward_on_another_stream_comes_behind_its_forward(library):
    """x is there before either; what the forward leaves for the backward is not."""
    x, dy = library.carry(batch(9)), library.carry(batch(3))
    state = state_that_has_seen_one(library)
    cubn.backward(dy, cubn.forward_train(dy, state.copy())[1])  # compiles
    cupy.cuda.runtime.deviceSynchronize()
    with library.current():
        library.busy()
        _, saved = cubn.forward_train(x, state)
    grads = cubn.backward(dy, saved)
    _, expected = cubn.forward_train(batch(9), on_host()[0])
    for name in ("dx", "dgamma", "dbeta"):
        got = device_arrays.store_of(getattr(grads, name))
        arrays.assert_same(got, getattr(cubn.backward(batch(3), expected), name), name)


def test_no_call_warns(library):
    """Streams of PyTorch come to CuPy in a way that is not deprecated."""
    x = library.carry(batch(0))
    state = cubn.BatchNormState(C, like=x)
    with warnings.catch_warnings(), library.current():
        warnings.simplefilter("error")
        y, saved = cubn.forward_train(x, state, relu=True)
        cubn.backward(y, saved)
        cubn.forward(x, state)
    library.stream.synchronize()


# --- memory in flight -------------------------------------------------------------------------------------------------

THREADS, ROUNDS, FEATURES = 4, 8, 65536


def test_threads_that_stage_at_once_leave_each_other_s_memory_alone(library):
    """Moments go to the device by way of pinned memory, behind streams that are busy."""
    x = library.carry(batch(0, (2, FEATURES)))
    means = [np.full(FEATURES, float(number)) for number in range(THREADS * ROUNDS)]
    moments = [cubn.Moments.from_statistics(count=2, mean=mean, var=np.ones(FEATURES)) for mean in means]
    cubn.normalize(x, moments[0])  # compiles
    cupy.cuda.runtime.deviceSynchronize()
    found, streams = {}, [type(library)() for _ in range(THREADS)]

    def work(thread):
        own = streams[thread]
        with own.current():
            own.busy()
            for number in range(thread, len(moments), THREADS):
                found[number] = cubn.normalize(x, moments[number])
        own.stream.synchronize()

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(moments)
    for number, y in found.items():
        arrays.assert_same(device_arrays.store_of(y), cubn.normalize(batch(0, (2, FEATURES)), moments[number]))


def test_memory_of_jax_is_not_given_away_before_it_is_read():
    """x goes while the kernel that reads it still waits; others get its memory."""
    store = batch(0, (64, 16, 56, 56))
    x = device_arrays.to_jax(store)
    state = cubn.BatchNormState(16, like=x)
    expected = cubn.forward(store, cubn.BatchNormState(16))
    cubn.forward(x, state)  # compiles
    cupy.cuda.runtime.deviceSynchronize()
    with cupy.cuda.Stream.null:
        queues.keep_busy()
    y = cubn.forward(x, state)
    del x
    others = [device_arrays.to_jax(np.full_like(store, 7)) for _ in range(4)]
    arrays.assert_same(np.asarray(y), expected)
    assert len(others) == 4


def test_memory_given_to_jax_is_not_taken_back_before_it_is_read():
    """y goes while XLA still reads it; the next result of cubn is larger than nothing."""
    import functools

    import jax

    store = batch(0, (64, 16, 56, 56))
    x = device_arrays.to_jax(store)
    zero = device_arrays.to_jax(np.zeros_like(store))
    state = cubn.BatchNormState(16, like=x)

    @functools.partial(jax.jit, static_argnums=1)
    def delayed(y, rounds):
        """y, behind a long loop."""
        big = jax.numpy.ones((2048, 2048), "float32")
        end = jax.lax.fori_loop(0, rounds, lambda _, a: a @ a / 2048, big)
        return y + 0 * end[0, 0]

    delayed(cubn.forward(x, state), 300).block_until_ready()  # compiles
    kept = []
    for _ in range(4):
        kept.append(delayed(cubn.forward(x, state), 300))
        cubn.forward(zero, state)  # in whose memory?
    expected = cubn.forward(store, cubn.BatchNormState(16))
    for y in kept:
        arrays.assert_same(np.asarray(y), expected)


# --- graphs -----------------------------------------------------------------------------------------------------------


def test_normalize_by_moments_can_be_captured(library):
    """Their copy is the graph's: whatever becomes of the host's memory, replays read it."""
    moments = cubn.moments(batch(3))
    x = library.carry(batch(0))
    y, replay = library.graph_of(lambda: cubn.normalize(x, moments))
    for seed in range(3):
        cubn.normalize(x, cubn.moments(batch(seed + 5)))  # in whose staging memory?
        library.copy(x, library.carry(batch(seed)))
        replay()
        arrays.assert_same(device_arrays.store_of(y), cubn.normalize(batch(seed), moments))
