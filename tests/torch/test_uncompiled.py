"""Models without what `torch.compile` made of them."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch._dynamo")

from cubn.torch._models.uncompiled import uncompiled  # noqa: E402


@pytest.fixture
def compiled_now():
    """Whether what is compiled runs so."""
    runs = []

    def backend(graph, inputs):
        def run(*arguments):
            runs.append(1)
            return graph(*arguments)

        return run

    double = torch.compile(lambda x: 2 * x, backend=backend)

    def now():
        before = len(runs)
        double(torch.ones(3))
        return len(runs) > before

    return now


def test_nothing_is_compiled_meanwhile(compiled_now):
    assert compiled_now()
    with uncompiled():
        assert not compiled_now()
    assert compiled_now()


def test_threads_whose_turns_overlap_leave_the_compiler_on(compiled_now):
    first, second = uncompiled(), uncompiled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not compiled_now()
    second.__exit__(None, None, None)
    assert compiled_now()


def test_an_exception_leaves_the_compiler_on(compiled_now):
    with pytest.raises(KeyError), uncompiled():
        raise KeyError
    assert compiled_now()
