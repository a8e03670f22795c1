"""A backend's arrays as tensors, and back: the same memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cubn._types import BackendArray

_NO_WAITING = -1  # a stream's number in DLPack: both libraries work on PyTorch's


def as_tensor(array: BackendArray) -> Tensor:
    if isinstance(array, np.ndarray):
        return torch.from_numpy(array)
    return torch.utils.dlpack.from_dlpack(array.__dlpack__(stream=_NO_WAITING))


def from_tensor(tensor: Tensor) -> BackendArray:
    """Of a C-contiguous one."""
    if tensor.is_cpu:
        return tensor.numpy()
    from cubn.backends.cuda.cupy_device import view

    dtype: Any = str(tensor.dtype).removeprefix("torch.")
    return view(tensor.data_ptr(), tuple(tensor.shape), None, dtype, tensor, tensor.device.index)
