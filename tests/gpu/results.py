"""Every operation on given arrays of any library, on any device, with what it gives by name."""

import cubn
from cubn.sync import threads


def run_training(x, dy, residual):
    """Training steps, plain and with residual and ReLU: of `run_everything` what large arrays have kernels for."""
    state = cubn.BatchNormState(x.shape[1], like=x)
    found = {}
    for name, options in {"plain": {}, "block": {"residual": residual, "relu": True}}.items():
        found |= _step(cubn.forward_train, name, x, dy, state, options)[0]
    return found


def _step(operation, name, x, dy, state, options):
    """y and its gradients, by name; both as they are."""
    y, saved = operation(x, state, **options)
    grads = cubn.backward(dy, saved)
    what = f"{operation.__name__}, {name}"
    found = {f"{what}: y": y, f"{what}: dx": grads.dx}
    found |= {f"{what}: dgamma": grads.dgamma, f"{what}: dbeta": grads.dbeta}
    if grads.dresidual is not None:
        found[f"{what}: dresidual"] = grads.dresidual
    return found, y, grads, saved


def _training_otherwise(x, dy, block):
    """Ghost batches, two where there are samples enough, and batch renormalisation; each with a state of its own."""
    found = {}
    for name, options in {"groups": {"groups": max(2, x.shape[0] // 2 - 1)}, "renorm": {"renorm": (1.5, 0.25)}}.items():
        state = cubn.BatchNormState(x.shape[1], like=x)
        found |= _step(cubn.forward_train, name, x, dy, state, block | options)[0]
        found |= {f"{name}: {which}": getattr(state, which) for which in ("running_mean", "running_var")}
    return found


def run_everything(x, dy, residual, mask=None):
    """Training, fine-tuning and inference, plain and with residual and ReLU, with their backwards; the state after.

    With a mask, training and its backward with that too.
    """
    state = cubn.BatchNormState(x.shape[1], like=x)
    found = {}
    for name, options in {"plain": {}, "relu": {"relu": True}, "block": {"residual": residual, "relu": True}}.items():
        for operation in (cubn.forward_train, cubn.forward_frozen):
            step, y, grads, saved = _step(operation, name, x, dy, state, options)
            found |= step
            given = y, grads.dgamma, grads.dbeta, dy, saved
            second = cubn.double_backward(*given, ddresidual=None if grads.dresidual is None else x)
            what = f"{operation.__name__}, {name}"
            found |= {f"{what}: {part} of second": array for part, array in second._asdict().items()}
        found[f"forward, {name}"] = cubn.forward(x, state, **options)
    if mask is not None:
        y, saved = cubn.forward_train(x, state, mask=mask)
        grads = cubn.backward(dy, saved)
        found |= {"masked: y": y, "masked: dx": grads.dx, "masked: dgamma": grads.dgamma, "masked: dbeta": grads.dbeta}
    found |= _training_otherwise(x, dy, {"residual": residual, "relu": True})
    (comm,) = threads.communicators(1)
    y, saved = cubn.forward_train(x, state, comm=comm)
    found |= {"one rank: y": y, "one rank: dx": cubn.backward(dy, saved).dx}
    moments = cubn.moments(x)
    found["normalize"] = cubn.normalize(x, moments, gamma=state.gamma, beta=state.beta)
    found |= {"mean": moments.mean, "m2": moments.m2}
    found |= {name: getattr(state, name) for name in ("running_mean", "running_var", "tracked", "skipped")}
    return found
