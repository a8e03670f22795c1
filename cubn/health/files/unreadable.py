"""What a file is refused with."""

from __future__ import annotations


class UnreadableFile(ValueError):
    """The file is damaged, hostile, of no format that is known here, or needs a package that is missing."""
