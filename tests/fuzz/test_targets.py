"""Kernels compiled for older processors give the oracle's bits too."""

import llvmlite.binding as llvm
import pytest

from tests.fuzz.conftest import SHARES

TARGETS = {"nehalem": "", "ivybridge": "", "x86-64-v3": "", "generic": None}
"""NUMBA_CPU_NAME, and the features beside those of the name; None leaves them to cubn."""
LEAST = 60.0  # seconds in all for more than one of them, since all have kernels of their own to be compiled


@pytest.mark.skipif(not llvm.get_default_triple().startswith("x86_64"), reason="of another architecture")
@pytest.mark.parametrize("target", TARGETS)
def test_older_processors_give_the_oracle_s_bits(campaign, request, target):
    if request.config.getoption("fuzz_seconds") < LEAST and target != "nehalem":
        pytest.skip(f"needs --fuzz-seconds {LEAST:.0f} or more")
    features = {} if TARGETS[target] is None else {"NUMBA_CPU_FEATURES": TARGETS[target]}
    campaign(
        "valid_calls",
        share=(1 - sum(SHARES.values())) / len(TARGETS),
        environment={"NUMBA_CPU_NAME": target, **features},
    )
