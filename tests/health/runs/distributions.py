"""How far healthy runs go, by their least and their greatest channel: what thresholds of rules are set from."""

import numpy as np

from cubn.health.layer import layers_of

QUANTILES = (0, 0.01, 0.05, 0.5, 0.95, 0.99, 1)
TINY = 1e-300


def of_layer(layer, moments):
    """Numbers that rules look at, each of shape (C,)."""
    gamma = np.ones(layer.num_features) if layer.gamma is None else np.abs(layer.gamma)
    log_gain = np.log10(np.maximum(gamma / np.sqrt(layer.running_var + layer.eps), TINY))
    log_var = np.log10(np.maximum(layer.running_var, TINY))
    of_data = moments.var() + layer.eps
    return {
        "log10 gain": log_gain,
        "log10 gain, over the median": log_gain - np.median(log_gain),
        "log10 |gamma|, over the median": np.log10(np.maximum(gamma / np.median(gamma), TINY)),
        "log10 variance / eps": log_var - np.log10(layer.eps),
        "log10 variance, over the median": log_var - np.median(log_var),
        "shift of the mean, in σ": (layer.running_mean - moments.mean) / np.sqrt(of_data),
        "log2 variance / the data's": np.log2((layer.running_var + layer.eps) / of_data),
    }


def of_run(run):
    """(least, greatest) of each number."""
    layers = [of_layer(layer, run.moments[layer.name]) for layer in layers_of(run.subject)]
    extremes = {}
    for what in layers[0]:
        values = np.concatenate([layer[what] for layer in layers])
        extremes[what, "least"], extremes[what, "greatest"] = values.min(), values.max()
    return extremes | {("loss, by running / by batch statistics", ""): run.loss_by_running / run.loss_by_batch}


def table(rows):
    """Quantiles over runs of what `of_run` gives."""
    lines = [f"{f'quantiles over {len(rows)} runs':50}" + "".join(f"{q:>9}" for q in QUANTILES)]
    for what in rows[0]:
        values = np.quantile([row[what] for row in rows], QUANTILES)
        lines.append(f"{' '.join(what):50}" + "".join(f"{value:9.3g}" for value in values))
    return "\n".join(lines)
