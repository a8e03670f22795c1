"""Batch norms made part of the weights of the layers before them, for inference."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils import _pytree

from cubn.errors import message, reporting_as
from cubn.fold import fold_into
from cubn.state import BatchNormState
from cubn.torch._batch_norm import _BatchNorm as _CubnBatchNorm
from cubn.torch._models import timm
from cubn.torch._models.permitted import check_model
from cubn.torch._models.report import Report
from cubn.torch._models.tracing import Calls, Site
from cubn.torch.conversion import COUNTERPARTS

ModelT = TypeVar("ModelT", bound=nn.Module)

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@reporting_as("fold")
def fold(model: ModelT, example: Any = None) -> tuple[ModelT, Report]:
    """A copy of a model in which convolutions and linear layers do the batch norm after them too.

    weight' = weight * scale and bias' = bias * scale + shift, as `cubn.fold_into` computes them, wherever torch.fx
    proves that a batch norm alone reads what a layer gives.

    Parameters
    ----------
    model : torch.nn.Module
        In eval mode; not changed. Its batch norms may be torch's or cubn's, fused ones too.
    example : Tensor or tuple of Tensor, optional
        Arguments to run model and copy with, to compare their outputs.

    Returns
    -------
    folded : torch.nn.Module
        Each folded batch norm is replaced by a module that does what is left of it: nothing, or the addition of a
        residual and the activation. Where all is folded, it computes by torch's operators alone.
    report : Report
        Which were folded into which layer, why others were not, and how much the outputs differ.

    Raises
    ------
    TypeError
        As from `convert`.
    ValueError
        If there is an example, and the model is in training mode.

    Notes
    -----
    Linear and Conv1d also take inputs whose second axis is not the layer's output channels, but the one a batch norm
    would normalise: the folded model refuses those when it is called.

    Examples
    --------
    >>> import torch, cubn.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8)).eval()
    >>> folded, report = cubn.torch.fold(model, torch.randn(2, 3))
    >>> report.done
    {'1': 'part of 0'}
    """
    check_model(model)
    if example is not None and any(module.training for module in model.modules()):
        raise ValueError(message("model", "be in eval mode to be compared", "training mode", "Call model.eval()."))
    folded = copy.deepcopy(model)
    calls = Calls(folded, (False,))
    report = Report()
    for path, bn in list(calls.batch_norms()):
        layer = _layer_before(bn, calls)
        if not isinstance(layer, str):
            layer = _fold(layer, bn, calls)
        if isinstance(layer, str):
            report.left[path] = layer
        else:
            report.done[path] = f"part of {calls.paths[layer][0]}"
    if example is not None:
        report.difference = _difference(model, folded, example if isinstance(example, tuple) else (example,))
    return folded, report


class Folded(nn.Module):
    """In the place of a batch norm that the layer before it does: what is left of it.

    Parameters
    ----------
    ndim : int
        Of inputs whose second axis is the layer's output channels.
    relu : bool
        Whether a ReLU follows.
    """

    def __init__(self, ndim: int, relu: bool) -> None:
        super().__init__()
        self.ndim = ndim
        self.relu = relu

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if input.ndim != self.ndim:
            rule = f"have {self.ndim} axes, for the batch norm that was folded"
            raise ValueError(message("input", rule, f"{input.ndim} axes", function="Folded"))
        y = input if residual is None else input + residual
        return F.relu(y) if self.relu else y

    def extra_repr(self) -> str:
        return f"ndim={self.ndim}, relu={self.relu}"


class FoldedAct(timm._Activated, Folded):
    """Of timm's batch norms, with an activation."""


def _layer_before(bn: _BatchNorm, calls: Calls) -> nn.Module | str:
    """The layer a batch norm can be folded into, or why there is none."""
    if not _is_known(bn):
        return f"{type(bn).__name__} may do more than normalise"
    if bn.training and not getattr(bn, "frozen", False):
        return "it is in training mode"
    if bn.running_mean is None or bn.running_var is None:
        return "it has no running statistics"
    if (why := calls.obstacle(bn)) is not None:
        return why
    (site,) = calls.sites[bn]
    if len(site.node.args) != 1 + getattr(bn, "_fused_residual", False) or site.node.kwargs:
        return "it is called with more than its input"
    return _source(site, bn, calls)


def _is_known(bn: _BatchNorm) -> bool:
    """Whether it is of a class that is known, not of one that somebody derived from it."""
    cls = type(bn)
    if isinstance(bn, _CubnBatchNorm):
        return cls.__module__.startswith("cubn.torch.")
    return cls in COUNTERPARTS or timm.activation(bn) is not None


def _source(site: Site, bn: _BatchNorm, calls: Calls) -> nn.Module | str:
    node = site.node.args[0]
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return "no layer comes before it"
    layer = site.caller.get_submodule(str(node.target))
    if parametrize.is_parametrized(layer):
        return "the weight of the layer before it is computed by a parametrization"
    if type(layer) not in LAYERS + TRANSPOSED:
        return f"{type(layer).__name__} before it is no convolution or linear layer"
    if len(node.users) != 1:
        return "the output of the layer before it is read elsewhere too"
    if (why := calls.obstacle(layer)) is not None:
        return f"of the layer before it: {why}"
    return layer


def _fold(layer: Any, bn: _BatchNorm, calls: Calls) -> nn.Module | str:
    """The layer, changed; or why it cannot be."""
    transposed = isinstance(layer, TRANSPOSED)
    try:
        weight, bias = fold_into(
            layer.weight.detach(),
            None if layer.bias is None else layer.bias.detach(),
            _state(bn),
            output_axis=int(transposed),
            groups=layer.groups if transposed else 1,
        )
    except (TypeError, ValueError) as error:
        return str(error)
    layer.weight = nn.Parameter(weight, layer.weight.requires_grad)
    layer.bias = nn.Parameter(bias, layer.weight.requires_grad)
    rest = _rest(bn, 2 + len(getattr(layer, "kernel_size", ())))
    for path in calls.paths[bn]:
        owner, _, name = path.rpartition(".")
        _, caller = next((p, m) for m, paths in calls.paths.items() for p in paths if p == owner)
        caller._modules[name] = rest
    return layer  # type: ignore[no-any-return]


def _state(bn: _BatchNorm) -> BatchNormState:
    gamma, beta = (None if vector is None else vector.detach() for vector in (bn.weight, bn.bias))
    arrays: dict[str, Any] = dict(gamma=gamma, beta=beta, running_mean=bn.running_mean, running_var=bn.running_var)
    return BatchNormState.from_arrays(**arrays, num_features=bn.num_features, eps=bn.eps, check=False)


def _rest(bn: _BatchNorm, ndim: int) -> nn.Module:
    cls = Folded if timm.activation(bn) is None else FoldedAct
    rest = cls(ndim, getattr(bn, "_fused_relu", False))
    rest._modules.update(bn._modules)
    return rest.train(bn.training)


def _difference(model: nn.Module, folded: nn.Module, example: tuple[Any, ...]) -> float:
    with torch.no_grad():
        outputs, others = (
            [leaf.double() for leaf in _pytree.tree_leaves(each(*example)) if isinstance(leaf, Tensor)]
            for each in (model, folded)
        )
    largest = max((float(y.abs().max()) for y in outputs if y.numel()), default=0.0)
    apart = max(
        (float((y - other).abs().max()) for y, other in zip(outputs, others, strict=True) if y.numel()), default=0.0
    )
    return apart / largest if largest else apart
