"""What kernels are told: one block of 64-bit integers, the same for every kernel. Addresses and strides are in
bytes.
"""

from __future__ import annotations

from array import array

FIELDS = (
    "task",
    *(f"unused_{i}" for i in range(15)),  # the next task to claim, apart from what is only read
    "tasks",
    "samples",
    "channels",
    "positions",
    "x",
    "x_sample",
    "x_channel",
    "x_position",
    "y",
    "y_sample",
    "y_channel",
    "y_position",  # y, or dx
    "g",
    "g_sample",
    "g_channel",
    "g_position",  # residual, or dy
    "r",
    "r_sample",
    "r_channel",
    "r_position",  # dresidual
    "mask",
    "mask_sample",
    "x_offsets",
    "y_offsets",
    "g_offsets",
    "r_offsets",
    "mask_offsets",  # int64[S]: where a position is, for strided arrays
    "bits",
    "bits_sample",
    "bits_channel",
    "bits_position",  # 16-bit words: a row a channel, or (bits_position > 0) a position
    "coefficients",
    "coefficient_row",  # table of arithmetic.Coefficients: rows of acc, one entry a channel
    "rows",
    "steps",
    "chunk",
    "chunks",  # int64[.][4], see plan.py; channels a task takes; tasks a row
    "node_first",
    "node_second",
    "node_count",  # float64[row][C] twice, int64[row]
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
    "second",  # int64[1] and float64[C]: statistics, a root or sums
    "gamma",
    "gamma_code",
    "gamma_stride",
    "beta",
    "beta_code",
    "beta_stride",
    "eps",
    "momentum",
    "cumulative",  # float64 bits; 1: momentum is 1 / (batches kept)
    "old_mean",
    "old_mean_stride",
    "old_var",
    "old_var_stride",
    "new_mean",
    "new_mean_stride",
    "new_var",
    "new_var_stride",
    "running_code",
    "tracked",
    "skipped",  # running statistics and int64[C] counters
    "block",  # rows of the elementwise pass a task takes
)
OFFSET = {name: 8 * i for i, name in enumerate(FIELDS)}
_NONE = [0] * len(FIELDS)
_INDEX = {name: i for i, name in enumerate(FIELDS)}


def parameters(**fields: int) -> array[int]:
    """The block for one launch; what is not named is 0."""
    values = _NONE.copy()
    for name, value in fields.items():
        values[_INDEX[name]] = value
    return array("q", values)
