"""Work on several streams: all of cubn's own memory is ordered across them, and what is not would be found.

NumPy's arrays stand for CuPy's. The tests' own arrays are complete before they are given, so that nothing but cubn
orders what cubn keeps: counters, statistics, relu masks, nodes.
"""

import copy
import gc
import itertools
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

import cubn
from cubn._state.counted import CountedOnDevice
from cubn.backends import backend_for
from cubn.backends.cuda.backend import CudaBackend
from cubn.backends.cuda.series import Series
from cubn.backends.cuda.shared import SharedDevice
from cubn.sync import threads
from cubn.sync.collective import _Together
from cubn.sync.transport import Communicator
from tests.backends import forget_backends
from tests.cuda.named import PASSES, RESIDENT
from tests.cuda_on_cpu.build import unavailable
from tests.cuda_on_cpu.device import CpuDevice
from tests.cuda_on_cpu.devices import Devices
from tests.cuda_on_cpu.ordering import CpuStream
from tests.ops import arrays

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "")

torch = pytest.importorskip("torch")

N, C = 6, 5
X, DY, RESIDUAL = np.random.default_rng(0).standard_normal((3, N, C, 7), dtype=np.float32)
FIRST, SECOND, THIRD = streams = [CpuStream(name) for name in ("first", "second", "third")]


@pytest.fixture(params=[RESIDENT, PASSES], ids=["resident", "passes"])
def devices(request, monkeypatch):
    devices = Devices(request.param)
    devices.use(monkeypatch)
    forget_backends()
    yield devices
    forget_backends()


def faults(devices, scenario):
    """What is not ordered in a scenario, all of whose memory is released in the end."""
    scenario(devices, devices.device("numpy"))
    gc.collect()
    return devices.ordering.faults


# --- scenarios --------------------------------------------------------------------------------------------------------


def counters(devices, device):
    """Read, copied, pickled, assigned, reset and counted on, each time on another stream."""
    state = cubn.BatchNormState(C, momentum=None)
    counts = []
    for number in range(2):
        for stream in (*streams, FIRST):
            with device.on(stream):
                cubn.forward_train(X, state)
                cubn.forward_train(X, state)
        with device.on(SECOND):
            counts.append(state.tracked[0])
        with device.on(THIRD):
            counts += [state.to_dict()["tracked"][0], pickle.loads(pickle.dumps(state)).tracked[0]]
        copied = copy.copy(state)
        with device.on(FIRST):
            cubn.forward_train(X, copied)
            if number:
                state.reset()
            else:
                state.tracked = state.tracked + 1
        with device.on(SECOND):
            counts += [copied.tracked[0], state.tracked[0]]
    assert counts == [8, 8, 8, 9, 9, 17, 17, 17, 18, 0]


def released_counters(devices, device):
    """A state that is gone while its last update may be under way."""
    state = cubn.BatchNormState(C)
    with device.on(FIRST):
        cubn.forward_train(X, state)
        cubn.forward_train(X, state)
    with device.on(SECOND):
        cubn.forward_train(X, state)
        del state


def backward(devices, device):
    """On another stream than the forward, whose statistics and relu mask are gone at once."""
    state = cubn.BatchNormState(C)
    for _ in range(2):
        for forward in (cubn.forward_train, cubn.forward_frozen):
            with device.on(FIRST):
                _, saved = forward(X, state, residual=RESIDUAL, relu=True)
            with device.on(SECOND):
                cubn.backward(DY, saved)
                del saved


def gradients_by_statistics(devices, device):
    state = cubn.BatchNormState(C)
    with device.on(FIRST):
        _, saved = cubn.forward_frozen(X, state)
    with device.on(SECOND):
        cubn.backward(DY, saved, statistics=True)
    with device.on(THIRD):
        cubn.backward_from(DY, X, mean=np.zeros(C), invstd=np.ones(C))


def double_backward(devices, device):
    state = cubn.BatchNormState(C)
    for forward, relu in itertools.product((cubn.forward_train, cubn.forward_frozen), (False, True)):
        with device.on(FIRST):
            _, saved = forward(X, state, relu=relu)
        with device.on(SECOND):
            cubn.double_backward(DY, np.ones(C, np.float32), None, DY, saved)
            del saved


def evaluation(devices, device):
    """Of statistics that were updated on another stream, for which the user waits: they are the user's arrays."""
    state = cubn.BatchNormState(C)
    for name in ("running_mean", "running_var"):
        devices.ordering.watch(name, getattr(state, name))
    with device.on(FIRST):
        cubn.forward_train(X, state)
    with device.on(SECOND):
        device.wait_for(FIRST)
        cubn.forward(X, state)


def moments(devices, device):
    """Merged, normalised by and made into running statistics, on several streams."""
    with device.on(FIRST):
        first = cubn.moments(X[:4])
    with device.on(SECOND):
        merged = first.merge(cubn.moments(X[4:], start=4))
    state = cubn.BatchNormState(C)
    for stream in (*streams, FIRST):
        with device.on(stream):
            for _ in range(2):
                cubn.normalize(X, merged)
                cubn.update(state, merged)
    with device.on(SECOND):
        cubn.normalize(X, merged)
        del merged
    assert state.tracked.tolist() == [8] * C


def saved_statistics(devices, device):
    """Looked at on another stream, after their forward has let go of them."""
    for _ in range(2):
        with device.on(FIRST):
            _, saved = cubn.forward_train(X, cubn.BatchNormState(C), residual=RESIDUAL, relu=True)
        with device.on(SECOND):
            shown = [saved.count, saved.mean, saved.var, saved.invstd, saved.relu_bits.memory]
            del saved
            reads = [(array.ctypes.data, "array") for array in shown]
            devices.ordering.operation(SECOND, "a kernel of the user's", reads=reads)
            del shown


def groups(devices, device):
    """Ghost batches on one stream, differentiated on another."""
    state = cubn.BatchNormState(C)
    for _ in range(2):
        with device.on(FIRST):
            _, saved = cubn.forward_train(X, state, groups=2, residual=RESIDUAL, relu=True)
        with device.on(SECOND):
            cubn.backward(DY, saved)
            del saved


def saved_statistics_of_groups(devices, device):
    for _ in range(2):
        with device.on(FIRST):
            _, saved = cubn.forward_train(X, cubn.BatchNormState(C), groups=2, residual=RESIDUAL, relu=True)
        with device.on(SECOND):
            shown = [saved.count, saved.mean, saved.var, saved.invstd, *(bits.memory for bits in saved.relu_bits)]
            del saved
            reads = [(array.ctypes.data, "array") for array in shown]
            devices.ordering.operation(SECOND, "a kernel of the user's", reads=reads)
            del shown


class OnDevice(Communicator):
    """Ranks in threads, whose records go from device to device as with NCCL."""

    def __init__(self, comm):
        super().__init__(comm.rank, comm.size)
        self.gather = comm.gather

    def gather(self, record, received, sizes):
        """Another one's."""

    def takes(self, backend):
        return True

    def gather_on_device(self, device, record, received, sizes):
        self.gather(record.reshape(-1).view(np.uint8), received.reshape(-1).view(np.uint8), sizes).wait()
        reads, writes = ([(array.ctypes.data, "records")] for array in (record, received))
        device.ordering.operation(device.stream(), "a gather", reads, writes)
        return SimpleNamespace(wait=lambda: None)

    def lane(self, sizes, on_device, agreed):
        return self


def ranks(devices, device, communicator=lambda comm: comm, **options):
    """Exchanges that begin on one stream and end on another."""

    def rank(comm):
        comm = communicator(comm)
        mine = [CpuStream(f"{name} of rank {comm.rank}") for name in ("first", "second", "third")]
        lo, hi = (0, 3) if comm.rank == 0 else (3, N)
        state = cubn.BatchNormState(C)
        with device.on(mine[0]):
            options_of_x = {"residual": RESIDUAL[lo:hi], "relu": True, **options}
            started = cubn.forward_train_start(X[lo:hi], state, comm=comm, **options_of_x)
        with device.on(mine[1]):
            _, saved = started.finish()
            del started
        with device.on(mine[2]):
            started = cubn.backward_start(DY[lo:hi], saved)
            del saved
        with device.on(mine[0]):
            gradients = started.finish()
            del started
        return gradients, state.tracked.tolist()

    assert [counted for _, counted in threads.run(2, rank)] == [[1] * C] * 2


def ranks_on_devices(devices, device):
    ranks(devices, device, OnDevice)


def groups_of_ranks(devices, device):
    ranks(devices, device, groups=2)


def groups_of_ranks_on_devices(devices, device):
    ranks(devices, device, OnDevice, groups=2)


def renormalisation(devices, device):
    """Steps, gradients, what is read, and ranks, each on another stream than what came before."""
    state = cubn.BatchNormState(C)
    for stream in (FIRST, SECOND):
        with device.on(stream):
            _, saved = cubn.forward_train(X, state, residual=RESIDUAL, relu=True, renorm=(3, 5))
        with device.on(THIRD):
            cubn.backward(DY, saved)
            r = saved.r
            cubn.double_backward(DY, np.ones(C, np.float32), None, DY, saved)
            del saved, r
    ranks(devices, device, renorm=(3, 5))


def several_libraries(devices, device):
    """PyTorch's x beside a state of another library, then that library's own x."""
    state = cubn.BatchNormState(C, momentum=None)
    for name in ("gamma", "beta", "running_mean", "running_var"):
        devices.ordering.watch(name, getattr(state, name))
    x, dy = torch.from_numpy(X.copy()), torch.from_numpy(DY.copy())
    for _ in range(2):
        _, saved = cubn.forward_train(x, state)
        cubn.backward(dy, saved)
        cubn.forward(X, state)
        cubn.forward(x, state)
        cubn.forward_train(X, state)
        cubn.update(state, cubn.moments(x))
        cubn.normalize(x, cubn.moments(x), gamma=state.gamma)
        cubn.backward_from(dy, x, mean=state.running_mean, invstd=state.running_var)
    assert state.tracked.tolist() == [6] * C


def graphs(devices, device):
    """Captured after a warm-up, or without one: what a graph copies belongs to the graph."""
    taken, unseen = cubn.moments(X), cubn.moments(DY)
    state = cubn.BatchNormState(C)
    captured = CpuStream("captured")
    captured.captured = True
    for _ in range(2):
        cubn.normalize(X, taken)
        cubn.forward_train(X, state)
    devices.ordering.synchronize(device.stream())
    with device.on(captured):
        before = devices.ordering.copies
        cubn.normalize(X, taken)
        cubn.forward_train(X, state)
        assert devices.ordering.copies == before
        cubn.normalize(X, unseen)
        cubn.update(state, unseen)
        cubn.backward_from(DY, X, mean=np.zeros(C), invstd=np.ones(C))
    with devices.device("torch").on(captured):
        cubn.forward(torch.from_numpy(X.copy()), state)
    captured.captured = False
    cubn.normalize(X, unseen)
    del taken, unseen, state


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        counters,
        released_counters,
        backward,
        gradients_by_statistics,
        double_backward,
        evaluation,
        moments,
        saved_statistics,
        groups,
        saved_statistics_of_groups,
        ranks,
        ranks_on_devices,
        groups_of_ranks,
        groups_of_ranks_on_devices,
        renormalisation,
        several_libraries,
        graphs,
    )
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_all_is_ordered(devices, name):
    assert not faults(devices, SCENARIOS[name])


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_on_one_stream_nothing_waits_and_nothing_is_copied(devices, library):
    """Not even where running statistics are replaced by new arrays, and counters by copies."""
    x, dy, residual = (arrays.carry(values, library) for values in (X, DY, RESIDUAL))
    state, taken = cubn.BatchNormState(C, momentum=None, like=x), cubn.moments(X)

    def step():
        _, saved = cubn.forward_train(x, state, residual=residual, relu=True)
        cubn.backward(dy, saved)
        cubn.forward(x, state)
        cubn.normalize(x, taken)
        cubn.update(state, taken)

    step()
    ordering = devices.ordering
    before = ordering.events, ordering.host_waits, ordering.copies
    for _ in range(3):
        step()
    assert (ordering.events, ordering.host_waits, ordering.copies) == before
    assert before[0] == 0 and state.tracked.tolist() == [8] * C and not ordering.faults


@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_a_forward_saved_is_of_xs_library(devices, elsewhere):
    device = devices.device("torch")
    _, saved = cubn.forward_train(torch.from_numpy(X.copy()), cubn.BatchNormState(C, like=torch.zeros(1)))
    with device.on(SECOND if elsewhere else device.stream()):
        for shown in (saved.count, saved.mean, saved.var, saved.invstd):
            assert type(shown) is torch.Tensor
    np.testing.assert_array_equal(saved.mean, cubn.moments(X).mean)


# --- what would not be ordered ----------------------------------------------------------------------------------------


def no_wait(self, *arguments):
    """Nothing."""


def without_library(mean):
    return backend_for(mean.device, "")


def run_without_wait(self, device, values, stream, before, *memory):
    self.run(device, values, stream)
    device.hold(*memory)


def run_without_hold(self, device, values, stream, before, *memory):
    if before is not None:
        device.wait_for(before)
    self.run(device, values, stream)


def launch_without_wait_before(self, launch, parameters, stream):
    self._device.launch(launch, parameters, stream)
    for other in self._others:
        other.wait_for(stream)


def launch_without_wait_after(self, launch, parameters, stream):
    for other in self._others:
        self._device.wait_for(other.stream())
    self._device.launch(launch, parameters, stream)


def forgetful(method):
    """The method, whose result says nothing of a stream."""

    def of_no_stream(self, *arguments, **options):
        found = method(self, *arguments, **options)
        return (found[0], None) if type(found) is tuple else found._replace(stream=None)

    return of_no_stream


PLANTS = {
    "counters without a wait": ("counters", CountedOnDevice, "_follow", no_wait),
    "counters without a hold": ("released_counters", CountedOnDevice, "__exit__", no_wait),
    "counters without the library's name": ("counters", "cubn._state.holding._home", None, without_library),
    "counters that are always at hand": ("counters", CountedOnDevice, "at", property(lambda self: self._addresses)),
    "statistics without a wait": ("backward", Series, "run_behind", run_without_wait),
    "statistics without a hold": ("backward", Series, "run_behind", run_without_hold),
    "renormalised statistics without a wait": ("renormalisation", Series, "run_behind", run_without_wait),
    "statistics read by the host without a wait": (
        "double_backward",
        CudaBackend,
        "statistics_on_host",
        lambda self, s: s._replace(memory=self.device.to_host(s.memory), address=0),
    ),
    "statistics given out as they are": (
        "saved_statistics",
        CudaBackend,
        "apart",
        lambda self, array, statistics: self.device.as_users(array),
    ),
    "moments that know no stream": (
        "moments",
        CudaBackend,
        "place_statistics",
        forgetful(CudaBackend.place_statistics),
    ),
    "orders of merges that know no stream": ("ranks", CudaBackend, "_placed", forgetful(CudaBackend._placed)),
    "an exchange without a wait": ("ranks_on_devices", _Together, "_follow", no_wait),
    "an exchange without a hold": ("ranks", _Together, "_keep_for", no_wait),
    "several libraries without a wait before": (
        "several_libraries",
        SharedDevice,
        "launch",
        launch_without_wait_before,
    ),
    "several libraries without a wait after": ("several_libraries", SharedDevice, "launch", launch_without_wait_after),
    "one of several libraries": ("several_libraries", "cubn._inputs.joined", None, lambda inputs, *arrays: inputs),
    "a device that holds nothing": ("backward", CpuDevice, "hold", no_wait),
}


@pytest.mark.parametrize("name", PLANTS)
def test_what_is_missing_is_found(devices, monkeypatch, name):
    scenario, where, attribute, plant = PLANTS[name]
    monkeypatch.setattr(*((where, plant) if attribute is None else (where, attribute, plant)))
    assert faults(devices, SCENARIOS[scenario])
