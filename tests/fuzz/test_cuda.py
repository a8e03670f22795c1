"""The CUDA backend gives the oracle's bits, whatever the device it plans for."""

import pytest

from tests.cuda_on_cpu.build import unavailable

LEAST = 60.0  # seconds in all; every case has kernels to be compiled


def test_the_cuda_backend_gives_the_oracle_s_bits(campaign, request):
    if reason := unavailable():
        pytest.skip(reason)
    if request.config.getoption("fuzz_seconds") < LEAST:
        pytest.skip(f"needs --fuzz-seconds {LEAST:.0f} or more")
    campaign("cuda")
