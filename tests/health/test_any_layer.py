"""No arrays, options or counters make a rule or a report fail, and none of them is changed."""

import json
import warnings

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import cubn
from cubn.health import as_text
from cubn.health.diagnose import examine
from cubn.health.layer import Layer, layers_of

SPECIAL = [0.0, -0.0, 1.0, -1.0, np.nan, np.inf, -np.inf, 5e-324, 1e-45, 1e-40, 6e-5, 65504.0, 3.4e38, 1.8e308]
NUMBERS = st.one_of(st.sampled_from(SPECIAL), st.floats())
COUNTS = st.integers(0, 2**62 - 1)
OPTION = st.one_of(st.none(), NUMBERS)


@st.composite
def layers(draw, name="a"):
    C = draw(st.integers(0, 5))

    def maybe(dtype, elements):
        return draw(st.one_of(st.none(), arrays.arrays(dtype, C, elements=elements)))

    count = draw(st.integers(0, 3))
    x = draw(arrays.arrays(np.float64, (count, max(C, 1)), elements=NUMBERS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moments = cubn.moments(x)
    return Layer(
        name,
        C,
        **{key: maybe(np.float64, NUMBERS) for key in ("gamma", "beta", "running_mean", "running_var")},
        dtypes=draw(
            st.dictionaries(st.sampled_from(["running_mean", "gamma"]), st.sampled_from(["float16", "float32"]))
        ),
        eps=draw(OPTION),
        momentum=draw(st.one_of(OPTION, st.just("cumulative"))),
        tracked=maybe(np.int64, COUNTS),
        skipped=maybe(np.int64, COUNTS),
        skipped_lately=maybe(np.float64, st.floats(0, 1)),
        moments=draw(st.sampled_from([None, moments])),
    )


@settings(max_examples=80)
@given(layers(), layers("b"), st.booleans())
def test_no_layer_makes_a_rule_fail(first, second, ranks):
    if ranks:
        first = Layer(**{**vars(first), "ranks": {1: second, 2: None}})
    report = examine([first, second])
    assert {found.severity for found in report.findings} <= {"error", "warning", "info"}
    for found in report.findings:
        features = {"a": first, "b": second}[found.layer].num_features
        assert all(0 <= channel < features for channel in found.channels) and type(found.channels) is tuple
    json.loads(report.to_json())
    assert str(report) and report._repr_html_()
    assert as_text.in_colour(report.layers, report.findings)


@settings(max_examples=30)
@given(arrays.arrays(np.float32, (4, 3), elements=st.floats(width=32)), st.sampled_from(["float16", "float32"]))
def test_states_are_left_as_they_are(values, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of overflow in float16
        held = values.astype(dtype)
    gamma, beta, mean, var = held
    state = cubn.BatchNormState.from_arrays(gamma=gamma, beta=beta, running_mean=mean, running_var=var, check=False)
    before = held.tobytes()
    (layer,) = cubn.diagnose(state).layers
    assert held.tobytes() == before
    np.testing.assert_array_equal(layer.running_var, var.astype(np.float64))


@settings(max_examples=30)
@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.dictionaries(st.text() | st.integers(), x)))
def test_trees_without_batch_norms_have_none(tree):
    if isinstance(tree, dict):
        assert layers_of(tree) == []
