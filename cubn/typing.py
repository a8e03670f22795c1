"""The types of arguments: arrays of any library, and options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from cubn.sync import Communicator

__all__ = [
    "ArrayT",
    "Comm",
    "DType",
    "Mask",
    "ParameterGradients",
    "RunningVariance",
    "Sizes",
    "SupportsDLPack",
]


class SupportsDLPack(Protocol):
    """An array of NumPy, CuPy, PyTorch, JAX, or any other library that speaks DLPack."""

    # What JAX's types say that its arrays have. `__dlpack_device__`, which they have too, is not among it.
    def __dlpack__(self) -> Any: ...


ArrayT = TypeVar("ArrayT", bound=SupportsDLPack)
"""One library's array type: what comes in as one goes out as one."""

ArrayT_co = TypeVar("ArrayT_co", bound=SupportsDLPack, covariant=True)

Mask = SupportsDLPack | NDArray[np.bool_]  # of bools NumPy does not say that they can be exported

ParameterGradients = Literal["local", "global"]
RunningVariance = Literal["unbiased", "biased"]
DTypeName = Literal["float32", "float64"]


class _TorchDType(Protocol):
    @property
    def is_floating_point(self) -> bool: ...

    @property
    def is_complex(self) -> bool: ...


DType = DTypeName | type[np.float32] | type[np.float64] | np.dtype[np.float32] | np.dtype[np.float64] | _TorchDType


class _MPIComm(Protocol):
    def Get_rank(self) -> int: ...

    def Get_size(self) -> int: ...

    def Is_inter(self) -> bool: ...


class _ProcessGroup(Protocol):
    def rank(self) -> int: ...

    def size(self) -> int: ...


Comm = Communicator | _MPIComm | _ProcessGroup
"""A communicator: cubn.sync.Communicator, mpi4py.MPI.Comm or torch.distributed.ProcessGroup."""

Sizes = Sequence[int] | NDArray[np.integer[Any]]
"""The samples of each rank."""
