"""Modules that torch would put its own in the place of: `SyncBatchNorm.convert_sync_batchnorm` takes cubn's for
torch's, and gives back ones without their ReLU and without cubn, and not a word.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from torch import nn

from cubn.errors import a_type, message

_REPLACING = nn.SyncBatchNorm.convert_sync_batchnorm.__func__.__code__  # type: ignore[attr-defined]


class NotToBeReplaced:
    """The attribute `qconfig`, which that function asks each batch norm for, and which modules have once torch.ao has
    set it.
    """

    def __get__(self, module: nn.Module | None, cls: type) -> NoReturn:
        if sys._getframe(1).f_code is _REPLACING and module is not None:
            remedy = "Pass comm= to cubn.torch.convert; or call cubn.torch.restore before, to train by torch's."
            got = a_type(module)
            raise TypeError(
                message("module", "hold torch's batch norms", got, remedy, function="convert_sync_batchnorm")
            )
        raise AttributeError("qconfig")
