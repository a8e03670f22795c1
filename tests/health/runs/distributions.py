"""What thresholds of rules are set from: how far healthy runs go, by the worst channel of each run."""

from collections import defaultdict

import numpy as np

from tests.health.runs.training import norms

QUANTILES = (0, 0.01, 0.05, 0.5, 0.95, 0.99, 1)


def statistics(norm, moments):
    """Numbers of one batch norm, one a channel."""
    held = {
        name: np.asarray(getattr(norm, name).detach(), np.float64)
        if hasattr(getattr(norm, name), "detach")
        else getattr(norm, name)
        for name in ("running_mean", "running_var")
    }
    gamma = getattr(norm, "gamma", getattr(norm, "weight", None))
    gamma = (
        np.ones(norm.num_features)
        if gamma is None
        else np.asarray(gamma.detach() if hasattr(gamma, "detach") else gamma, np.float64)
    )
    mean, var = held["running_mean"].astype(np.float64), held["running_var"].astype(np.float64)
    gain = np.abs(gamma) / np.sqrt(var + norm.eps)
    log_gain = np.log10(np.maximum(gain, 1e-300)) - np.log10(np.maximum(np.median(gain), 1e-300))
    mad = np.median(np.abs(log_gain)) / 0.6745
    of_batch = moments.var_unbiased()
    alive = of_batch > 1e-3 * np.median(of_batch)
    out = {
        "log10 gain": np.log10(np.maximum(gain, 1e-300)),
        "log10 gain over median": log_gain,
        "gain in MADs": log_gain / max(mad, 0.05),
        "log10 var / eps": np.log10(np.maximum(var, 1e-300) / norm.eps),
        "log10 var over median": np.log10(np.maximum(var, 1e-300) / max(np.median(var), 1e-300)),
        "|mean shift| in std": (np.abs(mean - moments.mean) / np.sqrt(of_batch + norm.eps)),
        "log2 var ratio": np.log2((var + norm.eps) / (of_batch + norm.eps)),
    }
    return out


def table(runs):
    """Quantiles over runs of the least and the greatest channel."""
    found = defaultdict(list)
    for run in runs:
        by_run = defaultdict(list)
        for name, norm in norms(run.subject).items():
            for what, values in statistics(norm, run.moments[name]).items():
                by_run[what].append(values)
        for what, parts in by_run.items():
            values = np.concatenate(parts)
            found[what + ", least"].append(values.min())
            found[what + ", greatest"].append(values.max())
            found[what + ", median"].append(np.median(values))
        found["loss by running / by batch"].append(run.loss_by_running / run.loss_by_batch)
    lines = [
        f"{'over ' + str(len(found['log10 gain, least'])) + ' runs, quantile':40}"
        + "".join(f"{q:>9}" for q in QUANTILES)
    ]
    lines += [
        f"{what:40}" + "".join(f"{v:9.3g}" for v in np.quantile(values, QUANTILES)) for what, values in found.items()
    ]
    return "\n".join(lines)
