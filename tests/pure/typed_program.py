"""What a user writes who has it checked: nothing here is an error to `mypy --strict`. See test_typing.py."""

from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.distributed
from mpi4py import MPI
from numpy.typing import NDArray

import cubn
from cubn.health import Finding, Severity
from cubn.sync import Communicator
from cubn.typing import ArrayT, SupportsDLPack

Float32 = NDArray[np.float32]


def numpy_step(x: Float32, state: cubn.BatchNormState) -> Float32:
    mask = cubn.finite_mask(x)
    assert_type(mask, NDArray[np.bool_])
    y, saved = cubn.forward_train(x, state, mask=mask, residual=x, relu=True)
    assert_type(y, Float32)
    assert_type(saved, cubn.Saved[Float32])
    assert_type(saved.x, Float32)
    dx, dgamma, dbeta, dresidual = cubn.backward(2 * (y - x) / y.size, saved, parameter_gradients="global", out=None)
    state.gamma -= 0.1 * dgamma
    state.beta -= 0.1 * dbeta
    return x - dx + dresidual


def torch_step(x: torch.Tensor, state: cubn.BatchNormState) -> torch.Tensor:
    y, saved = cubn.forward_frozen(x, state)
    assert_type(y, torch.Tensor)
    assert_type(saved, cubn.Saved[torch.Tensor])
    gradients = cubn.backward(torch.ones_like(y), saved, statistics=True)
    assert_type(gradients, cubn.StatisticsGradients[torch.Tensor])
    assert_type(gradients.dmean, Any)
    assert_type(cubn.backward(y, saved), cubn.Gradients[torch.Tensor])
    assert_type(cubn.double_backward(y, np.ones(3), None, y, saved), cubn.DoubleGradients[torch.Tensor])
    assert_type(cubn.forward(x, state, out=y), torch.Tensor)
    assert_type(cubn.finite_mask(x), torch.Tensor)
    assert_type(cubn.fold_into(x, None, state)[0], torch.Tensor)
    return cubn.backward(y, saved, statistics=False).dx


def jax_step(x: jax.Array, state: cubn.BatchNormState) -> jax.Array:
    y = cubn.normalize(x, cubn.moments(x), gamma=state.gamma, beta=np.ones(3), eps=1e-3)
    assert_type(y, jax.Array)
    found = cubn.backward_from(y, x, mean=np.zeros(3), invstd=np.ones(3))
    assert_type(found, cubn.Gradients[jax.Array])
    by_statistics = cubn.backward_from(y, x, mean=np.zeros(3), invstd=np.ones(3), frozen=True, statistics=True)
    assert_type(by_statistics, cubn.StatisticsGradients[jax.Array])
    return found.dx


def any_step(x: ArrayT, state: cubn.BatchNormState, saved: list[cubn.Saved[ArrayT]]) -> ArrayT:
    """A function of any library's arrays that passes them on."""
    y, for_backward = cubn.forward_train(x, state)
    saved.append(for_backward)
    return y


def several_ranks(
    x: torch.Tensor, state: cubn.BatchNormState, mine: Communicator, group: torch.distributed.ProcessGroup
) -> None:
    with cubn.together(MPI.COMM_WORLD):
        started = cubn.forward_train_start(x, state, comm=MPI.COMM_WORLD, sizes=[4, 4])
    assert_type(started, cubn.Started[tuple[torch.Tensor, cubn.Saved[torch.Tensor]]])
    y, saved = started.finish()
    assert_type(cubn.backward_start(y, saved), cubn.Started[cubn.Gradients[torch.Tensor]])
    cubn.forward_train(x, state, comm=group, sizes=np.array([4, 4]))
    cubn.forward_train(x, state, comm=torch.distributed.group.WORLD)
    cubn.update(state, cubn.moments(x, comm=mine))


def states(like: SupportsDLPack) -> list[cubn.BatchNormState]:
    state = cubn.BatchNormState(3, dtype=np.float32, running_variance="biased", momentum=None)
    state.running_mean, state.running_var = np.zeros(3), torch.ones(3)
    state.tracked = 10
    state.gamma = None
    return [
        state,
        cubn.BatchNormState(3, dtype=np.dtype(np.float64), like=like),
        cubn.BatchNormState(3, dtype=torch.float64, like=torch.ones(3)),
        cubn.BatchNormState(3, dtype=jnp.float32, like=jnp.ones(3)),
        cubn.BatchNormState(3, dtype="float64"),
        cubn.BatchNormState.from_dict(state.to_dict(like=like), like=like),
        cubn.BatchNormState.from_arrays(running_mean=np.zeros(3), running_var=np.ones(3), tracked=np.array([3, 3, 4])),
    ]


def examined(state: cubn.BatchNormState, model: torch.nn.Module, comm: Communicator) -> list[str]:
    report = cubn.diagnose({"a": state, "b": model}, {"a": cubn.moments(np.ones((2, 3)))}, comm=comm)
    assert_type(report.worst, Severity | None)
    assert_type(report.of("error"), list[Finding])
    assert_type(report.to_html("report.html"), str)
    return [f"{found.layer}: {found.rule} {found.channels}" for found in cubn.diagnose([state, model]).findings]


def pooled(pixels: NDArray[np.uint8], there: NDArray[np.bool_]) -> float:
    moments = cubn.moments(pixels, dtype="float64") + cubn.moments(there, dtype=np.float32)
    assert_type(moments.merge(moments), cubn.Moments)
    assert_type(cubn.Moments.from_statistics(3, np.zeros(2), np.ones(2)).std(), NDArray[np.float64])
    return float(moments.mean[0])
