"""From torch's batch norms to cubn's and back, in a model as it is."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as _TorchBatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from cubn._state.arrays import STATISTICS
from cubn.errors import message, reporting_as
from cubn.sync import Comm, check_comm
from cubn.torch import fusion
from cubn.torch._batch_norm import NARROW, _BatchNorm
from cubn.torch._models import timm
from cubn.torch._models.permitted import at, check_model
from cubn.torch.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from cubn.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from cubn.torch.sync_batch_norm import SyncBatchNorm

ModelT = TypeVar("ModelT", bound=nn.Module)

COUNTERPARTS: dict[type[nn.Module], type[_BatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    nn.LazyBatchNorm1d: LazyBatchNorm1d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
    nn.LazyBatchNorm3d: LazyBatchNorm3d,
}
"""Of torch's classes."""

_HARMLESS = {"__init__", "__module__", "__doc__", "__qualname__", "__annotations__", "__parameters__", "__orig_bases__"}
_HARMLESS |= {"__firstlineno__", "__static_attributes__", "__annotate__", "__annotate_func__", "__annotations_cache__"}
_HARMLESS |= {"extra_repr", "__repr__", "__constants__"}
"""What a subclass may define and still be the batch norm it derives from."""


@reporting_as("convert")
def convert(model: ModelT, *, comm: Comm | None = None, fuse: bool = False) -> ModelT:
    """Let cubn compute every batch norm of a model.

    Each `torch.nn.BatchNorm1d`, 2d, 3d, `SyncBatchNorm` and lazy batch norm, the model itself included, becomes the one
    of `cubn.torch`. The module object stays and takes another class: parameters, buffers, hooks, flags, names, the keys
    of the state_dict, and whoever else holds the module, optimisers above all, see no other change.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place, at once or not at all.
    comm : mpi4py.MPI.Comm, torch.distributed.ProcessGroup, cubn.sync.Communicator or None
        Over which the converted batch norms are synchronised. With None none are but SyncBatchNorm's, over their
        process_group, or the default one where torch.distributed is initialised when they train.
    fuse : bool
        Also `cubn.torch.fuse` ReLU and residual additions into them, which logs what it fused.

    Returns
    -------
    model
        The one given.

    Raises
    ------
    TypeError
        If a batch norm's class has a behaviour of its own that is not known (timm's BatchNormAct2d is); if the model
        is or holds one that was compiled, scripted, or wrapped to be distributed.

    Notes
    -----
    What is no batch norm of torch's stays as it is: one of cubn's; torchvision's FrozenBatchNorm2d, which holds
    constants; a forward that calls `torch.nn.functional.batch_norm`.

    Examples
    --------
    >>> import cubn.torch
    >>> from torch import nn
    >>> model = cubn.torch.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    >>> type(model[1])
    <class 'cubn.torch.modules.BatchNorm2d'>
    >>> type(cubn.torch.restore(model)[1])
    <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    check_model(model)
    check_comm(comm)
    found = [
        (module, _counterpart(path, module))
        for path, module in model.named_modules()
        if isinstance(module, _TorchBatchNorm) and not isinstance(module, _BatchNorm)
    ]
    for module, cls in found:
        _adopt(module, cls, comm)
    if fuse:
        fusion.fuse(model)
    return model


@reporting_as("restore")
def restore(model: ModelT) -> ModelT:
    """Let torch compute every batch norm of a model again: `convert` and `fuse` undone.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place, at once or not at all. Batch norms that were made as cubn's become torch's too.

    Returns
    -------
    model
        The one given. The state_dict has the keys and values it had; `comm`, `skipped` and `freeze()` are gone.

    Raises
    ------
    TypeError
        If a module was made as one of cubn's that torch has no counterpart of, BatchNormReLU2d and the like.
    """
    check_model(model)
    origins = [
        (module, _origin(path, module)) for path, module in model.named_modules() if isinstance(module, _BatchNorm)
    ]
    fusion.unfuse(model)
    for module, cls in origins:
        _release(module, cls)
    return model


def _counterpart(path: str, module: nn.Module) -> type[_BatchNorm]:
    """The class of ours that behaves as the module does."""
    cls = type(module)
    ours = None if "forward" in vars(module) else COUNTERPARTS.get(_plain(cls)) or timm.counterpart(cls)
    if ours is None:
        rule = "have batch norms that behave as torch's do"
        remedy = "Put a batch norm of torch.nn, and what it does besides, in its place; or convert the parts around it."
        if parametrize.is_parametrized(module):
            remedy = "Convert the model before you register parametrizations."
        raise TypeError(message("model", rule, f"{_named(module)}{at(path)}", remedy))
    return ours


def _plain(cls: type) -> type:
    """The class it derives from, where it adds nothing to it."""
    while cls not in COUNTERPARTS and len(cls.__bases__) == 1 and vars(cls).keys() <= _HARMLESS:
        cls = cls.__bases__[0]
    return cls


def _origin(path: str, module: _BatchNorm) -> Any:
    """The class of torch's, or of whomever, that the module was or would have been."""
    if (origin := vars(module).get("_converted_from")) is not None:
        return origin if isinstance(module, LazyModuleMixin) else getattr(origin, "cls_to_become", origin)
    for theirs, ours in COUNTERPARTS.items():
        if vars(module).get("_unfused", type(module)) is ours:
            return theirs
    remedy = "Put a batch norm and what it does besides in its place."
    if parametrize.is_parametrized(module):
        remedy = "Call torch.nn.utils.parametrize.remove_parametrizations before."
    raise TypeError(message("model", "have batch norms that torch has", f"{_named(module)}{at(path)}", remedy))


def _adopt(module: Any, cls: type[_BatchNorm], comm: Comm | None) -> None:
    vars(module)["_converted_from"] = type(module)
    module.__class__ = cls
    module.register_buffer("skipped", None, persistent=False)
    module.comm = comm
    module._widen_statistics()
    module._forget_skipped()


def _release(module: _BatchNorm, cls: Any) -> None:
    del module.skipped
    for name in ("_ranks", "frozen", "_converted_from"):
        vars(module).pop(name, None)
    weight = module.weight
    if weight is not None and weight.dtype in NARROW:  # torch computes with statistics of its dtype alone
        for name in STATISTICS:
            if (tensor := module._buffers[name]) is not None:
                module._buffers[name] = tensor.to(weight.dtype)
    module.__class__ = cls


def _named(module: nn.Module) -> str:
    """As `a timm.layers.norm_act.BatchNormAct2d`."""
    cls = type(module)
    return f"a {cls.__module__}.{cls.__qualname__}" + (
        " with a forward of its own" if "forward" in vars(module) else ""
    )
