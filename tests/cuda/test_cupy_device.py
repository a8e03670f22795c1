"""The device that CuPy drives, on the stand-in for CuPy: whatever is done late, and whoever drops what."""

import contextlib
import gc
import sys
import threading
import warnings
import weakref

import numpy as np
import pytest

import cubn
from cubn import _weak
from cubn._arrays import capsules
from cubn._types import CUDA
from cubn.backends import backend_for
from cubn.backends.cuda import parameters, plan
from tests.cuda_on_cpu import standing_in
from tests.cuda_on_cpu.build import unavailable
from tests.gpu.results import run_everything
from tests.interop import exporter
from tests.ops import arrays

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

C = 40
SHAPE = (3, 10, 30)


def store(seed=0):
    return arrays.normal(np.random.default_rng(seed), SHAPE, "float32", centre=0.5)


@pytest.fixture
def cupy():
    with standing_in.cupy_stand_in() as stand_in:
        yield stand_in


@pytest.fixture
def two(request):
    """CuPy with two devices."""
    with standing_in.cupy_stand_in(devices=2) as stand_in:
        yield stand_in


@pytest.fixture
def torch(cupy, monkeypatch):
    stand_in = standing_in.Torch(cupy)
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    return stand_in


@pytest.fixture
def jax(cupy, monkeypatch):
    stand_in = standing_in.Jax(cupy)
    monkeypatch.setitem(sys.modules, "jax", stand_in)
    return stand_in


def new_device(library="cupy", index=0):
    from cubn.backends.cuda.cupy_device import CupyDevice

    return CupyDevice(index, library)


def new_stream(cupy):
    return cupy.cuda.Stream(non_blocking=True)


def statistics_of(device, mean, launch=None):
    """A kernel that copies a mean on the device; where it goes. `launch` is called in the place of the device's."""
    count, zeros = device.from_host(np.array(3)), device.zeros((C,), "float64")
    found = device.empty((C,), "float64")
    other = device.empty((3 * C + 1,), "float64")
    plan_of = plan.channelwise("statistics", C)
    names = ("from_count", "first", "second", "mean", "m2", "var", "invstd", "count")
    rest = [device.address(other) + 8 * C * i for i in range(4)]
    values = [*map(device.address, (count, mean, zeros, found)), *rest]
    block = parameters.pack({**dict(plan_of.fields), "eps": 1e-5, **dict(zip(names, values, strict=True))})
    (launch or device.launch)(plan_of, block, device.stream())
    device.hold(count, zeros, other)
    return found


# --- whole operations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("shape", [(3, 10, 30), (70, 24), (2, 2, 9000)])
def test_every_operation_has_the_cpus_bits_on_a_stream_of_the_callers(cupy, shape, late):
    stores = [arrays.normal(np.random.default_rng(seed), shape, "float32", centre=0.5) for seed in range(3)]
    with cupy.lazily() if late else contextlib.nullcontext(), new_stream(cupy):
        found = run_everything(*map(cupy.array, stores))
        found = {what: x.get() if isinstance(x, cupy.ndarray) else x for what, x in found.items()}
    for what, expected in run_everything(*stores).items():
        arrays.assert_same(found[what], expected, what)
    assert not cupy.own_kernels


def test_memory_that_must_be_zeros_is_so_on_the_callers_stream(cupy, monkeypatch):
    """Tickets count from 0 in memory that others used before."""
    monkeypatch.setitem(cupy.cuda.runtime.ATTRIBUTES, "L2CacheSize", 2 << 20)
    store = arrays.normal(np.random.default_rng(0), (64, 24, 40, 40), "float32", centre=0.5)
    expected, _ = cubn.forward_train(store, cubn.BatchNormState(24))
    with cupy.lazily(), new_stream(cupy):
        x = cupy.array(store)
        state = cubn.BatchNormState(24, like=x)
        for _ in range(2):
            y, _ = cubn.forward_train(x, state)
        arrays.assert_same(y.get(), expected)
    assert [kernel for kernel, *_ in cupy.cuda.driver.launched[-2:]] == ["ticketed"] * 2


def test_nothing_warns(cupy, torch):
    """CuPy 14 deprecates ExternalStream."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        device = new_device("torch")
        for _ in range(3):
            with torch.on(new_stream(cupy)):
                statistics_of(device, device.zeros((C,), "float64"))
                device.synchronize()


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_is_one_object_for_all_libraries(cupy, torch):
    ours, torchs, others = new_device("cupy"), new_device("torch"), new_device("jax")
    first, second = new_stream(cupy), new_stream(cupy)
    assert ours.stream() is torchs.stream() is others.stream()
    assert ours.stream().handle == 0
    with first, torch.on(first):
        found = ours.stream()
        assert found is torchs.stream() is not others.stream()
        assert found.handle == first.ptr
    with second:
        assert ours.stream() is not found
    with first:
        assert ours.stream() is found


def test_a_stream_that_is_remembered_keeps_its_handle(cupy):
    """CUDA gives the handle of a stream that was destroyed to another one."""
    device, stream = new_device(), new_stream(cupy)
    with stream:
        remembered = device.stream()
    del stream
    gc.collect()
    other = new_stream(cupy)
    with other:
        assert device.stream() is not remembered
        assert device.stream().handle != remembered.handle


def test_cupys_older_than_from_external_wrap_a_stream_once(cupy, torch, monkeypatch):
    monkeypatch.delattr(cupy.cuda.Stream, "from_external")
    made = []
    monkeypatch.setattr(cupy.cuda, "ExternalStream", lambda *arguments: made.append(arguments) or cupy.cuda.Stream.null)
    device, stream = new_device("torch"), new_stream(cupy)
    with torch.on(stream):
        kept = [device.stream() for _ in range(3)]
    assert kept[0] is kept[2]
    assert made == [(stream.ptr, 0)]


@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_work_comes_behind_the_stream_that_it_waits_for(cupy, torch, library):
    device, (before, after) = new_device(library), (new_stream(cupy), new_stream(cupy))
    values = np.arange(float(C))
    with cupy.lazily():
        with torch.on(before), before:
            written, stream = device.from_host(values), device.stream()
        with torch.on(after), after:
            device.wait_for(stream)
            device.wait_for(device.stream())
            found = device.beside([written.reshape(1, C)])
            device.hold(written)
            assert (device.to_host(found) == values).all()
    assert not cupy.own_kernels


def test_nothing_waits_in_a_graph(cupy):
    """An event that is recorded on a stream which is captured is part of the graph, and of another's no part."""
    device, (outside, captured) = new_device(), (new_stream(cupy), new_stream(cupy))
    with outside:
        before = device.stream()
    with captured:
        inside = device.stream()
        captured.begin_capture(cupy.cuda.runtime.streamCaptureModeGlobal)
        assert device.capturing()
        device.wait_for(before)
        captured.end_capture()
        assert not device.capturing()
        captured.begin_capture()
    with outside:
        device.wait_for(inside)
    with captured:
        captured.end_capture()


def test_the_null_stream_counts_as_captured_beside_a_stream_that_it_waits_for(cupy):
    device, blocking = new_device("jax"), cupy.cuda.Stream()
    with blocking:
        blocking.begin_capture()
        assert device.capturing()
        blocking.end_capture()
    assert not device.capturing()


def test_an_error_of_the_device_is_no_capture(cupy, monkeypatch):
    """Order would be lost, and memory kept for good, in silence."""

    def illegal_access(stream):
        raise cupy.cuda.runtime.CUDARuntimeError(700)

    device = new_device()
    monkeypatch.setattr(cupy.cuda.runtime, "streamIsCapturing", illegal_access)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="700"):
        device.capturing()


# --- what is in flight ------------------------------------------------------------------------------------------------


def test_memory_that_another_stream_reads_is_not_used_again_meanwhile(cupy):
    device, (home, reader) = new_device(), (new_stream(cupy), new_stream(cupy))
    values = np.arange(float(C))
    with cupy.lazily():
        with home:
            memory = device.from_host(values)
            device.synchronize()
        with reader:
            found = device.beside([memory.reshape(1, C)])
            device.hold(memory)
        del memory
        with home:
            other = device.zeros((C,), "float64")
            device.synchronize()  # before the reader has begun
        with reader:
            assert (device.to_host(found) == values).all()
        del other


def test_what_is_done_is_let_go_without_waiting(cupy):
    device, stream = new_device(), new_stream(cupy)
    cupy.empty(C)
    with cupy.lazily(), stream:
        for _ in range(5):
            device.from_host(np.zeros(C))
        assert len(device._in_flight) == 5
        stream.synchronize()
        device.from_host(np.zeros(C))
        assert len(device._in_flight) == 1


def test_a_copy_has_the_values_that_were_given(cupy):
    """Which the caller may change, or drop, as soon as the call has returned."""
    device = new_device()
    with cupy.lazily(), new_stream(cupy):
        values = np.arange(float(C))
        found = device.from_host(values)
        values[:] = -1
        staged = device.staging((C,), "float64")
        staged[:] = 5
        other = device.from_host(staged)
        del staged
        device.staging((C,), "float64")[:] = 6
        assert (device.to_host(found) == np.arange(float(C))).all()
        assert (device.to_host(other) == 5).all()


def test_threads_that_stage_at_once_lose_no_memory(cupy):
    """Each on a stream of its own, which is late."""
    rounds, failed = 300, []

    def stage(number):
        device, stream = new_device(), new_stream(cupy)
        with stream:
            found = []
            for turn in range(rounds):
                staged = device.staging((8,), "float64")
                staged[:] = number * rounds + turn
                found.append(device.from_host(staged))
                del staged
            for turn, array in enumerate(found):
                if (device.to_host(array) != number * rounds + turn).any():
                    failed.append((number, turn))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with cupy.lazily():
            threads = [threading.Thread(target=stage, args=(number,)) for number in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed


def test_a_graph_keeps_what_it_copies(cupy):
    device, stream = new_device(), new_stream(cupy)
    with stream:
        stream.begin_capture()
        found = device.from_host(np.arange(float(C)))
        graph = stream.end_capture()
        for _ in range(2):
            device.staging((C,), "float64")[:] = 7
            device.from_host(np.zeros(C))
            graph.launch(stream)
            assert (device.to_host(found) == np.arange(float(C))).all()


def test_a_capture_that_forbids_threads_much_goes_on(cupy):
    """PyTorch's graphs are captured in the mode "global": allocating pinned memory, asking whether an event is done and
    loading a kernel are errors then, in every thread.
    """
    device, stream, other, errors = new_device(), new_stream(cupy), new_stream(cupy), []
    device.from_host(np.zeros(C))  # of which there is an event to be asked

    def stage(size):
        try:
            with cupy.cuda.Device(0), other:
                device.from_host(np.zeros(size))
        except Exception as error:
            errors.append(error)

    with stream:
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeGlobal)
        found = device.from_host(np.arange(5000.0))
        device.compile([plan.channelwise("keep", C)])
        thread = threading.Thread(target=stage, args=(70000,))
        thread.start()
        thread.join()
        graph = stream.end_capture()
        graph.launch(stream)
        assert not errors
        assert (device.to_host(found) == np.arange(5000.0)).all()


def test_a_graph_keeps_the_copy_of_moments(cupy):
    """Whoever drops them, and though nothing but this one stream has to do with them."""
    x, stream, pool = cupy.array(store()), new_stream(cupy), cupy.cuda.MemoryPool()
    with stream:
        taken = cubn.moments(x)
        expected = cubn.normalize(x, taken).get()
        with cupy.cuda.using_allocator(pool.malloc):
            stream.begin_capture()
            y = cubn.normalize(x, taken)
            graph = stream.end_capture()
        del taken
        gc.collect()
        others = [cupy.empty((n,), np.float64) for n in range(1, 1000, 64)]
        graph.launch(stream)
        assert (y.get() == expected).all()
        del others


# --- JAX --------------------------------------------------------------------------------------------------------------


def test_memory_of_jax_that_is_read_late_is_not_dropped_meanwhile(cupy, jax):
    """XLA uses memory again, on a stream of its own, as soon as nobody has it any more."""
    expected = cubn.forward(store(), cubn.BatchNormState(SHAPE[1]))
    with cupy.lazily():
        x, other = jax.device_put(store()), jax.device_put(store(1))
        state = cubn.BatchNormState(SHAPE[1], like=x)
        y = cubn.forward(x, state)
        jax.stream.synchronize()
        del x
        gc.collect()
        cubn.forward(other, state)
        jax.stream.synchronize()  # before the kernel has begun
        cupy.cuda.Stream.null.synchronize()
        assert (y.values() == expected).all()


def test_memory_of_jax_is_dropped_once_it_was_read(cupy, jax):
    x = jax.device_put(store())
    state = cubn.BatchNormState(SHAPE[1], like=x)
    before = exporter.alive()
    for _ in range(9):
        cubn.forward(jax.device_put(store()), state)
    assert exporter.alive() - before < 12


def test_capsules_that_two_threads_read_first_of_all_are_both_kept(monkeypatch):
    barrier, honest, there, readers = threading.Barrier(2), _weak.Leases.__init__, [], []

    def slow(self):
        honest(self)
        barrier.wait(60)  # both threads make one

    def read():
        capsule = _weak.Leases.__new__(_weak.Leases)  # or whatever else can be referred to
        there.append(weakref.ref(capsule))
        readers.append(capsules._kept_on(3, capsule))

    monkeypatch.setattr(_weak.Leases, "__init__", slow)
    both = [threading.Thread(target=read) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    gc.collect()
    assert all(reference() is not None for reference in there)
    del capsules._read_on[3]


def test_memory_that_xla_reads_late_is_not_used_again_meanwhile(cupy, jax):
    """JAX drops y once XLA has been told to read it, not once it has done so."""
    expected = cubn.forward(store(), cubn.BatchNormState(SHAPE[1]))
    elsewhere = []
    with cupy.lazily():
        x, other = jax.device_put(store()), jax.device_put(store(1))
        state = cubn.BatchNormState(SHAPE[1], like=x)
        y = cubn.forward(x, state)
        at = y._memory.data.ptr
        read = jax.read(y)
        del y
        gc.collect()
        jax.when_compiled_runs = lambda: elsewhere.append(cupy.empty(SHAPE, np.float32).data.ptr)
        again = cubn.forward(other, state)
        assert again._memory.data.ptr == at  # or this shows nothing
        assert at not in elsewhere  # another thread's, before XLA was asked
        cupy.cuda.Stream.null.synchronize()  # before XLA has read y
        assert (read.values() == expected).all()


def test_jax_gets_arrays_of_its_own(cupy, jax):
    device = new_device("jax")
    array = device.from_host(np.arange(float(C)))
    found = device.as_users(array)
    array[:] = 0
    assert type(found) is jax.Array
    assert (found.values() == np.arange(float(C))).all()


# --- memory and kernels -----------------------------------------------------------------------------------------------


def test_pytorch_gets_tensors_in_the_memory_of_its_own_allocator(cupy, torch):
    device = new_device("torch")
    memory = device.empty((3, C), "float64")
    found = device.as_users(memory[1:, :])
    assert found.dtype == torch.float64
    assert tuple(found.shape) == (2, C)
    assert list(found.strides) == [C, 1]
    assert found.data_ptr() == device.address(memory) + 8 * C
    at = memory.data.ptr
    del memory
    assert device.empty((3, C), "float64").data.ptr != at
    del found
    assert device.empty((3, C), "float64").data.ptr == at


def test_tensors_of_statistics_are_in_pytorchs_own_storage(cupy):
    """Not in a capsule's, of which its allocator, and so its graphs, know nothing."""
    torch = pytest.importorskip("torch")
    from cubn.torch._passes import backend_arrays

    owner = torch.arange(48, dtype=torch.uint8)
    memory = cupy.cuda.UnownedMemory(owner.data_ptr(), 48, owner, 0)
    array = cupy.ndarray((6,), "float64", cupy.cuda.MemoryPointer(memory, 0))
    for part, first in ((array, 0), (array[2:], 2)):
        found = backend_arrays.as_tensor(part)
        assert found.untyped_storage()._cdata == owner.untyped_storage()._cdata
        assert found.tolist() == owner.view(torch.float64)[first:].tolist()


@pytest.mark.parametrize("library", ["cupy", "torch", "jax"])
def test_a_new_thread_can_launch(cupy, torch, library):
    """It has no context at first."""
    device = new_device(library)
    mean = device.from_host(np.arange(float(C)))
    statistics_of(device, mean)
    errors = []

    def launch(*arguments):
        try:
            device.launch(*arguments)
        except Exception as error:
            errors.append(error)

    def launch_elsewhere(*arguments):
        thread = threading.Thread(target=launch, args=arguments)
        thread.start()
        thread.join()

    found = statistics_of(device, mean, launch_elsewhere)
    assert not errors
    assert (device.to_host(found) == np.arange(float(C))).all()


@pytest.mark.parametrize("library", ["cupy", "jax"])
def test_a_device_that_is_not_the_current_one(two, library):
    device = new_device(library, 1)
    streams = set()
    for _ in range(2):
        mean = device.from_host(np.arange(float(C)))
        found = statistics_of(device, mean)
        assert (device.to_host(device.beside([found.reshape(1, C)])) == np.arange(float(C))).all()
        device.wait_for(new_device(library, 0).stream())
        device.synchronize()
        streams.add(device.stream())
        with device.current() as handle:
            assert two.cuda.runtime.getDevice() == 1
            assert handle == device.stream().handle
        assert two.cuda.runtime.getDevice() == 0
        assert found.data.device_id == 1
    assert len(streams) == 1
    assert device.stream() is not new_device(library, 0).stream()


def test_threads_that_begin_at_once_have_one_device(cupy, monkeypatch):
    """With two of them, whose streams are not the same objects, no later call would be a short one."""
    from cubn.backends.cuda import cupy_device

    barrier, honest, found = threading.Barrier(2), cupy_device.limits_of, []

    def limits_of(index):
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(0.5)  # for the other one, if it may come here too
        return honest(index)

    monkeypatch.setattr(cupy_device, "limits_of", limits_of)
    both = [threading.Thread(target=lambda: found.append(backend_for((CUDA, 0), "cupy"))) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert found[0] is found[1]


def test_a_launch_makes_no_array_and_switches_nothing(cupy, monkeypatch):
    device = new_device()
    mean = device.zeros((C,), "float64")
    statistics_of(device, mean)
    launched = []

    class Recorded(type(device)):
        def launch(self, *arguments):
            with monkeypatch.context() as patch:
                patch.setattr(cupy, "ndarray", None)
                patch.setattr(cupy.cuda, "UnownedMemory", None)
                patch.setattr(cupy.cuda.Device, "__enter__", None)
                patch.setattr(cupy.cuda.Stream, "__enter__", None)
                super().launch(*arguments)
            launched.append(arguments)

    device.__class__ = Recorded
    statistics_of(device, mean)
    assert len(launched) == 1


def test_a_launch_that_interrupts_another_does_not_change_its_parameters(cupy, monkeypatch):
    """As a handler of a signal may, or a finalizer."""
    device = new_device()
    mean, other = device.from_host(np.arange(float(C))), device.zeros((C,), "float64")
    statistics_of(device, mean)
    inner, driver_launch = [], device._launch

    def interrupted(*arguments):
        if not inner:
            inner.append(None)
            inner.append(statistics_of(device, other))
        driver_launch(*arguments)

    monkeypatch.setattr(device, "_launch", interrupted)
    assert (device.to_host(statistics_of(device, mean)) == np.arange(float(C))).all()
    assert (device.to_host(inner[1]) == 0).all()


@pytest.mark.parametrize("strides", [None, (2, 1), (1, 6), (-3, 1), (0, 1)])
def test_a_copy_of_any_strides_needs_no_kernel_of_cupys(cupy, strides):
    from cubn.backends.cuda import host_copy, new_buffer

    memory = new_buffer((40,), (4,), np.float32, 0)
    memory.set(np.arange(40, dtype=np.float32))
    if strides is None:
        assert host_copy(0, (0, 3), (12, 4), np.dtype(np.float32), 0).shape == (0, 3)
        return
    host = np.arange(40, dtype=np.float32)
    expected = np.lib.stride_tricks.as_strided(host[12:], (3, 5), [4 * step for step in strides])
    found = host_copy(memory.data.ptr + 48, (3, 5), tuple(4 * step for step in strides), np.dtype(np.float32), 0)
    assert (found == expected).all()
    assert not cupy.own_kernels


@pytest.mark.parametrize("library", ["cupy", "torch", "jax"])
def test_arrays_without_elements(cupy, torch, library):
    device = new_device(library)
    for shape in ((0,), (0, 4), (3, 0)):
        for made in (device.empty(shape, "float64"), device.zeros(shape, "uint8"), device.from_host(np.empty(shape))):
            assert made.shape == shape
            assert device.to_host(made).shape == shape


def test_info_tells_of_the_other_devices_where_one_cannot_be_used(two, monkeypatch):
    from cubn.backends.cuda import cupy_device

    honest = cupy_device.limits_of

    def limits_of(index):
        if index:
            raise cubn.BackendUnavailable("cubn: CUDA device 1 has compute capability 7.0")
        return honest(index)

    monkeypatch.setattr(cupy_device, "limits_of", limits_of)
    found = cupy_device.settings()
    assert found["device 0"].startswith("stand-in, compute capability 9.0")
    assert found["device 1"] == "stand-in, not used: cubn: CUDA device 1 has compute capability 7.0"
    assert "kernels of device 1" not in found
