"""The figures of docs/health.md: a training whose validation explodes at step 100, when its learning rate is raised.

    python docs/figures/health.py

writes the PNG files beside this script. It takes scikit-learn's digits, torch and matplotlib, and half a minute.
"""

from dataclasses import replace
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from cubn.health import Monitor, figures, train_eval_gap
from cubn.health.layer import layers_of

EPOCH, BATCH, JUMP = 44, 32, 100


def network() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 1
    for i in range(6):
        layers += [nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        channels = 16
        if i == 2:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    with Monitor(model, on_finding=lambda found: None).attach(optimizer) as monitor:
        for step in range(3 * EPOCH):
            if step == JUMP:
                optimizer.param_groups[0]["lr"] = 0.5
            if step % EPOCH == 0:
                order = torch.randperm(1437)
            batch = order[step % EPOCH * BATCH :][:BATCH]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            if step == JUMP + 10:
                exploded = train_eval_gap(model, [(images[1437:], labels[1437:])], loss=nn.functional.cross_entropy)
                against = figures.running_against_batch(monitor.history["4"])
    for step, found in monitor.findings:
        print(f"step {step}, layer {found.layer}: {found.message}")
    print(exploded)
    layers = [replace(layer, name=f"layer {layer.name}") for layer in layers_of(model)]
    drawn = {
        "health_channels_by_steps": figures.channels_by_steps(monitor.history["4"]),
        "health_running_against_batch": against,
        "health_train_eval_gap": figures.gap_by_layer(exploded),
        "health_gains": figures.gain_histogram(layers),
        "health_statistics": figures.statistics(layers),
    }
    for name, figure in drawn.items():
        figure.savefig(Path(__file__).with_name(f"{name}.png"), metadata={"Software": None})


if __name__ == "__main__":
    main()
