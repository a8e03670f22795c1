"""Batch normalisation for any array, with one answer to the bit.

`BatchNormState` holds parameters and running statistics; `forward` is inference, `forward_train` and `backward` are
training, `forward_frozen` is fine-tuning. `Moments` are the statistics of any set of samples, and merge.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cubn._moments import Moments
from cubn.backends.threads import get_num_threads, set_num_threads
from cubn.backward import backward, backward_start
from cubn.backward_from import backward_from
from cubn.double_backward import double_backward
from cubn.errors import BackendUnavailable, CollectiveMismatch, StateWarning
from cubn.fold import fold, fold_into
from cubn.forward import forward, forward_frozen, normalize
from cubn.forward_train import forward_train, forward_train_start
from cubn.gradients import DoubleGradients, Gradients, StatisticsGradients
from cubn.moments import finite_mask, moments, update
from cubn.saved import Saved
from cubn.state import BatchNormState
from cubn.sync.collective import Started, together
from cubn.warm_up import warm_up

if TYPE_CHECKING:
    from cubn import health
    from cubn.health.diagnose import diagnose
    from cubn.health.merging import merge_states
    from cubn.health.recalibration import recalibrate

__version__ = "0.1.0"

NUMERICS = 2
"""Version of the numerics contract: operations of one version give the same bits."""

__all__ = [
    "NUMERICS",
    "BackendUnavailable",
    "BatchNormState",
    "CollectiveMismatch",
    "DoubleGradients",
    "Gradients",
    "Moments",
    "Saved",
    "Started",
    "StateWarning",
    "StatisticsGradients",
    "backward",
    "backward_from",
    "backward_start",
    "diagnose",
    "double_backward",
    "finite_mask",
    "fold",
    "fold_into",
    "forward",
    "forward_frozen",
    "forward_train",
    "forward_train_start",
    "get_num_threads",
    "health",
    "merge_states",
    "moments",
    "normalize",
    "recalibrate",
    "set_num_threads",
    "together",
    "update",
    "warm_up",
]

_LATER = {
    "diagnose": "cubn.health.diagnose",
    "health": "cubn.health",
    "merge_states": "cubn.health.merging",
    "recalibrate": "cubn.health.recalibration",
}
"""What training does without, imported when it is first asked for: by name, its module."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_LATER[name])
    value = globals()[name] = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
