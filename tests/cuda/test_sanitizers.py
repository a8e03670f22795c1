"""The named layers under sanitizers: no access outside an array, none misaligned, nothing undefined, no race."""

import pytest

from tests.cuda.named import NAMED
from tests.cuda_on_cpu import sanitized
from tests.cuda_on_cpu.build import ADDRESS, THREAD

SOME = {
    ADDRESS: [
        "resident, a cluster",
        "resident, four rows",
        "resident, a row by lanes",
        "resident, torn channels",
        "resident, a row a thread",
        "resident, bits of all channels",
        "resident, off a vector",
        "resident, values",
        "resident, channels, a cluster",
        "resident, channels, without clusters",
        "resident, channels, most of a multiprocessor",
        "resident, channels, positions apart",
        "rows, odd, one sample",
        "rows, odd, large",
        "rows, tickets, groups",
        "channels, odd",
        "channels, off a vector",
        "values",
        "values, tickets",
        "strided, rows apart",
        "masked",
    ],
    THREAD: [
        "resident, a cluster",
        "resident, four rows",
        "resident, a row by lanes",
        "resident, torn channels",
        "resident, a row a thread",
        "resident, values",
        "resident, channels, a cluster",
        "rows, few",
        "rows, tickets",
        "channels, two rows",
        "channels, tickets",
        "values",
        "masked",
    ],
}
"""A layer of each kernel; the others are slow."""


def check(sanitizer, names):
    if reason := sanitized.unavailable(sanitizer):
        pytest.skip(reason)
    process = sanitized.run(["-m", "tests.cuda.named", *names], sanitizer, timeout=1200)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize("sanitizer", SOME)
def test_some_layers_are_clean(sanitizer):
    check(sanitizer, SOME[sanitizer])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("sanitizer", SOME)
def test_every_layer_is_clean(sanitizer, name):
    check(sanitizer, [name])
