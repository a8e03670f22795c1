"""Which layer's output bits for a sample depend on the batch that the sample is in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cubn._arguments import as_int
from cubn.errors import a_type, message, reporting_as
from cubn.torch._models.bits import Difference
from cubn.torch._models.cuts import Arguments, Cut, IncomparableError
from cubn.torch._models.replay import Call, Definition, Finding, Run, by_definition

Verdict = Literal["invariant", "depends on the batch", "mixes by definition", "random by definition", "not comparable"]


@dataclass(frozen=True)
class Layer:
    """What `batch_invariance` found of one call of a module, of what is computed between two, or of the whole model."""

    path: str
    """As in `model.named_modules()`; `conv1 → bn1` between the modules; `(model)` the model as a module of its own,
    `(whole model)` the last row."""
    kind: str
    """The name of the class, or "between the modules"."""
    verdict: Verdict
    call: int = 1
    """Which call of the module, from 1."""
    batch_sizes: tuple[int, ...] = ()
    """Those at which bits differ."""
    max_abs: float = 0.0
    """The largest absolute difference."""
    max_ulp: int = 0
    """The largest difference in floating-point numbers of the output's type."""
    reason: str = ""
    """Why it is not comparable."""

    @property
    def name(self) -> str:
        """The path, with the number of a later call."""
        return self.path if self.call == 1 else f"{self.path} (call {self.call})"

    @property
    def invariant(self) -> bool:
        return self.verdict == "invariant"


@dataclass(frozen=True, repr=False)
class BatchInvariance:
    """What `batch_invariance` found; true if nothing depends on the batch but what does by definition.

    `print(report)` shows a table.
    """

    samples: int
    """How many the whole batch has."""
    batch_sizes: tuple[int, ...]
    """How many of them were run again."""
    layers: tuple[Layer, ...]
    """Every call in order of execution, with what depends on the batch between them; last, the whole model."""

    @property
    def guilty(self) -> tuple[Layer, ...]:
        """What depends on the batch, in order of execution."""
        return tuple(layer for layer in self.layers if layer.verdict == "depends on the batch")

    @property
    def first(self) -> Layer | None:
        """The first of the guilty."""
        return next(iter(self.guilty), None)

    @property
    def invariant(self) -> bool:
        """Whether nothing depends on the batch, and nothing that might was not comparable."""
        return all(layer.invariant or layer.verdict.endswith("by definition") for layer in self.layers)

    def __bool__(self) -> bool:
        return self.invariant

    def __repr__(self) -> str:
        return f"<BatchInvariance: {self._summary()}>"

    def _summary(self) -> str:
        layers = self.layers[:-1]
        guilty, missed = (
            sum(layer.verdict == verdict for layer in layers) for verdict in ("depends on the batch", "not comparable")
        )
        text = f"{guilty} of {len(layers)} layers depend on the batch"
        if self.first:
            text += f", first {self.first.name} ({self.first.kind})"
        return text + (f"; {missed} not comparable" if missed else "")

    def __str__(self) -> str:
        header = "layer", "module", "", "batch sizes", "max abs", "max ulp"
        rows = [header, *map(_cells, self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        reasons = ["", *(layer.reason and f": {layer.reason}" for layer in self.layers)]
        sizes = ", ".join(map(str, self.batch_sizes))
        head = f"{self.samples} samples, compared with {sizes} of them, the first and the last."
        return "\n".join([head, "", *map(str.__add__, lines, reasons), "", f"{self._summary()}."])


def _cells(layer: Layer) -> tuple[str, ...]:
    sizes = " ".join(map(str, layer.batch_sizes))
    size = (f"{layer.max_abs:.1e}", str(layer.max_ulp)) if sizes else ("", "")
    return layer.name, layer.kind, layer.verdict, sizes, *size


@reporting_as("batch_invariance")
def batch_invariance(
    model: nn.Module,
    x: Tensor | tuple[Any, ...] | Mapping[str, Any],
    batch_sizes: Iterable[int] | None = None,
) -> BatchInvariance:
    """Find the layers whose output bits for a sample depend on the batch that the sample is in.

    The model is run on the whole of x, and what goes into each module and comes out of it is recorded. Then it is run
    on the first b samples, and on the last b, for each b of `batch_sizes`. There every module gets the samples' rows of
    what was recorded, and its output is compared with the recorded one, bit by bit. So no layer is blamed for what it
    was handed. What a module is handed is compared too: a difference that arose since the module before is of a
    functional operation, and has a row of its own, "between the modules".

    Parameters
    ----------
    model : torch.nn.Module
        As it is to be examined: usually after `model.eval()`.
    x : Tensor, tuple or mapping
        A batch; a tuple of arguments or a mapping of keyword arguments, of whose tensors those are cut to b samples
        whose first axis is as long as the first tensor's. At least two samples, on the model's device. More samples
        find more: kernels change their order of summation at sizes of their own.
    batch_sizes : iterable of int, optional
        From 1 to the number of samples. By default 1, 2, 3, the powers of two, and all samples but one.

    Returns
    -------
    BatchInvariance
        A row for each call, `layers`, the first that depends on the batch, `first` (None if none does), and
        `invariant`, which is the truth value too. Printed, a table.

    Raises
    ------
    TypeError
        If model is not a module, x holds no tensor, or a batch size is not an integer.
    ValueError
        If x has fewer than two samples, a batch size is out of range, or the model has parameters that a first call is
        still to make (lazy modules).
    Exception
        What the model raises on the whole of x. What it raises on fewer samples is a `reason` in the report.

    Notes
    -----
    *Layers* are modules that call no other: `torch.nn.MultiheadAttention`, which computes by functions, is one. Batch
    norms are, with all that is in them, and so are compiled modules. A module is run without its hooks, which count as
    between the modules.

    *Training.* Where `model.training` holds, batch norms in training (not frozen) are reported as "mixes by
    definition", and dropouts as "random by definition"; neither is run again, so that for synchronised ones only the
    first run is a step of all ranks. Every other module is examined as in inference: batch norms are the only mixers if
    the report is true. In a model that is in inference, a batch norm that was left in training is guilty.

    *Not comparable*, with a `reason`, and never silently passed: a module or a function whose bits differ and that
    draws random numbers, or gives other bits for the very same inputs; results without tensors, or with some in which
    no axis shrinks with the batch, which need not be the first; what comes after a model took another way for b
    samples, or raised.

    *Left as found*, also after an exception: buffers (running statistics), torch's random numbers, training flags, and
    the grad mode, in which the model is run: call it under `torch.no_grad()` to see what inference does. What a module
    keeps elsewhere, in attributes of Python's, is not put back.

    Takes two runs of the model for each batch size, four where something differs, and the memory of all modules' inputs
    and outputs of the first run.

    Examples
    --------
    >>> import torch
    >>> import cubn.torch
    >>> class Share(torch.nn.Module):
    ...     def forward(self, x):
    ...         return x / len(x)
    >>> model = torch.nn.Sequential(cubn.torch.BatchNorm1d(3), Share(), torch.nn.ReLU()).eval()
    >>> report = cubn.torch.batch_invariance(model, torch.arange(24.0).reshape(8, 3), batch_sizes=(1, 4))
    >>> report.invariant, report.first.path, report.first.kind
    (False, '1', 'Share')
    >>> print(report)
    8 samples, compared with 1, 4 of them, the first and the last.
    <BLANKLINE>
    layer          module                             batch sizes  max abs  max ulp
    0              BatchNorm1d  invariant
    1              Share        depends on the batch  1 4          2.0e+01  25165824
    2              ReLU         invariant
    (whole model)  Sequential   depends on the batch  1 4          2.0e+01  25165824
    <BLANKLINE>
    1 of 3 layers depend on the batch, first 1 (Share).
    """
    arguments, samples = _checked_arguments(model, x)
    sizes = _checked_sizes(batch_sizes, samples)
    run = Run(model, arguments, samples)
    cuts = [Cut(0, samples, samples)]  # all of them again: whether the same inputs give the same bits at all
    for size in sizes:
        cuts += [Cut(0, size, samples), Cut(samples - size, samples, samples)] if size < samples else []
    failures: dict[Cut, str] = {}
    for cut in cuts:
        try:
            run.again(cut)
        except IncomparableError as reason:
            failures[cut] = str(reason)
        except Exception as error:  # of the model, for so many samples
            failures[cut] = f"{type(error).__name__} for {cut.size}: {' '.join(str(error).split())}"
    return BatchInvariance(samples, sizes, tuple(_layers(run, cuts, failures)))


def _layers(run: Run, cuts: list[Cut], failures: dict[Cut, str]) -> Iterator[Layer]:
    """In order of execution; between the modules only what has to be said."""
    counts = dict[nn.Module, int]()
    definitions = list[Definition]()
    last = "input"

    def between(call: Call, path: str) -> Iterator[Layer]:
        if call.before.differences or call.before.reasons:
            yield _layer(f"{last} → {path}", "between the modules", call.before, cuts, failures)

    for call in run.calls:
        if call.output is None:
            continue
        path, kind = call.path or "(model)", type(call.module).__name__
        number = counts[call.module] = counts.get(call.module, 0) + 1
        yield from between(call, path)
        if definition := by_definition(run.model, call.module):
            definitions.append(definition)
            yield Layer(path, kind, definition, number)
        else:
            yield _layer(path, kind, call.finding, cuts, failures, number)
        last = path
    yield from between(run.end, "output")
    whole = "(whole model)", type(run.model).__name__
    yield Layer(*whole, definitions[0]) if definitions else _layer(*whole, run.whole, cuts, failures)


def _layer(path: str, kind: str, finding: Finding, cuts: list[Cut], failures: dict[Cut, str], call: int = 1) -> Layer:
    if finding.differences:
        sizes = tuple(sorted({cut.size for cut in finding.differences}))
        largest = reduce(Difference.or_larger, finding.differences.values())
        return Layer(path, kind, "depends on the batch", call, sizes, *largest)
    missed = [cut for cut in cuts if cut not in finding.compared]
    if missed:
        reason = next(iter(finding.reasons), None) or failures[missed[0]]
        return Layer(path, kind, "not comparable", call, reason=reason)
    return Layer(path, kind, "invariant", call)


def _checked_arguments(model: nn.Module, x: Any) -> tuple[Arguments, int]:
    """The model's arguments, and how many samples they are of."""
    if not isinstance(model, nn.Module):
        raise TypeError(message("model", "be a torch.nn.Module", a_type(model)))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if torch.nn.parameter.is_lazy(tensor):
            raise ValueError(message("model", "have all its parameters", f"a lazy {name}", "Call it once before."))
    args = () if isinstance(x, Mapping) else x if isinstance(x, tuple) else (x,)
    kwargs = dict(x) if isinstance(x, Mapping) else {}
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
    if not tensors:
        rule = "be a tensor, or a tuple or mapping of arguments with a tensor among them"
        raise TypeError(message("x", rule, a_type(x)))
    samples = len(tensors[0])
    if samples < 2:
        raise ValueError(message("x", "have at least two samples", samples, shape=tuple(tensors[0].shape)))
    return (args, kwargs), samples


def _checked_sizes(batch_sizes: Iterable[int] | None, samples: int) -> tuple[int, ...]:
    if batch_sizes is None:
        powers = (1 << i for i in range(samples.bit_length()))
        return tuple(sorted({size for size in (1, 2, 3, *powers, samples - 1) if 0 < size < samples}))
    if not isinstance(batch_sizes, Iterable):
        raise TypeError(message("batch_sizes", "be integers, as in (1, 2)", a_type(batch_sizes)))
    sizes = tuple(sorted({as_int(size, "batch_sizes") for size in batch_sizes}))
    if not sizes or not 1 <= sizes[0] <= sizes[-1] <= samples:
        raise ValueError(message("batch_sizes", f"be from 1 to the {samples} samples of x", sizes or "none"))
    return sizes
