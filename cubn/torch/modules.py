"""Batch norm modules: torch's own, computed by cubn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from cubn.torch._batch_norm import _BatchNorm


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, computed by cubn: the same bits for every memory format, number of threads and of ranks.

    y = (x - mean) / sqrt(var + eps) * weight + bias, per channel. In training, mean and var = m2 / count are those of
    the batch, and running = (1 - momentum) * running + momentum * batch, its variance m2 / (count - 1). Otherwise they
    are the running statistics, or the batch's where there are none.

    Parameters
    ----------
    num_features : int
        Channels, C.
    eps : float
        Added to the variance; positive. In the units of x squared.
    momentum : float or None
        Weight of the new value, 0 to 1. None: the average of all batches, but for those that were skipped.
    affine, bias : bool
        Whether there are a weight (ones) and, with it, a bias (zeros) to learn.
    track_running_stats : bool
        Whether there are running_mean (zeros), running_var (ones) and counters.
    device, dtype
        Of parameters and running statistics; these are float32 in modules of float16 and bfloat16.
    comm : mpi4py.MPI.Comm, torch.distributed.ProcessGroup, cubn.sync.Communicator or None
        The ranks that hold one batch in parts, in rank order. All of them train together, those with an empty input
        too; nobody is asked in evaluation or where frozen. May be assigned to.

    Attributes
    ----------
    weight, bias, running_mean, running_var : Tensor of shape (C,), or None
        As in torch, and in the state_dict as in torch's.
    num_batches_tracked : int64 Tensor of shape (), or None
        Updates, also those that were skipped.
    skipped : int64 Tensor of shape (C,), or None
        How many of them left a channel as it was, because the batch was empty or its statistics were not finite. A
        buffer that is not in the state_dict: 0 after loading.
    frozen : bool
        Whether `freeze()` was called last, or `unfreeze()`.

    Methods
    -------
    forward(input, mask=None)
        input: (N, C, H, W) of float16, bfloat16, float32 or float64, in any memory format. mask: bool, of shape
        (N, H, W), each extent full or 1; False positions take no part, and are 0 in y and its gradients. Returns y as
        input is.
    freeze(), unfreeze()
        Take the running statistics as constants also in training, with gradients through; and no longer. They return
        the module.

    Raises
    ------
    ValueError
        In forward: if the input has another rank or number of channels; in training, if it has one value per channel
        (over all ranks), or momentum is not from 0 to 1. Nothing is changed then.
    TypeError
        If a module with ranks is to be pickled: save its state_dict, or set `comm` to None first. Copies share them.
    CollectiveMismatch
        On all ranks: if they do not do the same thing, or another one failed.

    Notes
    -----
    Differs from torch where a batch holds a NaN or an infinity: running statistics of such channels stay, and heal with
    the next batch if they were not finite themselves. With momentum=None, training that is resumed from a state_dict
    after such a batch has other bits, since `skipped` is not saved.

    Running statistics that were 16 bits wide would stop moving at small momenta. `half()`, `bfloat16()`, `to()` and
    loading leave them in float32, which is said once in a process. Input and parameters may differ in dtype.

    Keeps x for the backward. From memory, training reads x twice at most and writes y once, its backward reads x and dy
    twice and writes dx once; evaluation reads x once and writes y once.

    References
    ----------
    Ioffe & Szegedy 2015, "Batch normalization", https://arxiv.org/abs/1502.03167

    Examples
    --------
    >>> import torch
    >>> import cubn.torch
    >>> bn = cubn.torch.BatchNorm2d(3)
    >>> x = torch.arange(96.0).reshape(2, 3, 4, 4).requires_grad_()
    >>> bn(x).sum().backward()
    >>> bn.running_mean
    tensor([3.1500, 4.7500, 6.3500])
    >>> bn.num_batches_tracked, bn.skipped
    (tensor(1), tensor([0, 0, 0]))
    >>> bn.load_state_dict(torch.nn.BatchNorm2d(3).state_dict())
    <All keys matched successfully>
    >>> bn.freeze()
    BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, frozen=True)
    """


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, computed by cubn.

    Everything is as in `BatchNorm2d`, but for shapes: input (N, C) with mask (N,), or input (N, C, L) with mask (N, L).

    Examples
    --------
    >>> import torch
    >>> import cubn.torch
    >>> bn = cubn.torch.BatchNorm1d(1, affine=False)
    >>> bn(torch.tensor([[1.0], [2.0], [3.0]]))
    tensor([[-1.2247],
            [ 0.0000],
            [ 1.2247]])
    >>> bn(torch.tensor([[1.0], [2.0], [99.0]]), torch.tensor([True, True, False]))
    tensor([[-1.0000],
            [ 1.0000],
            [ 0.0000]])
    """


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, computed by cubn.

    Everything is as in `BatchNorm2d`, but for shapes: input (N, C, D, H, W), mask (N, D, H, W).

    Examples
    --------
    >>> import torch
    >>> import cubn.torch
    >>> x = torch.randn(2, 8, 4, 5, 5).to(memory_format=torch.channels_last_3d)
    >>> cubn.torch.BatchNorm3d(8)(x).is_contiguous(memory_format=torch.channels_last_3d)
    True
    """


class BatchNormReLU2d(BatchNorm2d):
    """`BatchNorm2d`, then ReLU, in one pass over the data in each direction.

    y = max((x - mean) / sqrt(var + eps) * weight + bias, 0): the values of the two modules one after the other, without
    what the ReLU would read, write and keep. Everything else is as in `BatchNorm2d`.

    Examples
    --------
    >>> import torch
    >>> import cubn.torch
    >>> x = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 1, 1, 3)
    >>> cubn.torch.BatchNormReLU2d(1, eps=1e-12)(x).detach()
    tensor([[[[0.0000, 0.0000, 1.2247]]]])
    """

    _fused_relu = True


class BatchNormReLU1d(BatchNorm1d):
    """`BatchNorm1d`, then ReLU, as in `BatchNormReLU2d`.

    Examples
    --------
    >>> import torch
    >>> import cubn.torch
    >>> cubn.torch.BatchNormReLU1d(1, eps=1e-12)(torch.tensor([[1.0], [3.0]])).tolist()
    [[0.0], [1.0]]
    """

    _fused_relu = True


class BatchNormReLU3d(BatchNorm3d):
    """`BatchNorm3d`, then ReLU, as in `BatchNormReLU2d`.

    Examples
    --------
    >>> import torch
    >>> import cubn.torch
    >>> bool((cubn.torch.BatchNormReLU3d(2)(torch.randn(2, 2, 3, 3, 3)) >= 0).all())
    True
    """

    _fused_relu = True


class _BatchNormAddReLU(_BatchNorm):
    """What the modules with a residual share: batch norms in all but what they are called with."""

    _fused_relu = _fused_residual = True

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, residual: Tensor, mask: Tensor | None = None) -> Tensor: ...  # type: ignore[override]

    def forward(self, input: Tensor, residual: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self._normalize(input, residual, mask)


class BatchNormAddReLU2d(_BatchNormAddReLU, nn.BatchNorm2d):
    """`BatchNorm2d`, then the addition of a residual, then ReLU: the end of a residual block, in one pass.

    y = max((x - mean) / sqrt(var + eps) * weight + bias + residual, 0), rounded once. Everything else is as in
    `BatchNorm2d`.

    Methods
    -------
    forward(input, residual, mask=None)
        residual: of input's shape, dtype and device, in any memory format. It gets the gradient of y where y is
        positive.

    Notes
    -----
    Beside x, one bit of each element is kept for the backward.

    Examples
    --------
    >>> import torch
    >>> import cubn.torch
    >>> bn = cubn.torch.BatchNormAddReLU2d(1, eps=1e-12)
    >>> x = torch.tensor([1.0, 3.0]).reshape(1, 1, 1, 2)
    >>> bn(x, torch.tensor([5.0, -5.0]).reshape(1, 1, 1, 2)).flatten().tolist()
    [4.0, 0.0]
    """


class BatchNormAddReLU1d(_BatchNormAddReLU, nn.BatchNorm1d):
    """`BatchNorm1d`, then the addition of a residual, then ReLU, as in `BatchNormAddReLU2d`.

    Examples
    --------
    >>> import torch
    >>> import cubn.torch
    >>> bn = cubn.torch.BatchNormAddReLU1d(1, eps=1e-12)
    >>> bn(torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [-5.0]])).tolist()
    [[4.0], [0.0]]
    """


class BatchNormAddReLU3d(_BatchNormAddReLU, nn.BatchNorm3d):
    """`BatchNorm3d`, then the addition of a residual, then ReLU, as in `BatchNormAddReLU2d`.

    Examples
    --------
    >>> import torch
    >>> import cubn.torch
    >>> x = torch.randn(2, 4, 3, 3, 3)
    >>> cubn.torch.BatchNormAddReLU3d(4)(x, x).shape
    torch.Size([2, 4, 3, 3, 3])
    """
