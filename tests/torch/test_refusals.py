"""What is refused is refused in torch's words, and the ranks that wait for it are told."""

import re

import pytest

torch = pytest.importorskip("torch")

import cubn.torch  # noqa: E402
from cubn.errors import CollectiveMismatch  # noqa: E402
from cubn.sync import threads  # noqa: E402
from cubn.torch import functional  # noqa: E402

X = torch.linspace(-1, 1, 96).reshape(2, 3, 4, 4)
ONES, ZEROS = torch.ones(3), torch.zeros(3)
BAD = {
    "dtype": dict(input=X.int()),
    "sparse": dict(input=X.to_sparse()),
    "axes": dict(input=torch.ones(3)),
    "channels": dict(input=torch.ones(2, 4, 4)),
    "weight": dict(weight=torch.ones(4)),
    "bias": dict(bias=torch.ones(3, dtype=torch.int64)),
    "one of two": dict(running_var=None),
    "two dtypes": dict(running_var=ONES.double()),
    "shared": dict(running_mean=ONES, running_var=ONES),
    "mask": dict(mask=torch.ones(2, 4, 3, dtype=torch.bool)),
    "dtype of mask": dict(mask=X[:, 0]),
    "no list": dict(mask=[True]),
    "one value": dict(mask=torch.arange(32).reshape(2, 4, 4) == 0),
    "no value": dict(mask=torch.zeros(2, 4, 4, dtype=torch.bool)),
    "residual": dict(residual=X[:1]),
    "dtype of residual": dict(residual=X.double()),
    "eps": dict(eps=-1.0),
}


IN_TRAINING = {"one of two", "one value", "no value", "shared"}


@pytest.mark.parametrize(
    ("bad", "training"), [*((bad, True) for bad in BAD), *((bad, False) for bad in sorted(BAD.keys() - IN_TRAINING))]
)
def test_errors_speak_of_torchs_arguments(bad, training):
    given = dict(input=X, running_mean=ZEROS.clone(), running_var=ONES.clone(), training=training) | BAD[bad]
    with pytest.raises((TypeError, ValueError)) as caught:
        functional.batch_norm(**given)
    text = str(caught.value)
    assert text.startswith("batch_norm: ")
    assert not re.search(
        r"\b(x|gamma|beta|forward\w*|from_arrays|array|BatchNormState)\b", text.replace("an array", "")
    )


def test_an_input_of_other_channels_is_named_as_what_does_not_fit():
    with pytest.raises(ValueError, match="input must have 4 channels, on its second axis; got 3"):
        cubn.torch.BatchNorm2d(4)(X)


@pytest.mark.parametrize("bad", [X[0], X.int(), X[:, :2], X.to_sparse()], ids=["axes", "dtype", "channels", "sparse"])
def test_ranks_are_told_of_what_another_rank_refused(bad):
    """And are in step afterwards."""

    def rank(comm):
        module = cubn.torch.BatchNorm2d(3, comm=comm)
        with pytest.raises((TypeError, ValueError)) as caught:
            module(X if comm.rank else bad)
        assert module.num_batches_tracked == 0
        return type(caught.value), module(X), comm.exchanges

    (own, y, exchanges), (told, other, as_many) = threads.run(2, rank)
    assert own is not CollectiveMismatch and told is CollectiveMismatch
    assert torch.equal(y, other) and exchanges == as_many
