"""Batch normalisation for any array, with one answer to the bit.

`BatchNormState` holds parameters and running statistics; `forward` is inference, `forward_train` and `backward` are
training, `forward_frozen` is fine-tuning. `Moments` are the statistics of any set of samples, and merge.
"""

from cubn.backends.threads import get_num_threads, set_num_threads
from cubn.backward import Gradients, backward
from cubn.convert import fold, fold_into
from cubn.errors import BackendUnavailable
from cubn.forward import Saved, forward, forward_frozen, forward_train, normalize
from cubn.moments import Moments, moments, update
from cubn.state import BatchNormState

NUMERICS = 1
"""Version of the numerics contract: operations of one version give the same bits."""

__all__ = [
    "NUMERICS",
    "BackendUnavailable",
    "BatchNormState",
    "Gradients",
    "Moments",
    "Saved",
    "backward",
    "fold",
    "fold_into",
    "forward",
    "forward_frozen",
    "forward_train",
    "get_num_threads",
    "moments",
    "normalize",
    "set_num_threads",
    "update",
]
