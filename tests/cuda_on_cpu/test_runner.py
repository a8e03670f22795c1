"""The runner itself: correct kernels give their results in any order of threads, and every planted fault is caught."""

import concurrent.futures
import re
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from tests.cuda_on_cpu import build, sanitized
from tests.cuda_on_cpu.build import ADDRESS, THREAD
from tests.cuda_on_cpu.planted import FAULTS, launch
from tests.cuda_on_cpu.runner import LaunchError, Module, Order, shuffled

pytestmark = pytest.mark.skipif(bool(build.unavailable()), reason=build.unavailable())

KERNELS = ["warps", "reverse", "total", "exchange"]
ORDERS = [*range(8), *map(shuffled, range(4))]

# Fault by fault, what catches it: the launch's error, a result that is another in some order, or a sanitizer's report.
STOPPED = {
    ("warps", "two_masks"): r"barrier divergence in block .*: 16 .* at a warp barrier .*, 16 .* at a warp barrier",
    ("warps", "two_operations"): r"barrier divergence in block .*: 1 .* at a warp barrier .*, 31 .* at a warp barrier",
    ("reverse", "half_barrier"): r"__syncthreads at different places in block \(0,0,0\): 32 threads .*, 32 threads",
    ("reverse", "two_barriers"): r"__syncthreads at different places in block \(0,0,0\): 32 threads .*, 32 threads",
    (
        "reverse",
        "return_before_barrier",
    ): r"barrier divergence in block .*: 32 threads at __syncthreads .*exited",
    ("reverse", "stopped"): r"__trap, thread \(5,0,0\), in block .*1 thread stopped \(reverse\.cu:\d+\)",
    ("exchange", "no_barrier_after"): r"cluster_map of a block that has exited",
    ("exchange", "bad_rank"): r"cluster_map of a rank outside the cluster",
    ("exchange", "bad_address"): r"cluster_map of an address outside shared memory",
    ("exchange", "one_block_absent"): r"barrier divergence between blocks: .*64 threads exited; .*at cluster_sync",
}
ANOTHER_RESULT = [
    ("reverse", "no_barrier"),
    ("reverse", "uninitialized"),
    ("reverse", "early_write"),
    ("exchange", "no_barrier_before"),
    ("exchange", "read_after_exit"),
    ("exchange", "early_write"),
]
REPORTED = [
    ("reverse", "global_overrun", ADDRESS, "heap-buffer-overflow"),
    ("reverse", "global_underrun", ADDRESS, "heap-buffer-overflow"),
    ("reverse", "static_overrun", ADDRESS, "use-after-poison"),
    ("reverse", "dynamic_overrun", ADDRESS, "use-after-poison"),
    ("reverse", "misaligned", ADDRESS, "store to misaligned address"),
    ("exchange", "read_after_exit", ADDRESS, "use-after-poison"),
    ("warps", "no_syncwarp", THREAD, "data race"),
    ("reverse", "no_barrier", THREAD, "data race"),
    ("reverse", "early_write", THREAD, "data race"),
    ("reverse", "overlapping_writes", THREAD, "data race"),
    ("total", "no_fence_before", THREAD, "data race"),
    ("total", "no_fence_after", THREAD, "data race"),
    ("total", "plain_ticket", THREAD, "data race"),
    ("exchange", "no_barrier_before", THREAD, "data race"),
    ("exchange", "early_write", THREAD, "data race"),
]


def pointers(*arrays):
    return [struct.pack("P", array.ctypes.data) for array in arrays]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_correct_kernels_in_every_order(kernel, order):
    assert launch(kernel, order=order)


def test_orders():
    source = """
    extern "C" __global__ void arrive(int* y, unsigned* n) {
        y[atomicAdd(n, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
    }"""
    module = Module(source, "arrive")

    def arrivals(order):
        y, n = np.full(7 * 96, -1, np.int32), np.zeros(1, np.uint32)
        module.launch((7,), (96,), pointers(y, n), order=order, workers=1)
        return y.reshape(7, 3, 32)

    ascending = np.arange(7 * 96).reshape(7, 3, 32)
    for order in range(8):
        bits = [Order.REVERSED_BLOCKS, Order.REVERSED_WARPS, Order.REVERSED_LANES]
        reversed_axes = [axis for axis, bit in enumerate(bits) if order & bit]
        np.testing.assert_array_equal(arrivals(order), np.flip(ascending, reversed_axes))
    mixed = [arrivals(shuffled(seed)) for seed in range(4)]
    for y in mixed:
        np.testing.assert_array_equal(np.sort(y, axis=None), ascending.reshape(-1))
        places = [np.sort(y // 96 % 7, axis=0)[:, 0, 0], y[0, :, 0] // 32 % 3, y[0, 0] % 32]
        assert [len(set(place.tolist())) for place in places] == [7, 3, 32]
    for level in (lambda y: y[:, 0, 0] // 96, lambda y: y[0, :, 0] // 32 % 3, lambda y: y[0, 0] % 32):
        assert len({tuple(level(y).tolist()) for y in mixed}) > 1


@pytest.mark.parametrize(("kernel", "fault"), STOPPED)
def test_faults_that_stop_a_launch(kernel, fault):
    with pytest.raises(LaunchError, match=STOPPED[kernel, fault]):
        launch(kernel, fault)


def test_a_launch_reports_its_first_block_to_fail():
    source = """
    extern "C" __global__ void fail(unsigned first) {
        if (blockIdx.x >= first) __trap();
    }"""
    module = Module(source, "fail")
    for first in [0, 1, 2, 5] * 25:
        with pytest.raises(LaunchError, match=rf"in block \({first},0,0\)"):
            module.launch((8,), (32,), [struct.pack("I", first)], workers=3)


@pytest.mark.parametrize(("kernel", "fault"), ANOTHER_RESULT)
def test_faults_that_show_in_some_order(kernel, fault):
    results = [launch(kernel, fault, order) for order in ORDERS]
    assert not all(results)


@pytest.mark.parametrize(("kernel", "fault", "sanitizer", "report"), REPORTED)
def test_faults_that_a_sanitizer_reports(kernel, fault, sanitizer, report):
    require(sanitizer)
    process = sanitized.run(["-m", "tests.cuda_on_cpu.planted", kernel, fault, "0"], sanitizer)
    assert process.returncode != 0
    assert report in process.stderr
    assert re.search(rf"{kernel}\.cu:\d+", process.stderr)


@pytest.mark.parametrize("sanitizer", [ADDRESS, THREAD])
@pytest.mark.parametrize("kernel", KERNELS)
def test_correct_kernels_are_clean(kernel, sanitizer):
    require(sanitizer)
    process = sanitized.run(["-m", "tests.cuda_on_cpu.planted", kernel, "none", str(shuffled(1))], sanitizer)
    assert (process.returncode, process.stderr) == (0, "")


def require(sanitizer):
    if reason := sanitized.unavailable(sanitizer):
        pytest.skip(reason)


def test_every_fault_is_tested():
    planted = set()
    for kernel in KERNELS:
        listed = re.search(r"constexpr int none = 0,(.*?);", (FAULTS / f"{kernel}.cu").read_text(), re.DOTALL)
        planted |= {(kernel, fault) for fault in re.findall(r"(\w+) = \d", listed[1])}
    assert planted == {*STOPPED, *ANOTHER_RESULT, *((kernel, fault) for kernel, fault, _, _ in REPORTED)}


@pytest.mark.parametrize("order", [0, 7, shuffled(5)])
def test_builtins(order):
    t = np.arange(44, dtype=np.uint64)
    lane, first = t % 32, t // 32 * 32
    last = np.where(t < 32, 31, 43)

    def ballot(predicate, mask=0xFFFFFFFF):
        bits = [sum(1 << (u - w) for u in range(w, min(w + 32, 44)) if predicate(u)) & mask for w in (0, 32)]
        return np.where(t < 32, *bits)

    def bits(values, dtype):
        return values.view(dtype).astype(np.uint64)

    absent = 0xFFFFFFFF  # what a lane gives that is not there
    down = np.where(lane % 8 < 6, t + 2, t)
    single = np.float32(0.1) * t.astype(np.float32)
    expected = [
        first + 3,
        t // 8 * 8 + 1,
        np.where(lane < 2, t, t - 2),
        np.where(lane % 8 < 2, t, t - 2),
        np.where(down > last, absent, down),
        t ^ 1,
        bits(1.5 * (t ^ 2), np.uint64),
        0x7F800001 + first,
        (1 << 40) + first + 1,
        np.where(t % 2 == 1, t ^ 2, ballot(lambda u: u % 4 == 0, 0x55555555)),
        ballot(lambda u: u % 3 == 0),
        t >= 32,
        t < 32,
        np.full(44, 9),
        np.ones(44),
        np.zeros(44),
        [int(u).bit_count() + 100 * (64 - int(u)) for u in t],
        [32 - int(u).bit_length() + 100 * (64 - int(u).bit_length()) for u in t],
        [(int(u) & -int(u)).bit_length() + 100 * (int(u) + 1) for u in t],
        [int(f"{u:032b}"[::-1], 2) for u in t],
        [int(f"{u:064b}"[::-1], 2) for u in t],
        [(int(u) << 28 & 0xFFFFFFFF) * 48 >> 32 for u in t],
        [((int(u) << 60) % (1 << 64)) * 48 >> 64 for u in t],
        [((1 << 32 | int(u)) >> (int(u) & 31)) % (1 << 32) + 2 * int(u) + 1 for u in t],
        np.minimum(t, 20) + 100 * np.maximum(t, 30),
        bits(np.minimum(0.5 * t, 7.0), np.uint64),
        bits(single + np.float32(0.3), np.uint32),
        bits((np.float64(np.float32(0.1)) * t + np.float64(np.float32(0.3))).astype(np.float32), np.uint32),
        t + 3 + 8 + 16 + 16,
    ]
    rows = np.zeros((len(expected), 64), np.uint64)
    counters = np.array([0, 0, 1000, 0, absent, 0, 0, 0, 44, 0, 0], np.uint32)
    module = Module((Path(__file__).parent / "builtins.cu").read_text(), "builtins")
    module.launch((1,), (44,), pointers(rows, counters), order=order)
    for number, (row, values) in enumerate(zip(rows, expected, strict=True)):
        np.testing.assert_array_equal(row[:44], np.asarray(values, np.uint64), err_msg=f"row {number}")
    assert not rows[:, 44:].any()
    assert counters.tolist() == [946, 43, 0, absent, 0, int(np.bitwise_xor.reduce(t)), 4, 6, 0, 1, 77]


def test_three_dimensions():
    source = """
    extern "C" __global__ void where(int4* y) {
        const int t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
        const int b = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
        y[b * 24 + t] = make_int4(t, threadIdx.y + 10 * threadIdx.z, b, blockIdx.y + 10 * blockIdx.z);
    }"""
    y = np.full((30, 24, 4), -1, np.int32)
    Module(source, "where").launch((5, 3, 2), (4, 3, 2), pointers(y), order=shuffled(9))
    b, t = np.indices((30, 24))
    expected = [t, t // 4 % 3 + 10 * (t // 12), b, b // 5 % 3 + 10 * (b // 15)]
    np.testing.assert_array_equal(y, np.stack(expected, -1))


def test_arguments():
    source = """
    struct Pair { signed char a; double b; };
    extern "C" __global__ void arguments(double* y, signed char c, const Pair pair, float f) {
        y[0] = c + pair.a + pair.b + f;
    }"""
    y = np.zeros(1)
    module = Module(source, "arguments")
    good = [struct.pack("P", y.ctypes.data), b"\xff", struct.pack("bxxxxxxxd", 20, 0.5), np.float32(1000)]
    module.launch((1,), (1,), good)
    assert y[0] == 1019.5
    sizes = re.escape("(8, 1, 16, 4)")
    with pytest.raises(TypeError, match=rf"arguments: the kernel takes arguments of {sizes} bytes; got \(8, 1, 16\)"):
        module.launch((1,), (1,), good[:3])
    with pytest.raises(TypeError, match=rf"takes arguments of {sizes} bytes; got \(8, 1, 16, 8\)"):
        module.launch((1,), (1,), [*good[:3], np.float64(1000)])


@pytest.mark.parametrize(
    ("grid", "block", "options", "message"),
    [
        ((0,), (32,), {}, "the grid is empty"),
        ((1, 65536), (32,), {}, "the grid is too large"),
        ((1,), (32, 0), {}, "the block is empty"),
        ((1,), (1025,), {}, "the block is too large"),
        ((1,), (1, 1, 65), {}, "the block is too large"),
        ((6,), (32,), {"cluster": 4}, "the grid is no multiple of the cluster"),
        ((16,), (32,), {"cluster": 16}, "a cluster has 1 to 8 blocks"),
        ((1,), (32,), {"shared_bytes": 227 * 1024 - 399}, "too much shared memory"),
    ],
)
def test_refused_launches(grid, block, options, message):
    source = """extern "C" __global__ void idle() { __shared__ int few[100]; few[threadIdx.x % 100] = 1; }"""
    module = Module(source, "idle")
    module.launch((8,), (32,), [], shared_bytes=227 * 1024 - 400, cluster=8)
    with pytest.raises(LaunchError, match=rf"idle.*{message}"):
        module.launch(grid, block, [], **options)


def test_static_shared_memory_has_a_limit():
    source = """extern "C" __global__ void large() { __shared__ char s[49153]; s[threadIdx.x] = 1; }"""
    with pytest.raises(LaunchError, match="too much static shared memory"):
        Module(source, "large").launch((1,), (32,), [])


def test_grid_sync():
    source = """
    extern "C" __global__ void neighbours(int* x, int* y) {
        x[blockIdx.x] = blockIdx.x + 1;
        grid_sync();
        y[blockIdx.x] = x[(blockIdx.x + 1) % gridDim.x];
    }"""
    module = Module(source, "neighbours")
    for order in ORDERS:
        x, y = np.zeros((2, 7), np.int32)
        module.launch((7,), (33,), pointers(x, y), cooperative=True, order=order)
        assert y.tolist() == [2, 3, 4, 5, 6, 7, 1]
    with pytest.raises(LaunchError, match="grid_sync in a launch that is not cooperative"):
        module.launch((7,), (33,), pointers(x, y))


def test_lane_outside_its_mask():
    source = """extern "C" __global__ void outside() { __syncwarp(0xff); }"""
    with pytest.raises(LaunchError, match=r"a lane that is not in its own mask, thread \(8,0,0\)"):
        Module(source, "outside").launch((1,), (32,), [])


@pytest.mark.slow
def test_a_wait_without_end_is_stopped():
    source = """extern "C" __global__ void lonely(unsigned* y) { while (atomicAdd(y, 0) == 0) __nanosleep(100); }"""
    y = np.zeros(1, np.uint32)
    with pytest.raises(LaunchError, match="a wait for other blocks that does not end"):
        Module(source, "lonely").launch((1,), (32,), pointers(y))


def test_shared_declarations():
    source = """
    template <class A, int n> struct Pair { A a[n]; };
    extern __shared__ __align__(16) unsigned char dynamic_bytes[];  // after a comment
    template <int n> __device__ float* place() {
        __shared__ alignas(16) float table[n][n + 1];
        return &table[n - 1][n];
    }
    extern "C" __global__ void declarations(long long* y) {
        __shared__ Pair<float, 4> pair;
        __shared__ __align__(8) unsigned short counts[3][5];
        __shared__ bool flag;
        long long at[] = {(long long)&pair, (long long)counts, (long long)&flag, (long long)place<3>(),
                          (long long)place<4>(), (long long)dynamic_bytes};
        for (int i = 0; i < 6; ++i) y[i] = at[i];
        y[6] = sizeof pair + 100 * sizeof counts + 10000 * sizeof flag;
        y[7] = counts[2][4] + (__float_as_uint(*place<3>()) == ~0u) + (dynamic_bytes[63] == 0xff);
    }"""
    y = np.zeros(8, np.int64)
    Module(source, "declarations").launch((1,), (1,), pointers(y), shared_bytes=64)
    assert len(set(y[:6].tolist())) == 6
    assert y[6:].tolist() == [16 + 3000 + 10000, 0xFFFF + 2]
    assert y[5] % 128 == 0


def test_compile_errors_name_the_line():
    with pytest.raises(build.CompileError, match=r"header\.cuh:8:.*nonsense"):
        Module('#line 7 "header.cuh"\n\nnonsense;\nextern "C" __global__ void k() {}', "k")


def test_no_float_atomics():
    with pytest.raises(build.CompileError, match="atomics are for 32- and 64-bit integers"):
        Module('extern "C" __global__ void k(float* y) { atomicAdd(y, 1.0f); }', "k")


def test_no_large_frames():
    with pytest.raises(build.CompileError, match="frame size"):
        Module('extern "C" __global__ void k(int* y) { volatile int a[20000]; a[*y] = 1; *y = a[7]; }', "k")


def test_sanitized_kernels_need_a_sanitized_process():
    with pytest.raises(RuntimeError, match=r"runs in a process that sanitized\.run\(\) starts"):
        Module('extern "C" __global__ void k() {}', "k", sanitizer=THREAD)


def test_threads_may_build_and_launch_at_once():
    def one(_):
        source = f"""
        // {time.time()}
        extern "C" __global__ void count(unsigned* y) {{ atomicAdd(y, 1); __syncthreads(); atomicAdd(y + 1, *y); }}"""
        module = Module(sources.setdefault("one", source), "count")
        y = np.zeros(2, np.uint32)
        for _ in range(20):
            module.launch((1,), (64,), pointers(y))
        return y.tolist()

    sources = {}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(8))) == [[1280, 64 * 64 * 210]] * 8


def test_subnormals_are_kept():
    torch = pytest.importorskip("torch")
    y = np.array([1e-40], np.float32)
    module = Module('extern "C" __global__ void half(float* y) { *y = 0.5f * *y; }', "half")
    torch.set_flush_denormal(True)
    try:
        module.launch((1,), (1,), pointers(y))
    finally:
        torch.set_flush_denormal(False)
    assert y[0] == np.float32(0.5e-40)
