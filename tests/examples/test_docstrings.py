"""The examples in docstrings give what they say."""

import doctest
import importlib
import sys
from pathlib import Path

import pytest

import cubn

MODULES = [
    *(cubn.Moments.__module__, cubn.moments.__module__, cubn.backward_from.__module__),
    *(cubn.recalibrate.__module__, cubn.merge_states.__module__),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_print_what_they_say(name):
    failed, tried = doctest.testmod(sys.modules[name])
    assert tried and not failed


ADAPTER = Path(cubn.__file__).parent / "torch"


@pytest.mark.parametrize("name", [path.stem for path in ADAPTER.glob("*.py") if ">>> " in path.read_text()])
def test_examples_in_the_adapter_s_docstrings_print_what_they_say(name):
    pytest.importorskip("torch")
    failed, tried = doctest.testmod(importlib.import_module(f"cubn.torch.{name}"))
    assert tried and not failed
