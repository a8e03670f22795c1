"""What a file is refused with."""

from __future__ import annotations

from cubn.health.wording import printable


class UnreadableFile(ValueError):
    """The file is damaged, hostile, of no format that is known here, or needs a package that is missing."""

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason))  # which may name what is in the file
