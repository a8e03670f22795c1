"""A backend's arrays as tensors, and back: the same memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cubn._types import BackendArray


def as_tensor(array: BackendArray) -> Tensor:
    if isinstance(array, np.ndarray):
        return torch.from_numpy(array)
    from cubn.backends.cuda.cupy_device import tensor_of

    tensor: Tensor = tensor_of(torch, array)
    return tensor


def from_tensor(tensor: Tensor) -> BackendArray:
    """Of a C-contiguous one."""
    if tensor.is_cpu:
        return tensor.numpy()
    from cubn.backends.cuda.cupy_device import view

    dtype: Any = str(tensor.dtype).removeprefix("torch.")
    return view(tensor.data_ptr(), tuple(tensor.shape), None, dtype, tensor, tensor.device.index)
