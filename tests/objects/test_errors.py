"""In whose name messages are: that of the operation the user called, whatever is called meanwhile."""

import ast
import threading
from pathlib import Path

import numpy as np
import pytest

import cubn
from cubn import errors
from cubn.errors import reported

X = np.random.default_rng(0).standard_normal((3, 4, 2)).astype(np.float32)


class Calling:
    """An array that calls something when it is asked for its memory, and then has one axis too few for an x."""

    def __init__(self, call):
        self.call = call

    def __dlpack__(self, **options):
        self.call()
        return np.ones(3, np.float32).__dlpack__(**options)

    def __dlpack_device__(self):
        return 1, 0


def refused():
    with pytest.raises(ValueError, match=r"^finite_mask: x must have 2 axes or more"):
        cubn.finite_mask(X[0, 0])


MEANWHILE = {
    "nothing": lambda: None,
    "an operation": lambda: cubn.moments(X),
    "an operation that is refused": refused,
    "a training step and its backward": lambda: cubn.backward(X, cubn.forward_train(X, cubn.BatchNormState(4))[1]),
    "a state": lambda: cubn.BatchNormState(4).to_dict(),
    "an option": lambda: setattr(cubn.BatchNormState(4), "eps", 0.5),
}


@pytest.mark.parametrize("meanwhile", MEANWHILE)
def test_what_an_array_calls_meanwhile_speaks_for_itself_alone(meanwhile):
    with pytest.raises(ValueError, match=r"^forward: x must have 2 axes or more"):
        cubn.forward(Calling(MEANWHILE[meanwhile]), cubn.BatchNormState(4))
    assert reported() == "cubn"


def test_a_thread_does_not_speak_for_another():
    inside, checked = threading.Event(), threading.Event()

    def wait():
        inside.set()
        assert checked.wait(60)

    def call():
        with pytest.raises(ValueError, match=r"^forward: x must have 2 axes or more"):
            cubn.forward(Calling(wait), cubn.BatchNormState(4))
        done.append(reported())

    done = []
    thread = threading.Thread(target=call)
    thread.start()
    assert inside.wait(60)
    assert reported() == "cubn"
    with pytest.raises(ValueError, match=r"^moments: x must have 2 axes or more"):
        cubn.moments(X[0, 0])
    checked.set()
    thread.join()
    assert done == ["cubn"]


def test_a_call_that_is_known_says_no_name(monkeypatch):
    state = cubn.BatchNormState(4)

    def step():
        y, saved = cubn.forward_train(X, state)
        return cubn.backward(y, saved), cubn.forward(X, state)

    step()
    monkeypatch.setattr(errors, "_reporting", None)
    step()
    with pytest.raises(AttributeError):
        cubn.finite_mask(X)


def test_no_function_passes_on_a_name():
    """But for the few whose message begins with a name of its own."""
    passing = {
        f"{path.name}: {node.name}"
        for path in Path(cubn.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        for argument in (*node.args.args, *node.args.kwonlyargs)
        if argument.arg == "function" and argument.annotation and ast.unparse(argument.annotation).startswith("str")
    }
    assert passing == {"errors.py: message", "errors.py: reporting_as"}
