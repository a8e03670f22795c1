"""What a block waits for when a channel's root is known: arithmetic, not memory. In NVIDIA's PTX, without a driver."""

import re

import pytest

from cubn.backends.cuda.source import translation_unit
from tests.cuda import nvrtc
from tests.cuda.specialisations import specialisations

ARCHITECTURE = 90
BARRIER = re.compile(r"\bbar(?:rier)?\.(?:sync|cluster\.wait)")
ENDS = re.compile(rf"{BARRIER.pattern}|\bst\.global\.v")
ROOT = {"Moments": "sqrt.rn.f64", "Sums": "div.rn.f64"}
"""What only coefficients need, of statistics and of a gradient's sums."""


def waited_for(ptx, mark):
    """From the last barrier before the mark to the next barrier, or until coefficients are stored, as vectors."""
    at = ptx.index(mark)
    start = max((found.end() for found in BARRIER.finditer(ptx, 0, at)), default=0)
    end = ENDS.search(ptx, at)
    return ptx[start : end.start()]


def what_of(specialisation):
    values = specialisation.values
    return values.get("KIND") or ("Moments" if values["OPERATION"] == "NORMALIZE" else "Sums")


@pytest.mark.parametrize("what", ROOT)
@pytest.mark.parametrize("kernel", ["slab", "slab_channels", "finish"])
def test_nothing_is_loaded_between_a_root_and_its_coefficients(kernel, what):
    try:
        nvrtc.library(13)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    found = next(s for s in specialisations() if s.kernel == kernel and what_of(s) == what)
    ptx = nvrtc.compile(translation_unit(found.source), found.options, ARCHITECTURE)[kernel].ptx
    assert "ld.global" not in waited_for(ptx, ROOT[what])
