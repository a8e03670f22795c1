"""The types of arguments: arrays of any library, and options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from cubn.sync import Comm

__all__ = [
    "AnyArray",
    "ArrayT",
    "Comm",
    "DType",
    "Like",
    "OnSingle",
    "ParameterGradients",
    "Renorm",
    "RunningVariance",
    "Sizes",
    "SupportsDLPack",
]


class SupportsDLPack(Protocol):
    """An array of NumPy, CuPy, PyTorch, JAX, or any other library that speaks DLPack."""

    def __dlpack__(self) -> Any: ...

    # and __dlpack_device__, but JAX's types do not say that its arrays have it


ArrayT = TypeVar("ArrayT", bound=SupportsDLPack)
"""One library's array type: what comes in as one goes out as one."""

Like: TypeAlias = ArrayT | NDArray[Any]
"""An array that goes with an ArrayT: of its library. (NumPy calls float32 divided by an int float64, in its types.)"""

ArrayT_co = TypeVar("ArrayT_co", bound=SupportsDLPack, covariant=True)

AnyArray = SupportsDLPack | NDArray[np.bool_]
"""An array of bools too: NumPy's types do not say that they can be exported."""

ParameterGradients = Literal["local", "global"]
OnSingle = Literal["raise", "running"]
RunningVariance = Literal["unbiased", "biased"]
DTypeName = Literal["float32", "float64"]


class _TorchDType(Protocol):
    """torch.dtype."""

    @property
    def is_floating_point(self) -> bool: ...

    @property
    def is_complex(self) -> bool: ...


DType = DTypeName | type[np.float32] | type[np.float64] | np.dtype[np.float32] | np.dtype[np.float64] | _TorchDType
"""The name of a dtype that a state can have, or a library's own; of PyTorch's any, for its types tell none apart."""

Renorm = tuple[float, float]
"""(r_max, d_max): limits of batch renormalisation."""

Sizes = Sequence[int] | NDArray[np.integer[Any]]
"""The samples of each rank."""
