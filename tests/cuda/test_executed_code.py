"""The machine code that NVIDIA's compiler makes gives the oracle's bits, and its instructions are counted rightly."""

import functools

import numpy as np
import pytest

from cubn.backends.cuda.backend import CudaBackend
from cubn.backends.cuda.plan import Launch
from cubn.backends.cuda.source import translation_unit
from tests.cuda import calls, nvrtc
from tests.cuda.machine.listing import disassembled, disassembler, parsed
from tests.cuda.machine.machine import Machine
from tests.cuda.machine.memory import Memory, OwnMemory
from tests.cuda.machine.registers import Unknown
from tests.cuda.named import NAMED
from tests.cuda_on_cpu.device import CpuDevice


@pytest.fixture(autouse=True)
def tools():
    try:
        nvrtc.library(13)
        disassembler()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@functools.lru_cache(64)
def code(source, kernel, options=()):
    return parsed(disassembled(nvrtc.cubin(source, options, 90)), kernel)


class MachineDevice(CpuDevice):
    """Executes machine code."""

    def launch(self, launch, parameters, *stream):
        of_kernel = code(translation_unit(launch.source), launch.kernel, launch.options)
        Machine(of_kernel, launch, parameters, OwnMemory(), 0, launch.grid).run()


SOME = {
    "resident, a row a thread",
    "resident, bits",
    "resident, channels, a cluster",
    "rows, few",
    "rows, tickets",
    "channels",
    "channels, tickets",
    "masked",
}
"""A layer of each kernel."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name in SOME else pytest.mark.slow) for name in NAMED]
)
def test_machine_code_gives_the_oracle_s_bits(name):
    layer, limits = NAMED[name]
    calls.check(CudaBackend(MachineDevice(limits)), layer)


LOOP = """
extern "C" __global__ void f(long long n, int* x) {
    int sum = 0;
    if (threadIdx.x % 32 < x[0]) {
#pragma unroll 1
        for (int i = 0; i < n; ++i) sum = sum * 3 ^ x[i + 1];
    }
    __syncthreads();
    if (sum == 12345) x[1] = sum;
}
"""


def counted(rounds, lanes):
    """Instructions of four warps in each phase, where so many lanes of each go so often through a loop."""
    memory = Memory({1 << 40: np.array([lanes, 1, 2, 3], np.int32)}, watched=1 << 40)
    launch = Launch("f", (), 1, 0, (), threads=128)
    parameters = rounds.to_bytes(8, "little") + (1 << 40).to_bytes(8, "little")
    return Machine(code(LOOP, "f"), launch, parameters, memory, 0, 1).run().all[0]


def test_a_loop_counts_as_often_as_it_goes_round():
    found = [counted(rounds, 32)[:, 0] for rounds in (4, 8, 12)]
    assert np.ptp(found, axis=1).tolist() == [0, 0, 0]
    assert (found[2] - found[1] == found[1] - found[0]).all() and (found[1] > found[0]).all()


def test_a_lane_counts_as_much_as_a_warp():
    assert (counted(8, 1)[:, 1] == counted(8, 32)[:, 1]).all()
    assert (abs(counted(8, 1) - counted(8, 32)) <= 1).all()
    assert (counted(8, 0)[:, 0] < counted(8, 1)[:, 0]).all()


TICKETS = """
extern "C" __global__ void f(int* taken, int* y) {
    __shared__ int ticket;
    if (threadIdx.x == 0) {
        ticket = atomicAdd(taken, 1);
        while (ticket == 0 && atomicAdd(taken, 0) < 3) __nanosleep(100);
    }
    __syncthreads();
    if (ticket == 1) y[threadIdx.x] = 1;
}
"""


def test_a_block_takes_its_ticket_and_another_waits_for_it():
    taken = np.zeros(1, np.uint32)
    memory = Memory({1 << 40: taken, 2 << 40: np.zeros(64, np.int32)}, watched=1 << 40, written=2 << 40)
    parameters = (1 << 40).to_bytes(8, "little") + (2 << 40).to_bytes(8, "little")
    launch = Launch("f", (), 3, 0, (), threads=64)
    counts = Machine(code(TICKETS, "f"), launch, parameters, memory, 0, 3).run()
    assert taken.tolist() == [3]
    assert counts.writes.tolist() == [[False, False], [False, True], [False, False]]


def test_an_unknown_instruction_is_an_error():
    of_kernel = parsed("\n.text.f:\n        /*0000*/   FROBNICATE R1, R2 ;\n", "f")
    with pytest.raises(Unknown, match="FROBNICATE"):
        Machine(of_kernel, Launch("f", (), 1, 0, (), threads=32), b"", None, 0, 1).run()
