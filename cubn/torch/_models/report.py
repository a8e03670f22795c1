"""What was done to which module of a model, and why not to the others."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """Of `fuse` or `fold`.

    Attributes
    ----------
    done : dict of str to str
        By the path of a batch norm, what it is now.
    left : dict of str to str
        By the path of a batch norm, why it was left as it was.
    difference : float or None
        Of `fold` with an example: the largest difference of an output, relative to the largest output.

    Examples
    --------
    >>> from cubn.torch import Report
    >>> print(Report({"bn1": "BatchNormReLU2d"}, {"bn2": "it has hooks"}))
    bn1: BatchNormReLU2d
    bn2: left, it has hooks
    """

    done: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    difference: float | None = None

    def __str__(self) -> str:
        lines = [f"{path or 'the model'}: {what}" for path, what in self.done.items()]
        lines += [f"{path or 'the model'}: left, {why}" for path, why in self.left.items()]
        if self.difference is not None:
            lines.append(f"outputs differ by {self.difference:.1e}, relative to the largest")
        return "\n".join(lines)
