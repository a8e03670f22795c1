"""Batch normalization as a function of tensors."""

from __future__ import annotations

from torch import Tensor

from cubn.errors import message
from cubn.torch._routes.normalize import normalize


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
    """`torch.nn.functional.batch_norm`, bitwise reproducible; with a residual, a ReLU and a mask if wanted.

    y = (input - mean) / sqrt(var + eps) * weight + bias, then + residual, then ReLU. In training, mean and var are the
    batch's, and running = (1 - momentum) * running + momentum * batch, its variance the unbiased one; else they are the
    running ones, and constants. Differentiable, twice, by input, weight, bias and residual.

    Parameters
    ----------
    input : Tensor of shape (N, C, ...)
        float16, bfloat16, float32 or float64; any layout, on the CPU or a CUDA device.
    running_mean, running_var : Tensor of shape (C,), optional
        Both or neither; updated in place in training, needed otherwise.
    weight, bias : Tensor of shape (C,), optional
        Of any of these dtypes; without them 1 and 0.
    training : bool
        Whether the batch's own statistics are taken.
    momentum : float
        Weight of the batch in the running statistics, from 0 to 1.
    eps : float
        Added to the variance; positive.
    residual : Tensor, optional
        Added before the ReLU; of input's shape and dtype.
    relu : bool
        Whether what is below 0 becomes 0. A NaN stays.
    mask : bool Tensor, optional
        True where a position is present: what it leaves out takes no part in the statistics, and its y is 0. Of input's
        shape without the channel axis, or with 1 there; each extent full or 1.

    Returns
    -------
    Tensor
        y, of input's shape, dtype and device; of its layout where that is dense, else contiguous.

    Raises
    ------
    TypeError
        If a tensor has a dtype that does not fit.
    ValueError
        If shapes or devices do not fit, momentum is not from 0 to 1, a channel has one value in training, or there are
        no running statistics otherwise. Nothing is changed then.
    NotImplementedError
        If a tensor has a forward-mode tangent, or where a third derivative is asked for.

    Notes
    -----
    The same bits for every layout and number of threads, eager or compiled, and of `torch.nn.functional.batch_norm` up
    to rounding. In training, input (and residual) is read twice from memory at most and y written once, otherwise once
    each; the backward reads input and dy twice at most, and writes dx once.

    Unlike torch's, a channel whose statistics are not finite leaves its running statistics as they were.

    Examples
    --------
    >>> import torch
    >>> from cubn.torch import functional
    >>> x = torch.tensor([[1.0, 8.0], [3.0, 0.0]])
    >>> mean, var = torch.zeros(2), torch.ones(2)
    >>> functional.batch_norm(x, mean, var, training=True, momentum=0.5, relu=True)
    tensor([[0.0000, 1.0000],
            [1.0000, 0.0000]])
    >>> mean, var
    (tensor([1., 2.]), tensor([ 1.5000, 16.5000]))
    """
    if (running_mean is None or running_var is None) and not (training and running_mean is running_var):
        name = "running_var" if running_var is None else "running_mean"
        remedy = "Without running statistics, both of them, there is training=True alone."
        raise ValueError(message(name, "be given unless training", None, remedy, function="batch_norm"))
    if training and running_mean is not None and not (momentum is not None and 0 <= momentum <= 1):
        remedy = "It is the weight of the new batch; another one makes variances negative, or lets them grow for ever."
        raise ValueError(message("momentum", "be from 0 to 1", momentum, remedy, function="batch_norm"))
    return normalize(
        input,
        (weight, bias, running_mean, running_var),
        training=training,
        momentum=momentum,
        eps=eps,
        mask=mask,
        residual=residual,
        relu=relu,
    )
