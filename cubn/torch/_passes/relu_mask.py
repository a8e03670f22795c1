"""The bits of a residual ReLU as a tensor, which autograd keeps, offloads and drops as it does x."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cubn.backends.protocol import ReluMask
from cubn.errors import message
from cubn.torch._passes import backend_arrays

_DTYPES = torch.int16, torch.uint8
"""Those of the backends."""


def as_tensor(relu_mask: ReluMask) -> tuple[Tensor, Any]:
    """The bits, and what else is known of them."""
    memory = relu_mask[0]
    if memory.dtype == np.uint16:  # which torch hardly knows
        memory = memory.view(np.int16)
    bits = backend_arrays.as_tensor(memory)
    return bits, (type(relu_mask), relu_mask[2], bits.nbytes)


def as_relu_mask(bits: Tensor, of: Any) -> ReluMask:
    """From bits, or from such as hooks on saved tensors brought back."""
    kind, layout, nbytes = of
    if bits.dtype not in _DTYPES or bits.nbytes < nbytes:
        got = f"{bits.dtype} {tuple(bits.shape)}"
        remedy = "Hooks on saved tensors must leave shape and dtype."
        raise ValueError(message("bits of the ReLU", "be as the forward left them", got, remedy, function="backward"))
    bits = bits.contiguous()
    return kind(backend_arrays.from_tensor(bits), bits.data_ptr(), layout)
