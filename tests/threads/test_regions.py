"""Calls within a parallel region of the runtime's, and what its threads are set to before and afterwards."""

import platform

import pytest

from tests.threads.programs import CHOICES, needs_torch, run

pytestmark = needs_torch

REGION = """
library = ctypes.CDLL(pool.choose().limited_by.file)

def region(body, kind=ctypes.CFUNCTYPE):
    "body(number) on every thread of a team of the runtime's, as Python; what they returned."
    found = {}

    def each(_):
        found[library.omp_get_thread_num()] = body()

    library.GOMP_parallel(kind(None, ctypes.c_void_p)(each), None, THREADS, 0)
    return [found[number] for number in sorted(found)]

"""


@pytest.mark.parametrize("choice", ["own", "auto"])
def test_within_a_region_of_torchs(choice):
    """On every thread of its team, where another region has one thread or, if they may nest, several."""
    run(
        REGION
        + """
assert same(train())
for levels in (1, 2):
    library.omp_set_max_active_levels(levels)
    for _ in range(3):
        assert region(lambda: same(train())) == [True] * THREADS
assert same(train())
""",
        **CHOICES[choice],
    )


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="asks for the mode as on x86-64")
def test_threads_of_a_team_have_their_own_modes_afterwards():
    """Those they had; where cubn's was the first region, those of the thread that entered it."""
    run(
        REGION
        + """
libm = ctypes.CDLL(None)
downward = 0x400

def modes():
    return region(libm.fegetround)

def flushes():
    return region(lambda: float(np.float32(1e-39) * np.float32(2.0**100)) == 0)

torch.set_flush_denormal(True)
libm.fesetround(downward)
assert same(train())
assert modes() == [downward] * THREADS, "threads that were started by a region of cubn's"
assert flushes() == [True] * THREADS
libm.fesetround(0)
torch.set_flush_denormal(False)
assert same(train())
assert modes() == [0, *[downward] * (THREADS - 1)]
assert flushes() == [False, *[True] * (THREADS - 1)]
""",
        **CHOICES["auto"],
    )
