"""What kernels are told: one block of 64-bit integers, the same for every kernel. Addresses and strides are in
bytes.
"""

from __future__ import annotations

from cubn._types import ITEMSIZE, VECTOR_CODES, Affine, Operand, Operands, Vector

OPERANDS = Operands._fields
VECTORS = ("gamma", "beta", "old_mean", "old_var", "new_mean", "new_var", "dgamma", "dbeta")

RELAID = ("g", "y", "r")
"""Operands that are copied where the caller does not have them in x's layout."""

RANGES = 8
"""Into which tasks are cut at most."""

FIELDS = (
    "claimed",
    *(f"{name}_claimed" for name in RELAID),  # of the copies of an operand
    *(f"unused_{i}" for i in range(4, 8 * RANGES)),  # counters for each range of tasks, on a cache line of its own
    "pass_claimed",
    *(f"unused_{i}" for i in range(8 * RANGES + 1, 16 * RANGES)),  # the same of an elementwise pass
    "tasks",
    "pass_tasks",
    "ranges",
    "pass_ranges",
    "samples",
    "channels",
    "positions",
    *(f"{name}{part}" for name in OPERANDS for part in ("", "_sample", "_channel", "_position")),
    *(f"{name}_given{part}" for name in RELAID for part in ("", "_sample", "_channel", "_position")),
    "relaid_tasks",
    "relaid_ranges",
    "relaid_block",  # blocks a task copies
    *(f"{name}_offsets" for name in OPERANDS),  # int64[S]: where a position is, for strided arrays
    *(f"{name}{part}" for name in VECTORS for part in ("", "_code", "_stride")),
    "relu_mask",
    "relu_mask_sample",
    "relu_mask_channel",
    "relu_mask_position",  # 16-bit words: a row a channel, or (bits_position > 0) a position
    "coefficients",
    "coefficient_row",  # table of arithmetic.Coefficients: rows of acc, one entry a channel
    "rows",
    "chunk",
    "chunks",  # int64[.][4], see plan.py; channels a task takes; tasks a row
    "steps",
    "step_table",  # int64[steps][2], the rows to merge
    "node_first",
    "node_second",
    "node_row",
    "node_count",  # float64[row][C] twice, node_row bytes from row to row; int64[row]
    "tables",
    "tail",  # shares of the column tree, for a full tile then for the tail
    "scratch",
    "scratch_size",  # per worker, and where in it:
    "at_pivot",
    "at_counts",
    "at_columns",
    "at_buffer",
    "at_node",
    "at_tiles",
    "at_samples",
    "at_spread",
    "stream",  # 1: stores bypass the caches
    "count",
    "mean",
    "m2",
    "var",
    "invstd",
    "first",
    "second",  # int64[1] and float64[C]: statistics; a root or sums
    "kept_gamma",
    "kept_beta",  # float64[C]
    "eps",
    "momentum",
    "cumulative",  # float64 bits; 1: momentum is 1 / (batches kept)
    "ddof",  # of the running variance, m2 / (count - ddof)
    "tracked",
    "skipped",  # int64[C] counters
    "block",  # rows of the elementwise pass a task takes; or elements, where coefficients repeat after `entries`,
    "entries",
    "period",  # and are in the table over and over, so many in all
)
OFFSET = {name: 8 * i for i, name in enumerate(FIELDS)}

BLOCK = -(-len(FIELDS) // 16) * 16
"""Numbers in a block: the fields, and what fills the last vector."""

Fields = dict[str, int]


def of_operand(name: str, o: Operand) -> Fields:
    size, position = ITEMSIZE[o.dtype], o.position_strides[0] if o.position_strides else 0
    strides = {"sample": o.sample_stride, "channel": o.channel_stride, "position": position}
    return {f"{name}_{along}": stride * size for along, stride in strides.items()}


def of_vector(name: str, v: Vector | None) -> Fields:
    return {f"{name}_code": VECTOR_CODES[v.dtype], f"{name}_stride": v.stride * ITEMSIZE[v.dtype]} if v else {}


def of_affine(affine: Affine) -> Fields:
    return of_vector("gamma", affine.gamma) | of_vector("beta", affine.beta)
