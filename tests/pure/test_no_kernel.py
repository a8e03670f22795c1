"""What keeps kernels out of these tests sees one."""

import numpy as np
import pytest

import cubn
from cubn.backends.cpu.compile import compiled
from tests.pure.conftest import MOVE


@pytest.mark.parametrize(
    "compute",
    [
        lambda: cubn.moments(np.ones((2, 3))),
        lambda: cubn.forward(np.ones((2, 3), np.float32), cubn.BatchNormState(3)),
        lambda: compiled("a kernel that nobody has", lambda: lambda parameters, worker: None),
    ],
    ids=["moments", "forward", "a kernel by itself"],
)
def test_a_test_that_needs_a_kernel_fails(compute):
    with pytest.raises(pytest.fail.Exception, match=MOVE):
        compute()
