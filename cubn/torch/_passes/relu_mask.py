"""The bits of a residual ReLU as a tensor, which autograd keeps, offloads and drops as it does x."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from cubn.backends.protocol import ReluMask
from cubn.torch._passes import backend_arrays


def as_tensor(relu_mask: ReluMask) -> tuple[Tensor, Any]:
    """The bits, and what else is known of them."""
    memory = relu_mask[0]
    if memory.dtype == np.uint16:  # which torch hardly knows
        memory = memory.view(np.int16)
    return backend_arrays.as_tensor(memory), (type(relu_mask), relu_mask[2])


def as_relu_mask(bits: Tensor, of: Any) -> ReluMask:
    kind, layout = of
    return kind(backend_arrays.from_tensor(bits), bits.data_ptr(), layout)
