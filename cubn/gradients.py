"""What a backward returns."""

from __future__ import annotations

from typing import Any, Generic, NamedTuple

from cubn._arguments import shown
from cubn.typing import ArrayT_co


class Gradients(NamedTuple, Generic[ArrayT_co]):
    """Gradients of a loss, from `backward`.

    Attributes
    ----------
    dx : array like x
    dgamma, dbeta : array of shape (C,) in gamma's and beta's dtype and library; None where the state has none
    dresidual : array like x; None where there was no residual
    """

    dx: ArrayT_co
    dgamma: Any
    dbeta: Any
    dresidual: ArrayT_co | Any  # whoever gave a residual need not ask whether it is None

    def __repr__(self) -> str:
        return _repr(self)


class StatisticsGradients(NamedTuple, Generic[ArrayT_co]):
    """Gradients of a loss by given statistics too, from `backward(..., statistics=True)`.

    Attributes
    ----------
    dx, dgamma, dbeta, dresidual
        As in `Gradients`.
    dmean, dvar : array of shape (C,) in running_mean's dtype and library
    """

    dx: ArrayT_co
    dgamma: Any
    dbeta: Any
    dresidual: ArrayT_co | Any
    dmean: Any
    dvar: Any

    def __repr__(self) -> str:
        return _repr(self)


class DoubleGradients(NamedTuple, Generic[ArrayT_co]):
    """Gradients of a scalar that depends on what a backward returned, from `double_backward`.

    Attributes
    ----------
    ddy, dx : array like x
        By the dy that the backward was given, and by x.
    dgamma : array of shape (C,) in gamma's dtype and library; None where the state has none
    """

    ddy: ArrayT_co
    dx: ArrayT_co
    dgamma: Any

    def __repr__(self) -> str:
        return _repr(self)


def _repr(gradients: Gradients[Any] | StatisticsGradients[Any] | DoubleGradients[Any]) -> str:
    arrays = ", ".join(f"{name}={shown(array)}" for name, array in gradients._asdict().items())
    return f"{type(gradients).__name__}({arrays})"
