"""The bits of a residual ReLU as a tensor, which autograd keeps, offloads and drops as it does x."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cubn.backends.protocol import ReluMask


def as_tensor(relu_mask: ReluMask) -> tuple[Tensor, Any]:
    """The bits, and what else is known of them."""
    memory = relu_mask[0]
    bits = (
        torch.from_numpy(memory.view(np.int16))
        if isinstance(memory, np.ndarray)
        else torch.utils.dlpack.from_dlpack(memory)
    )
    return bits, (type(relu_mask), relu_mask[2])


def as_relu_mask(bits: Tensor, of: Any) -> ReluMask:
    kind, layout = of
    memory = bits.numpy().view(np.uint16) if bits.is_cpu else _cupy_array(bits)
    return kind(memory, bits.data_ptr(), layout)


def _cupy_array(bits: Tensor) -> Any:
    import cupy

    return cupy.from_dlpack(bits)
