"""How faults get into a run: what changes a batch norm before, during or after its training."""

import copy
from dataclasses import replace

import numpy as np
import torch

import cubn
from tests.health.runs.digits import digits
from tests.health.runs.training import norms, train


def norm_of(subject, layer):
    return list(norms(subject).values())[layer]


def array(norm, name):
    """An array of a batch norm, in NumPy, to be written."""
    if isinstance(norm, cubn.BatchNormState):
        return getattr(norm, name)
    return getattr(norm, {"gamma": "weight", "beta": "bias"}.get(name, name)).detach().numpy()


def setting(layers, name, change, channels=()):
    """After training: these channels of an array are changed."""

    def after(run):
        for layer in layers:
            values = array(norm_of(run.subject, layer), name)
            chosen = list(channels or range(len(values)))
            values[chosen] = change(values[chosen])

    return after


def to(value):
    return lambda values: value


def times(factor):
    return lambda values: values * np.float32(factor)


def rounded(values):
    """As through a checkpoint in float16."""
    return values.astype(np.float16).astype(np.float32)


def rounded_to_bfloat16(values):
    return torch.from_numpy(values).bfloat16().float().numpy()


def a_bad_batch(layer, channel, steps):
    """At some steps a layer sees an infinity in one channel, as an overflow would bring it."""

    def at_step(subject, step):
        if step not in steps:
            return
        norm = norm_of(subject, layer)
        x = np.random.default_rng(step).standard_normal((16, norm.num_features, 2), np.float32)
        x[3, channel] = np.inf
        if isinstance(norm, cubn.BatchNormState):
            cubn.forward_train(x, norm)
        else:
            norm(torch.from_numpy(x))

    return at_step


def frozen(layer):
    """A layer is in eval mode from the beginning."""
    return lambda subject: norm_of(subject, layer).eval()


def momentum_of(layer, momentum):
    def before(subject):
        norm_of(subject, layer).momentum = momentum

    return before


def seeing(images):
    """After training the running statistics are taken again, of other images."""

    def after(run):
        model = run.subject.train()
        with torch.no_grad():
            for part in np.split(images(digits()[0].images), 50):
                model(torch.from_numpy(part))
        model.eval()

    return after


def forgotten(layers):
    """Running statistics are 0 and 1 again, though they were updated."""

    def after(run):
        for layer in layers or range(len(norms(run.subject))):
            norm = norm_of(run.subject, layer)
            array(norm, "running_mean")[:] = 0
            array(norm, "running_var")[:] = 1

    return after


def uncounted(layers):
    def after(run):
        for layer in layers or range(len(norms(run.subject))):
            norm_of(run.subject, layer).num_batches_tracked.zero_()

    return after


def swapped(first, second):
    """Two layers' statistics are exchanged, as by a list of arrays in another order."""

    def after(run):
        for name in ("running_mean", "running_var"):
            a, b = (array(norm_of(run.subject, layer), name) for layer in (first, second))
            a[:], b[:] = b.copy(), a.copy()

    return after


def halved(layer):
    def after(run):
        norm_of(run.subject, layer).half()

    return after


def a_jump(at, factor):
    """From a step on the weights are moved much faster than the statistics follow."""

    def at_step(subject, step):
        if step == at:
            with torch.no_grad():
                for module in subject.modules():
                    if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                        module.weight.mul_(factor)

    return at_step


def starved(part, channels, since=0):
    """From a step on, what comes before a batch norm has no weights into these channels: they are constant."""

    def at_step(subject, step):
        if step >= since:
            with torch.no_grad():
                subject[part].weight[list(channels)] = 0

    return at_step


def of_other_seeds(run):
    """Ranks that trained alone, each on batches of its own."""
    return [run.subject] + [train(replace(run.settings, seed=run.settings.seed + i)).subject for i in (1, 2)]


def one_of_three(layer, name, channel):
    """Of three ranks the second has another number."""

    def ranks(run):
        subjects = [copy.deepcopy(run.subject) for _ in range(3)]
        array(norm_of(subjects[1], layer), name)[channel] += 0.25
        return subjects

    return ranks
