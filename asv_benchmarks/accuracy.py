"""Distance of the statistics from float64, for cubn and torch: the table of docs/numerics.md.

    python asv_benchmarks/accuracy.py                 measure, write results/<machine>/accuracy.json, print the table
    python asv_benchmarks/accuracy.py --table FILE    the table from a result file

Normal float32 data with mean / sigma from 0 to 1e5, sigma = 1. The reference is two passes in float64 over the same
float32 values. Each figure is the worst channel of the worst of 4 draws: relative error of var, absolute error of the
mean over sigma, largest error of y in float32 units in the last place (ulp) of max(|gamma * xhat|, |beta|, |gamma|).
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from machine import write

import cubn

SIZES = ((32, 3136), (32, 12544), (256, 49), (4096, 1))
OFFSETS = (0.0, 1e1, 1e2, 1e3, 1e4, 1e5)
Array = np.ndarray
CHANNELS, DRAWS, EPS = 16, 4, 1e-5


def errors(x: Array, mean: Array, var: Array, y: Array, gamma: Array, beta: Array) -> list[float]:
    """[var, mean, y]: the worst channel's errors, as the module's docstring defines them."""
    wide = x.astype(np.float64)
    true_mean = wide.mean(axis=(0, 2))
    centred = wide - true_mean[:, None]
    true_var = (centred * centred).mean(axis=(0, 2))
    gained = centred / np.sqrt(true_var + EPS)[:, None] * gamma.astype(np.float64)[:, None]
    true_y = gained + beta.astype(np.float64)[:, None]
    scale = np.maximum(np.abs(gained), np.maximum(np.abs(beta), np.abs(gamma))[:, None])
    return [
        float(np.max(np.abs(var - true_var) / true_var)),
        float(np.max(np.abs(mean - true_mean) / np.sqrt(true_var))),
        float(np.max(np.abs(y - true_y) / np.spacing(scale.astype(np.float32)))),
    ]


def ours(x: Array, gamma: Array, beta: Array) -> list[float]:
    state = cubn.BatchNormState.from_arrays(gamma=gamma, beta=beta, eps=EPS)
    m = cubn.moments(x)
    return errors(x, m.mean, m.var(), cubn.forward_train(x, state)[0], gamma, beta)


def theirs(x: Array, gamma: Array, beta: Array) -> list[float]:
    tensors = [torch.from_numpy(a) for a in (x, gamma, beta)]
    y, mean, invstd = (t.numpy() for t in torch.native_batch_norm(*tensors, None, None, True, 0.1, EPS))
    return errors(x, mean.astype(np.float64), invstd.astype(np.float64) ** -2.0 - EPS, y, gamma, beta)


def measure() -> list[dict[str, object]]:
    rng = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    for N, S in SIZES:
        for offset in OFFSETS:
            worst = {"cubn": [0.0] * 3, "torch": [0.0] * 3}
            for _ in range(DRAWS):
                x = (rng.standard_normal((N, CHANNELS, S)) + offset).astype(np.float32)
                gamma, beta = rng.standard_normal((2, CHANNELS)).astype(np.float32)
                for name, run in (("cubn", ours), ("torch", theirs)):
                    worst[name] = [max(pair) for pair in zip(worst[name], run(x, gamma, beta), strict=True)]
            rows.append({"N": N, "S": S, "mean_over_sigma": offset, **worst})
    return rows


def table(path: Path) -> str:
    """The Markdown table from a result file."""
    lines = ["| N × S | mean/σ | var: cubn | torch | mean: cubn | torch | y: cubn | torch |", "|---" * 8 + "|"]
    for row in json.loads(path.read_text())["rows"]:
        var, mean, y = zip(row["cubn"], row["torch"], strict=True)
        cells = [f"{error:.0e}" for error in (*var, *mean)] + [f"{error:.3g}" for error in y]
        lines.append(f"| {row['N']} × {row['S']} | {row['mean_over_sigma']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, metavar="FILE")
    path = parser.parse_args().table
    print(table(path or write("accuracy.json", {"draws": DRAWS}, measure())))


if __name__ == "__main__":
    main()
