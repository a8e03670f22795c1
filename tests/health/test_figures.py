"""Figures are drawn of whatever layers hold, the same each time, without a window or pyplot."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import cubn
from cubn.health import Monitor, figures, train_eval_gap
from cubn.health.layer import layers_of

pytest.importorskip("matplotlib")


def state(features=6, wrong=False):
    made = cubn.BatchNormState(features)
    for seed in range(3):
        cubn.forward_train(np.random.default_rng(seed).standard_normal((8, features, 4), dtype=np.float32), made)
    if wrong:
        made.running_var[:3] = 0, np.nan, 5.6e-45
        made.running_mean[4] = -np.inf
        made.gamma[5] = 0
    return made


def history(wrong):
    watched = state()
    with Monitor(watched, every=1, on_finding=lambda found: None) as monitor:
        for step in range(12):
            cubn.forward_train(np.random.default_rng(step).standard_normal((8, 6, 4), dtype=np.float32), watched)
            if wrong and step == 6:
                watched.running_var[2], watched.running_mean[1] = 0, np.nan
            monitor.step()
    return monitor.history["state"]


def gap(wrong):
    x = np.random.default_rng(0).standard_normal((8, 6, 4), dtype=np.float32)
    return train_eval_gap({"a": state(wrong=wrong), "b": state()}, [{"a": x, "b": x}])


def with_moments(wrong):
    x = np.random.default_rng(0).standard_normal((8, 6, 4), dtype=np.float32)
    return replace(layers_of(state(wrong=wrong))[0], moments=cubn.moments(x))


DRAWN = {
    "gain_histogram": lambda wrong: figures.gain_histogram(layers_of([state(wrong=wrong), state()])),
    "statistics": lambda wrong: figures.statistics(layers_of([state(wrong=wrong), state()])),
    "channels_by_steps": lambda wrong: figures.channels_by_steps(history(wrong)),
    "running_against_batch": lambda wrong: figures.running_against_batch(with_moments(wrong)),
    "running_against_batch of a history": lambda wrong: figures.running_against_batch(history(wrong)),
    "gap_by_layer": lambda wrong: figures.gap_by_layer(gap(wrong)),
}


@pytest.mark.parametrize("wrong", [pytest.param(False, marks=pytest.mark.full), True])
@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_drawn_of_good_and_of_bad_values_and_is_the_same_text_each_time(name, wrong):
    figure = DRAWN[name](wrong)
    text = figures.svg(figure)
    assert text.startswith("<svg") and "</svg>" in text
    assert text == figures.svg(figure) == figures.svg(DRAWN[name](wrong))
    assert figure.get_size_inches()[0] == 8


NAMES = ["\x1b[31mred", "\udc80", "$x$", "a$b", "層", "\u202eabc", "a^{b}_c", "\\frac{$", "", "long." * 60]


def test_any_name_is_drawn_as_text_that_can_be_read():
    layers = [replace(layer, name=name) for layer, name in zip(layers_of([state()] * len(NAMES)), NAMES, strict=True)]
    labels = [label.get_text() for label in figures.gain_histogram(layers).axes[1].get_yticklabels()]
    assert labels[:5] == [r"\x1b[31mred", r"\udc80", "$x$", "a$b", r"\u5c64"], "one row for each, whatever it is called"
    assert all(len(label) <= 24 for label in labels)
    figures.gain_histogram(layers).draw_without_rendering()
    for name in NAMES[:3]:
        figures.running_against_batch(replace(with_moments(wrong=False), name=name)).draw_without_rendering()


WILD = [0.0, -0.0, np.nan, np.inf, -np.inf, 5e-324, 5.6e-45, 3.4e38, 1.7e308, -1.7e308, -1e-9, 1.0]


@pytest.mark.parametrize("values", [[-1e-9] * 6, [1.0] * 6, [1.7e308] * 6, WILD[:6], WILD[6:]], ids=str)
def test_any_values_are_drawn_without_a_warning(values):
    layer = replace(with_moments(wrong=False), running_var=np.array(values), running_mean=np.array(values[::-1]))
    for draw in (figures.gain_histogram, figures.statistics):
        draw([replace(layer, eps=1e-5 if values[0] == values[1] else 1e-300)]).draw_without_rendering()
    figures.running_against_batch(layer).draw_without_rendering()


def test_a_band_holds_the_channels_that_chance_explains_and_no_others():
    layer = with_moments(wrong=False)
    layer = replace(layer, running_mean=layer.moments.mean.copy(), running_var=layer.moments.var().copy())
    layer.running_mean[3] += 1
    labels = [text.get_text() for text in figures.running_against_batch(layer).axes[0].get_legend().get_texts()]
    assert labels == ["chance", "5 channels within", "1 channels beyond"]


def test_a_report_has_figures_of_its_layers_and_none_where_there_is_nothing():
    report = cubn.diagnose([state(wrong=True), state()])
    assert [title for title, _ in figures.of_report(report)] == ["Gains", "Running statistics"]
    assert "<svg" in report.to_html()
    assert figures.of_report(cubn.diagnose([cubn.BatchNormState(2, track=False)])) == []
    of_many = figures.of_report(cubn.diagnose([*(state() for _ in range(50)), state(wrong=True)]))
    assert "50" in [label.get_text() for label in of_many[0][1].axes[1].get_yticklabels()], "the one with a finding"


def test_drawing_leaves_pyplot_and_matplotlib_s_settings_alone():
    program = """
import sys, matplotlib, cubn
from cubn.health import figures
from cubn.health.layer import layers_of
figures.svg(figures.statistics(layers_of(cubn.BatchNormState(3))))
print("matplotlib.pyplot" in sys.modules, matplotlib.rcParams["svg.hashsalt"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "None"]
