"""Files of machine code: written whole or not at all, and read only where they are what was written under their name.

A cache that cannot be written or read is no error: the log says so once.
"""

from __future__ import annotations

import functools
import hashlib
import logging

from cubn.backends.folder import Refused, cache_folder, opened

logger = logging.getLogger("cubn")


def _digest(key: str, name: str, code: bytes) -> bytes:
    """What a file begins with: no other file, be it whole, can stand in its place."""
    return hashlib.sha256(f"{key}/{name}\n".encode() + code).digest()


@functools.cache
def tell(reason: str) -> None:
    """Say once why the cache is not used, or keeps nothing."""
    logger.warning("cubn: compiled anew, not taken from the kernel cache: %s", reason)


def read(key: str, name: str, ending: str) -> bytes | None:
    """The code, or None if there is none, or none that is whole and may be run. `key`: the folder in the cache's."""
    try:
        with opened(key) as folder:
            content = folder and folder.read(name + ending)
    except Refused as reason:
        tell(str(reason))
        return None
    except OSError:
        return None
    digest, code = (content or b"")[:32], (content or b"")[32:]
    return code if code and _digest(key, name, code) == digest else None


def keep(key: str, name: str, ending: str, code: bytes) -> None:
    """Keep code, if there is a place to."""
    try:
        with opened(key, make=True) as folder:
            if folder:
                folder.write(name + ending, _digest(key, name, code) + code)
    except Refused as reason:
        tell(str(reason))
    except OSError as error:
        tell(f"{str(cache_folder())!r} cannot be written ({error.strerror})")
