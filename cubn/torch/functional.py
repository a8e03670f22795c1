"""Batch normalization as a function of tensors."""

from __future__ import annotations

from torch import Tensor

from cubn.torch._normalize import normalize


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, bitwise reproducible."""
    vectors = weight, bias, running_mean, running_var
    return normalize(
        input,
        vectors,
        training=training,
        momentum=momentum,
        eps=eps,
        mask=mask,
        residual=residual,
        relu=relu,
    )
