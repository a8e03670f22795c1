"""JSON of files."""

from __future__ import annotations

import json
from typing import Any

from cubn.health.files.unreadable import UnreadableFile


def parsed(text: bytes) -> Any:
    """What the text says."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableFile("it has JSON that is damaged, or nested too deep") from error
