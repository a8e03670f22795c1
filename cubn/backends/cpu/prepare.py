"""Launches but for their addresses: what follows from layouts, types and options is worked out once and kept."""

from __future__ import annotations

from cubn._arrays.numpy import address_of
from cubn._kept import kept
from cubn._tree import Block, root_order
from cubn._types import (
    VECTOR_CODES,
    Affine,
    CombineOptions,
    GradientOptions,
    NormalizeOptions,
    Operands,
    Running,
    Vector,
)
from cubn.backends.cpu import plan, stages
from cubn.backends.cpu.assemble import (
    STATISTICS,
    Arguments,
    Copies,
    Names,
    in_statistics,
    launch,
    over_channels,
    over_elements,
)
from cubn.backends.cpu.compile import Kernel
from cubn.backends.cpu.launch import Launch
from cubn.backends.cpu.parameters import Fields, of_affine, of_vector
from cubn.backends.cpu.pool import Stage
from cubn.backends.cpu.stages import Elements, Part, kernel, layout_of, reading_of

AFFINE = ("gamma", "beta")
OLD = ("old_mean", "old_var")
UPDATE = (*OLD, "new_mean", "new_var", "tracked", "skipped", "cumulative")
SUMS = ("first", "second")
NODES = ("node_count", "node_first", "node_second")
COPY = Vector(0, "float64", 1)  # of gamma or beta, among the statistics

# --- whole batches ----------------------------------------------------------------------------------------------------


@kept(plan.KEPT_BYTES)
def forward(elements: Elements, affine: Affine, running: Running, options: NormalizeOptions) -> Launch:
    tabulate = stages.over_channels("tabulate_frozen", dtype=elements.dtype)
    arguments = Arguments(("x", "g", "y", "mask", *AFFINE, *OLD), ("eps",))
    fields = of_affine(affine) | _of_running("old", running)
    room = Part(room=dict.fromkeys(("mean", "var", "invstd"), 8 * elements.extents.C))
    exact_mean = elements.dtype == "float64" or running.mean.dtype != "float64"
    run = stages.elementwise("normalize", (*_specialised(options), exact_mean), elements)
    return over_elements((room, tabulate, run), elements, arguments, fields, strided=layout_of(elements) == "strided")


@kept(plan.KEPT_BYTES)
def train(
    elements: Elements, affine: Affine, running: Running | None, biased: bool, options: NormalizeOptions
) -> Launch:
    """Moments, statistics and y, a few channels at a time or else in two passes; copies of gamma and beta, and what the
    running statistics become.
    """
    C = elements.extents.C
    copied = tuple(name for name in AFFINE if getattr(affine, name))
    statistics = in_statistics(C, (*STATISTICS, *(f"kept_{name}" for name in copied)))
    arguments = Arguments(("x", "g", "y", "mask", "relu_mask", *AFFINE, *UPDATE), ("eps", "momentum"), statistics)
    fields = of_affine(affine)
    rest: tuple[Stage, ...] = (Stage(kernel("keep"), 1),) if copied else ()
    if running:
        rest += (Stage(_update(running), 1),)
        fields |= _of_running("old", running) | _of_running("new", running) | {"ddof": int(not biased)}
    specialised = _specialised(options)
    run = stages.slab("train_slab", specialised, elements)
    if run:
        return over_elements((run, Part(rest)), elements, arguments, fields, strided=False)
    pass_ = stages.elementwise("normalize", specialised, elements)
    read = elements._replace(operands=Operands(elements.operands.x, mask=elements.operands.mask), relu_mask=None)
    reduced = stages.reduction("moments", (), read, None)
    finish = stages.over_channels("finish", dtype=elements.dtype)._replace(room=dict.fromkeys(SUMS, 8 * C))
    strided = "strided" in (layout_of(elements), reading_of(read))
    return over_elements((reduced, finish, pass_, Part(rest)), elements, arguments, fields, strided=strided)


@kept(plan.KEPT_BYTES)
def backward(
    elements: Elements, copies: Copies, parameters: tuple[Vector, Vector] | None, options: GradientOptions
) -> Launch:
    """Sums, dx, dgamma and dbeta, a few channels at a time or else in two passes."""
    dtype = elements.dtype
    statistics, fields = _with_copies(elements.extents.C, copies)
    arguments = Arguments(("x", "g", "y", "r", "mask", "relu_mask", *SUMS, "dgamma", "dbeta"), (), statistics)
    gradients = Part()
    if parameters:
        gradients = Part((Stage(kernel("parameter_gradients"), 1),))
        fields |= of_vector("dgamma", parameters[0]) | of_vector("dbeta", parameters[1])
    tabulate = stages.over_channels("tabulate", dtype=dtype)
    specialised = options.relu, options.frozen, options.residual
    run = stages.slab("backward_slab", specialised, elements)
    if run:
        return over_elements((tabulate, run, gradients), elements, arguments, fields, strided=False)
    pass_ = stages.elementwise("input_gradient", specialised, elements)
    x, g, _, _, mask = elements.operands
    read = elements._replace(operands=Operands(x, g, mask=mask))
    reduced = stages.reduction("sums", (options.relu,), read, None)
    gradient = stages.over_channels(*() if options.frozen else ("tabulate_gradient",), dtype=dtype)
    strided = "strided" in (layout_of(elements), reading_of(read))
    return over_elements((tabulate, reduced, gradient, pass_, gradients), elements, arguments, fields, strided=strided)


@kept(plan.KEPT_BYTES)
def frozen(elements: Elements, affine: Affine, running: Running, options: NormalizeOptions) -> Launch:
    """Statistics and copies of gamma and beta for a backward, and y."""
    C, copied = elements.extents.C, tuple(name for name in AFFINE if getattr(affine, name))
    statistics = in_statistics(C, (*STATISTICS, *(f"kept_{name}" for name in copied)))
    arguments = Arguments(("x", "g", "y", "mask", "relu_mask", *AFFINE, *OLD), ("eps",), statistics)
    first = Part(tuple(Stage(kernel(name), 1) for name in (("frozen", "keep") if copied else ("frozen",))))
    tabulate = stages.over_channels("tabulate", dtype=elements.dtype)
    run = stages.elementwise("normalize", _specialised(options), elements)
    fields = of_affine(affine) | _of_running("old", running)
    strided = layout_of(elements) == "strided"
    return over_elements((first, tabulate, run), elements, arguments, fields, strided=strided)


# --- parts of batches -------------------------------------------------------------------------------------------------


@kept(plan.KEPT_BYTES)
def normalize(elements: Elements, affine: Affine, options: NormalizeOptions) -> Launch:
    tabulate = stages.over_channels("tabulate", dtype=elements.dtype)
    run = stages.elementwise("normalize", _specialised(options), elements)
    arguments = Arguments(("x", "g", "y", "mask", "relu_mask", *AFFINE), (), in_statistics(elements.extents.C))
    return over_elements(
        (tabulate, run), elements, arguments, of_affine(affine), strided=layout_of(elements) == "strided"
    )


@kept(plan.KEPT_BYTES)
def backward_apply(elements: Elements, copies: Copies, options: GradientOptions | CombineOptions) -> Launch:
    if isinstance(options, CombineOptions):
        frozen, run = False, stages.elementwise("combination", (options.relu, options.third), elements)
    else:
        frozen, specialised = options.frozen, (options.relu, options.frozen, options.residual)
        run = stages.elementwise("input_gradient", specialised, elements)
    names = ("tabulate",) if frozen else ("tabulate", "tabulate_gradient")
    tabulate = stages.over_channels(*names, dtype=elements.dtype)
    statistics, fields = _with_copies(elements.extents.C, copies)
    arguments = Arguments(("x", "g", "y", "r", "mask", "relu_mask", *SUMS), (), statistics)
    return over_elements((tabulate, run), elements, arguments, fields, strided=layout_of(elements) == "strided")


@kept(plan.KEPT_BYTES)
def moments(elements: Elements, start: int) -> Launch:
    run = stages.reduction("moments", (), elements, start)
    strided = reading_of(elements) == "strided"
    return over_elements((run,), elements, Arguments(("x", "mask", *NODES)), {}, strided=strided)


@kept(plan.KEPT_BYTES)
def backward_sums(elements: Elements, copies: Copies, options: GradientOptions, start: int) -> Launch:
    tabulate = stages.over_channels("tabulate", dtype=elements.dtype)
    run = stages.reduction("sums", (options.relu,), elements, start)
    statistics, fields = _with_copies(elements.extents.C, copies)
    arguments = Arguments(("x", "g", "mask", "relu_mask", *NODES), (), statistics)
    strided = reading_of(elements) == "strided"
    return over_elements((tabulate, run), elements, arguments, fields, strided=strided)


# --- channels ---------------------------------------------------------------------------------------------------------


@kept(plan.KEPT_BYTES)
def root(what: str, C: int, blocks: tuple[Block, ...], row_bytes: int) -> Launch:
    """The merges of neighbouring blocks into the first, and what that holds then."""
    steps = plan.table_of(root_order(blocks))
    fields = {"channels": C, "node_row": row_bytes, "steps": len(steps), "step_table": address_of(steps)}
    run = Part((Stage(kernel("merge_rows", "", what), 1),), keeps=(steps,))
    return launch((run,), Arguments((*NODES, "count", *SUMS)), fields, len(blocks) * row_bytes, None)


@kept(plan.KEPT_BYTES)
def statistics(C: int) -> Launch:
    run = Part((Stage(kernel("statistics"), 1),))
    return over_channels(run, C, Arguments(SUMS, ("eps",), in_statistics(C)), {})


@kept(plan.KEPT_BYTES)
def frozen_statistics(C: int, running: Running) -> Launch:
    run = Part((Stage(kernel("frozen"), 1),))
    return over_channels(run, C, Arguments(OLD, ("eps",), in_statistics(C)), _of_running("old", running))


@kept(plan.KEPT_BYTES)
def keep(C: int, affine: Affine) -> Launch:
    copied = in_statistics(C, (f"kept_{name}" for name in AFFINE if getattr(affine, name)))
    run = Part((Stage(kernel("keep"), 1),))
    return over_channels(run, C, Arguments(AFFINE, (), copied), of_affine(affine))


@kept(plan.KEPT_BYTES)
def update(C: int, old: Running, new: Running, biased: bool) -> Launch:
    fields = _of_running("old", old) | _of_running("new", new) | {"ddof": int(not biased)}
    arguments = Arguments(UPDATE, ("momentum",), in_statistics(C))
    return over_channels(Part((Stage(_update(old), 1),)), C, arguments, fields)


@kept(plan.KEPT_BYTES)
def parameter_gradients(C: int, dgamma: Vector, dbeta: Vector) -> Launch:
    run = Part((Stage(kernel("parameter_gradients"), 1),))
    fields = of_vector("dgamma", dgamma) | of_vector("dbeta", dbeta)
    return over_channels(run, C, Arguments((*SUMS, "dgamma", "dbeta"), (), in_statistics(C)), fields)


# --- what they have in common -----------------------------------------------------------------------------------------


def _specialised(options: NormalizeOptions) -> tuple[bool, bool, bool]:
    return options.residual, options.relu, options.keep_mask


def _update(running: Running) -> Kernel:
    return kernel("update", "", VECTOR_CODES[running.mean.dtype])


def _of_running(when: str, running: Running) -> Fields:
    return of_vector(f"{when}_mean", running.mean) | of_vector(f"{when}_var", running.var)


def _with_copies(C: int, copies: Copies) -> tuple[Fields, Fields]:
    """Offsets in the statistics and the fields of copies of gamma and beta."""
    names: Names = tuple(name for name in AFFINE if getattr(copies, name))
    fields: Fields = {}
    for name in names:
        fields |= of_vector(name, COPY)
    return in_statistics(C, (*STATISTICS, *names)), fields
