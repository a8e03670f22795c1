"""The examples in docstrings give what they say."""

import doctest
import sys

import pytest

import cubn.health  # noqa: F401


@pytest.mark.parametrize("module", ["monitor", "train_eval_gap"])
def test_examples_in_docstrings_print_what_they_say(module):
    failed, tried = doctest.testmod(sys.modules[f"cubn.health.{module}"])
    assert tried and not failed
