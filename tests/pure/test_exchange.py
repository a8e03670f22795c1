"""What travels between ranks, without ranks: headers, and the layout of records."""

import numpy as np
import pytest

from cubn._groups import Cut
from cubn.errors import CollectiveMismatch
from cubn.sync import header
from cubn.sync.header import Terms
from cubn.sync.records import RecordLayout, failed_ranks, failed_record

TERMS = Terms("forward_train", 6, 4, "float32", eps=1e-5, momentum=0.1, options=frozenset({"update", "relu"}))
OTHERWISE = {
    "operation": "backward",
    "C": 5,
    "N": 7,
    "dtype": "bfloat16",
    "eps": 1e-3,
    "momentum": None,
    "start": 8,
    "forward": 3,
    "values": 1,
    "options": frozenset({"update", "residual"}),
    "renorm": (3.0, 5.0),
    "gathers": False,
    "cut": Cut(4),
}


def headers(*all_terms, exchange=1, declared=None):
    """Those of ranks with these terms, each a list of operations."""
    said = [header.encode(terms, exchange, declared) for terms in all_terms]
    return header.decode(np.concatenate(said))


@pytest.mark.parametrize("field", Terms._fields)
@pytest.mark.parametrize("index", [0, 1], ids=["first", "second"])
def test_ranks_must_agree_on_everything_but_samples_and_values(field, index):
    odd = [TERMS, TERMS]
    odd[index] = TERMS._replace(**{field: OTHERWISE[field]})
    error = header.disagreement(headers([TERMS, TERMS], odd, [TERMS, TERMS]))
    if field in ("N", "values"):
        assert error is None
    else:
        assert type(error) is CollectiveMismatch
        assert "on ranks 0, 2; " in str(error) and "on rank 1. Call" in str(error)


def test_ranks_that_failed_are_named_in_runs():
    said = [header.encode([], 1, None, failed=rank in (0, 2, 3, 4, 6)) for rank in range(8)]
    got = "an error on ranks 0, 2-4, 6. Their own errors say more."
    error = header.disagreement(header.decode(np.concatenate(said)))
    assert str(error) == f"cubn: ranks must do the same thing; got {got}"


def test_a_header_is_the_same_bytes_in_every_process():
    """Ranks compare them. The hash takes part: it must not depend on the order of a set, nor on the process."""
    said = header.encode([TERMS, TERMS._replace(values=1)], 70000, (4, 0), on_device=True)
    fields = {
        "operation, dtype, operations": "03 03 02 00",
        "flags, exchange": "16 04 70 11",
        "C, N": "0c 00 00 00 00 00 00 00 04 00 00 00 00 00 00 00",
        "eps, momentum": "f1 68 e3 88 b5 f8 e4 3e 9a 99 99 99 99 99 b9 3f",
        "about, values": "00 00 00 00 00 00 00 00 06 00 00 00 00 00 00 00",
        "hash": "fb 29 8f 3f 87 63 7d 3c",
    }
    assert said.tobytes() == bytes.fromhex(" ".join(fields.values())) and len(said) == 64


def test_values_of_32_operations_are_summed_apart():
    counts = np.random.default_rng(0).integers(0, 4, (3, header.MAX_OPERATIONS))
    said = headers(*([TERMS._replace(values=int(values)) for values in row] for row in counts))
    assert [header.values(said, index) for index in range(32)] == np.minimum(counts, 2).sum(0).tolist()


def test_records_of_failed_ranks_are_found_among_all():
    layout = RecordLayout(start=5, samples=(3, 0, 4, 1), widths=(7, 0, 3))
    assert layout.blocks == (((5, 6), (6, 8)), (), ((8, 12),), ((12, 13),))
    assert layout.sizes == (160, 0, 80, 80) and layout.shape == (4, 10)
    for failed in ([], [0], [2], [0, 3], [0, 2, 3]):
        honest = [np.full((len(blocks), 10), 0.5) for blocks in layout.blocks]
        for record in honest:
            record.view(np.int64)[:, 0] = 0  # a count of nothing is no error
        sent = [failed_record(layout, rank) if rank in failed else honest[rank] for rank in range(4)]
        assert failed_ranks(layout, np.concatenate(sent)) == failed
