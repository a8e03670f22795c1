"""How work is cut for CUDA: pure functions of extents, layout, alignment, dtype and the device's limits.

No result depends on what is chosen here. A plan says which kernel of `kernels/` runs, how it is specialised, on which
grid, and the parameters that follow from shapes alone; `backend.py` adds the addresses.
"""

from cubn.backends.cuda.plan.launch import (
    OCTET,
    THREADS,
    VECTOR_BYTES,
    Fields,
    Launch,
    Layout,
    Limits,
    Options,
    What,
    has_relu_mask,
    option,
)
from cubn.backends.cuda.plan.layouts import elementwise_layout, is_dense, layout_of, octets_are_vectors, position_step
from cubn.backends.cuda.plan.passes import channelwise, elementwise
from cubn.backends.cuda.plan.reductions import finish, merge_rows, reduction, root, vector_of
from cubn.backends.cuda.plan.resident import on_chip, slab, slab_channels
from cubn.backends.cuda.plan.tickets import ticketed

__all__ = [
    "OCTET",
    "THREADS",
    "VECTOR_BYTES",
    "Fields",
    "Launch",
    "Layout",
    "Limits",
    "Options",
    "What",
    "channelwise",
    "elementwise",
    "elementwise_layout",
    "finish",
    "has_relu_mask",
    "is_dense",
    "layout_of",
    "merge_rows",
    "octets_are_vectors",
    "on_chip",
    "option",
    "position_step",
    "reduction",
    "root",
    "slab",
    "slab_channels",
    "ticketed",
    "vector_of",
]
