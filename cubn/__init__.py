"""Batch normalisation for any array, with one answer to the bit.

`BatchNormState` holds parameters and running statistics; `forward` is inference, `forward_train` and `backward` are
training, `forward_frozen` is fine-tuning. `Moments` are the statistics of any set of samples, and merge.
"""

from cubn.backends.threads import get_num_threads, set_num_threads
from cubn.backward import Gradients, backward, backward_start
from cubn.convert import fold, fold_into
from cubn.errors import BackendUnavailable, CollectiveMismatch
from cubn.forward import Saved, forward, forward_frozen, forward_train, forward_train_start, normalize
from cubn.moments import Moments, moments, update
from cubn.state import BatchNormState
from cubn.sync.collective import Started, together

__version__ = "0.1.0"

NUMERICS = 1
"""Version of the numerics contract: operations of one version give the same bits."""

__all__ = [
    "NUMERICS",
    "BackendUnavailable",
    "BatchNormState",
    "CollectiveMismatch",
    "Gradients",
    "Moments",
    "Saved",
    "Started",
    "backward",
    "backward_start",
    "fold",
    "fold_into",
    "forward",
    "forward_frozen",
    "forward_train",
    "forward_train_start",
    "get_num_threads",
    "moments",
    "normalize",
    "set_num_threads",
    "together",
    "update",
]
