"""Training, and what is known of a run afterwards."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

import cubn
from tests.health.runs.digits import digits
from tests.health.runs.networks import Perceptron, build
from tests.health.runs.settings import Settings


@dataclass
class Run:
    """A trained network.

    `subject` is what is diagnosed: a model, or a mapping of names to states. `moments` are those of the batch norms'
    inputs with batch statistics, over the training set; the losses are means of cross-entropy over it, with batch
    statistics and with running ones.
    """

    settings: Settings
    subject: Any
    moments: dict[str, cubn.Moments]
    loss_by_batch: float
    loss_by_running: float


def norms(subject):
    """The batch norms by name: torch's modules or cubn's states."""
    if isinstance(subject, dict):
        return subject
    return {name: module for name, module in subject.named_modules() if isinstance(module, _BatchNorm)}


def train(settings, before=lambda subject: None, at_step=lambda subject, step: None):
    """Run these settings; a fault may be planted `before` the training, or in the course of it."""
    with one_thread():
        make = _in_numpy if "numpy" in settings.network else _in_torch
        return make(settings, before, at_step)


@contextmanager
def one_thread():
    """Small arrays gain nothing of more."""
    threads = torch.get_num_threads(), cubn.get_num_threads()
    torch.set_num_threads(1)
    cubn.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads[0])
        cubn.set_num_threads(threads[1])


def _batches(settings):
    """Images, labels and learning rate of each step; the rate falls to zero."""
    training, _ = digits()
    rng = np.random.default_rng(settings.seed)
    order = np.concatenate([rng.permutation(1400) for _ in range(settings.steps * settings.batch // 1400 + 1)])
    for step, chosen in enumerate(order[: settings.steps * settings.batch].reshape(settings.steps, -1)):
        rate = settings.rate * (1 + np.cos(np.pi * step / settings.steps)) / 2
        yield training.images[chosen], training.labels[chosen], rate


def _parts(settings):
    """The training set in batches of the run's size, none of them tiny."""
    training, _ = digits()
    edges = range(0, 1400 - settings.batch // 2, settings.batch)
    for start in edges:
        stop = 1400 if start == edges[-1] else start + settings.batch
        yield training.images[start:stop], training.labels[start:stop]


def _loss(logits, labels):
    """The sum of cross-entropies."""
    return float(functional.cross_entropy(torch.as_tensor(logits), torch.from_numpy(labels), reduction="sum"))


def _in_numpy(settings, before, at_step):
    network = Perceptron(settings)
    before(network.states)
    for step, (images, labels, rate) in enumerate(_batches(settings)):
        logits = network.train(images)
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(p)), labels] -= 1
        network.descend(p / np.float32(len(p)), rate)
        at_step(network.states, step)

    names, moments = {id(state): name for name, state in network.states.items()}, {}

    def by_batch(x, state, relu):
        _add(moments, names[id(state)], x)
        return cubn.forward_train(x, state, relu=relu, update=False)[0]

    losses = [
        sum(_loss(network.forward(images, normalize), labels) for images, labels in _parts(settings)) / 1400
        for normalize in (by_batch, cubn.forward)
    ]
    return Run(settings, network.states, moments, *losses)


def _in_torch(settings, before, at_step):
    model = build(settings)
    before(model)
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), settings.rate, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(model.parameters(), settings.rate)
    for step, (images, labels, rate) in enumerate(_batches(settings)):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        functional.cross_entropy(model(torch.from_numpy(images)), torch.from_numpy(labels)).backward()
        optimizer.step()
        at_step(model, step)
    return measured(settings, model)


@torch.no_grad()
def measured(settings, model):
    """The Run of a model that was trained."""
    by_batch = copy.deepcopy(model)
    moments = {}
    for name, norm in norms(by_batch).items():
        norm.train()
        norm.register_forward_pre_hook(_taking(moments, name))
    losses = [
        sum(_loss(network(torch.from_numpy(images)), labels) for images, labels in _parts(settings)) / 1400
        for network in (by_batch, model.eval())
    ]
    return Run(settings, model, moments, *losses)


def _taking(moments, name):
    return lambda module, inputs: _add(moments, name, inputs[0])


def _add(moments, name, x):
    taken = cubn.moments(x)
    moments[name] = moments[name] + taken if name in moments else taken
