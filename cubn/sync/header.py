"""The header: 64 bytes in which each rank says what it is about to do, and the errors where ranks do not agree."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cubn.errors import CollectiveMismatch, message
from cubn.sync.transport import Bytes

OPERATIONS = ("nothing", "several operations", "moments", "forward_train", "backward", "double_backward", "diagnose")
OPTIONS = (
    *("with sizes", "update", "biased", "relu", "residual", "frozen", "global parameter gradients"),
    "device memory",
)
DTYPES = ("none", "float16", "bfloat16", "float32", "float64")
MAX_OPERATIONS = 32
"""In one exchange: the header has two bits for each."""

HEADER = np.dtype(
    [
        ("operation", "<u1"),
        ("dtype", "<u1"),
        ("operations", "<u2"),
        ("flags", "<u2"),
        ("exchange", "<u2"),
        ("C", "<i8"),
        ("N", "<i8"),
        ("eps", "<f8"),
        ("momentum", "<f8"),  # -1 for None
        ("about", "<i8"),
        ("values", "<u8"),  # 2 bits for each operation
        ("rest", "<u8"),  # hash of everything on which ranks must agree, of all operations
    ]
)
_FAILED, _DECLARED = 1, 2  # flags; the rest of them are OPTIONS, which begin with the latter
_EACH_ITS_OWN = np.zeros((), HEADER)
_EACH_ITS_OWN["N"], _EACH_ITS_OWN["values"] = -1, 2**64 - 1
_AGREED = ~_EACH_ITS_OWN.reshape(1).view(np.uint8)  # the bits on which ranks must agree

Headers = NDArray[np.void]
"""Of all ranks, in rank order; of dtype HEADER."""


class Terms(NamedTuple):
    """What a rank says of an operation. All but N and values must be the same on every rank."""

    operation: str
    C: int
    N: int
    dtype: str
    eps: float = 0.0
    momentum: float | None = 0.0
    start: int = 0
    """Global index of the batch's first sample."""
    forward: int = 0
    """Number of the exchange whose gradient this is."""
    values: int = 2
    """This rank's values per channel, where they matter and are known; 2 is always enough."""
    options: frozenset[str] = frozenset()
    """Those of OPTIONS that are on."""
    gathers: bool = True
    """Whether the nodes of other ranks are needed."""

    @property
    def width(self) -> int:
        """Words of a node as it is gathered, if it is: its count, and two for each channel."""
        return 2 * self.C + 1 if self.gathers else 0


# --- what a rank says -----------------------------------------------------------------------------------------------


def encode(
    all_terms: Sequence[Terms],
    exchange: int,
    declared: tuple[int, ...] | None,
    *,
    on_device: bool = False,
    failed: bool = False,
) -> Bytes:
    """The header of a rank's operations; of several, the hash says the rest."""
    first = all_terms[0] if all_terms else Terms(OPERATIONS[0], 0, 0, "none")
    several = len({terms.operation for terms in all_terms}) > 1
    on = first.options | {
        name for name, is_on in ((OPTIONS[0], declared is not None), (OPTIONS[-1], on_device)) if is_on
    }
    header = (
        OPERATIONS.index("several operations" if several else first.operation),
        DTYPES.index(first.dtype),
        len(all_terms),
        _FAILED * failed | sum(1 << bit for bit, name in enumerate(OPTIONS, 1) if name in on),
        exchange & 0xFFFF,
        sum(terms.C for terms in all_terms),
        first.N,
        first.eps,
        -1.0 if first.momentum is None else first.momentum,
        first.start or first.forward,
        sum(min(terms.values, 2) << 2 * index for index, terms in enumerate(all_terms)),
        _hash(tuple(terms._replace(N=0, values=0) for terms in all_terms), declared),
    )
    return np.array([header], HEADER).view(np.uint8)


@lru_cache(1024)
def _hash(all_terms: tuple[Terms, ...], declared: tuple[int, ...] | None) -> int:
    """The same number in every process for the same terms."""
    agreed = [(*terms._replace(options=frozenset()), sorted(terms.options)) for terms in all_terms]
    return int.from_bytes(hashlib.blake2b(repr((agreed, declared)).encode(), digest_size=8).digest())


# --- what all of them said ------------------------------------------------------------------------------------------


def decode(received: Bytes) -> Headers:
    return received.view(HEADER)


def samples(headers: Headers) -> tuple[int, ...]:
    """Of each rank."""
    return tuple(headers["N"].tolist())


def values(headers: Headers, index: int) -> int:
    """Values per channel of an operation over all ranks; 2 or more stands for enough."""
    return int((headers["values"] >> np.uint64(2 * index) & np.uint64(3)).sum())


def any_declared(headers: Headers) -> bool:
    """Whether a rank knew the samples of all, and so did not wait for headers."""
    return bool((headers["flags"] & _DECLARED).any())


# --- disagreement ---------------------------------------------------------------------------------------------------

_SAID: dict[str, Callable[[Any], str]] = {  # the fields in which ranks must agree, as an error says them
    "exchange": lambda h: f"exchange {h['exchange']}",
    "operation": lambda h: OPERATIONS[h["operation"]],
    "operations": lambda h: f"{h['operations']} operations",
    "C": lambda h: f"C={h['C']}",
    "dtype": lambda h: f"dtype={DTYPES[h['dtype']]}",
    "eps": lambda h: f"eps={h['eps']}",
    "momentum": lambda h: f"momentum={None if h['momentum'] < 0 else h['momentum']}",
    "about": lambda h: f"start={h['about']}" if OPERATIONS[h["operation"]] == "moments" else f"of forward {h['about']}",
    "flags": lambda h: ", ".join(name for bit, name in enumerate(OPTIONS, 1) if h["flags"] >> bit & 1) or "no options",
    "rest": lambda h: f"{_hashed(h)} with hash {h['rest']:016x}",
}


def _hashed(h: np.void) -> str:
    """What of all that is in the hash no other field has said."""
    if not h["flags"] & _DECLARED:
        return "operations"
    return "sizes" if h["operations"] == 1 else "operations or sizes"


def disagreement(headers: Headers) -> CollectiveMismatch | None:
    """The error every rank raises if the headers do not say the same, or say that a rank failed."""
    failed = np.flatnonzero(headers["flags"] & _FAILED).tolist()
    if failed:
        return failure(failed)
    rows = headers.view(np.uint8).reshape(len(headers), -1)
    if not ((rows ^ rows[0]) & _AGREED).any():
        return None
    differing = [name for name in _SAID if (headers[name] != headers[name][0]).any()]
    if "operation" in differing:  # then the rest is bound to differ
        differing = ["operation"]
    elif len(differing) > 1:
        differing = [name for name in differing if name != "rest"]  # a hash of the others, too
    said: dict[str, list[int]] = {}
    for rank, header in enumerate(headers):
        said.setdefault(", ".join(_SAID[name](header) for name in differing), []).append(rank)
    got = "; ".join(f"{what} on {_ranks(ranks)}" for what, ranks in said.items())
    remedy = "Call the same operations with the same options in the same order on all of them."
    return CollectiveMismatch(message("ranks", "do the same thing", got, remedy))


def failure(failed: Sequence[int]) -> CollectiveMismatch:
    """The error of the other ranks where some have failed."""
    remedy = "Its own error says more." if len(failed) == 1 else "Their own errors say more."
    return CollectiveMismatch(message("ranks", "do the same thing", f"an error on {_ranks(failed)}", remedy))


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0, 2-5`."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
