"""The examples in docstrings give what they say."""

import doctest

import pytest

import cubn

MODULES = [
    cubn.Moments.__module__,
    cubn.moments.__module__,
    cubn.backward_from.__module__,
    "cubn.torch._report",
    "cubn.torch.conversion",
    "cubn.torch.folding",
    "cubn.torch.fusion",
    "cubn.torch.lazy",
    "cubn.torch.modules",
    "cubn.torch.sync_batch_norm",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_print_what_they_say(name):
    failed, tried = doctest.testmod(pytest.importorskip(name))
    assert tried and not failed
