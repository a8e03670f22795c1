"""The folder compiled kernels are kept in: where it is, and whether what lies in it may be run.

It holds executable code, so it is trusted as ssh trusts its keys: if nobody but root and this user can put anything
there. docs/kernel_cache.md states the rules. Files are opened relative to a folder that is held open, and looked at
once they are open, so that nothing can be exchanged between the look and the use.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Folder", "Refused", "cache_folder", "examined", "opened"]

HAS_OWNERS = hasattr(os, "geteuid")  # Windows has neither these modes nor files opened relative to a folder
LIMIT = 64 << 20  # bytes of a file, a hundred times the largest kernel
LEFTOVER_AGE = 3600  # seconds after which nobody is still writing a file
LEFTOVER = ".writing-"  # what the name of a file begins with until it is whole

_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_READ_FILE = os.O_RDONLY | _NOFOLLOW | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW | getattr(os, "O_BINARY", 0)
_READ_FOLDER = os.O_RDONLY | _NOFOLLOW | getattr(os, "O_DIRECTORY", 0)


class Refused(Exception):
    """There is no folder to keep kernels in, or others could put code of their own there; the text is why."""


class _Named(NamedTuple):
    """The folder that is asked for, and the modes of what is made in it, before the umask."""

    path: str
    folder_mode: int
    file_mode: int


def _home() -> str | None:
    home = os.path.expanduser("~")  # "~" itself if there is neither HOME nor an entry in the password database
    return home if os.path.isabs(home) and os.environ.get("HOME") != "" else None


def _users_cache() -> str | None:
    """The folder this system has for a user's caches."""
    if sys.platform == "win32":
        return os.environ.get("LOCALAPPDATA")
    home = _home()
    if sys.platform == "darwin":
        return home and os.path.join(home, "Library", "Caches")
    asked = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(asked):  # "must be absolute [...] consider the path invalid and ignore it"
        return asked
    return home and os.path.join(home, ".cache")


def _named() -> _Named | None:
    """None if $CUBN_CACHE_DIR is empty, which switches the cache off."""
    asked = os.environ.get("CUBN_CACHE_DIR")
    if asked == "":
        return None
    if asked is None:
        parent = _users_cache()
        if parent is None or not os.path.isabs(parent):
            raise Refused("this user has no home folder; set CUBN_CACHE_DIR to an absolute path")
        return _Named(os.path.join(parent, "cubn"), 0o700, 0o600)
    if not os.path.isabs(asked):
        raise Refused(f"CUBN_CACHE_DIR must be an absolute path; got {asked!r}")
    return _Named(asked, 0o755, 0o644)


def cache_folder() -> Path | None:
    """Where kernels are kept: $CUBN_CACHE_DIR, else the user's cache folder.

    None if it is switched off with '', or if there is no absolute path to it.
    """
    try:
        named = _named()
    except Refused:
        return None
    return named and Path(named.path)


def _is_private(group: int) -> bool:
    """Whether this user is a group's only member, as where everybody has a group of their own and a umask of 002."""
    import grp
    import pwd

    try:
        user, found = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return user.pw_gid == group and user.pw_name == found.gr_name and set(found.gr_mem) <= {user.pw_name}


def _check(status: os.stat_result, place: str, *, is_above: bool = False) -> None:
    """Refuse what users other than root and this one own or can write.

    A folder above the cache may be writable if it is sticky, as /tmp is: nobody can rename what others have there.
    """
    if not HAS_OWNERS:
        return
    if status.st_uid not in (0, os.geteuid()):
        raise Refused(f"{place!r} belongs to user {status.st_uid}, who is neither root nor the user of this process")
    mode = status.st_mode
    if is_above and mode & stat.S_ISVTX:
        return
    if mode & stat.S_IWOTH or (mode & stat.S_IWGRP and not _is_private(status.st_gid)):
        raise Refused(f"{place!r} can be written by other users (mode {stat.S_IMODE(mode):04o})")


def _walk(path: str, make: int | None = None) -> str:
    """The real path of a folder, all above it checked, up to the user's home or the root of the file system.

    `make` is the mode of what is missing; without one, that raises FileNotFoundError.
    """
    real = Path(os.path.realpath(path))
    above = [*reversed(real.parents), real]
    home = _home()
    if home is not None and (real_home := Path(os.path.realpath(home))) in above:
        above = above[above.index(real_home) :]
        if not os.path.isdir(real_home):
            raise Refused(f"the home folder {home!r} is not there")
    for place in above:
        if make is not None and not os.path.lexists(place):
            with contextlib.suppress(FileExistsError):
                os.mkdir(place, make)
        status = os.lstat(place)
        if not stat.S_ISDIR(status.st_mode):
            raise Refused(f"{str(place)!r} is not a folder")
        _check(status, str(place), is_above=place != real)
    return str(real)


@functools.cache
def _walked(path: str, user: int) -> str:
    """`_walk`, once in a process and for each user it becomes."""
    return _walk(path)


class Folder(NamedTuple):
    """A folder that may be trusted; held open where the system can, else only named."""

    path: str
    handle: int | None
    file_mode: int

    def _at(self, name: str) -> str:
        return name if self.handle is not None else os.path.join(self.path, name)

    def read(self, name: str) -> bytes | None:
        """The content of a file that only root and this user can have written, None if it is too long for one."""
        place = os.path.join(self.path, name)
        handle = os.open(self._at(name), _READ_FILE, dir_fd=self.handle)
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise Refused(f"{place!r} is not a regular file")
            _check(status, place)
            return os.read(handle, status.st_size) if status.st_size <= LIMIT else None
        finally:
            os.close(handle)

    def write(self, name: str, content: bytes) -> None:
        """Put a whole file in place, or none."""
        begun = LEFTOVER + os.urandom(8).hex()
        handle = os.open(self._at(begun), _NEW_FILE, self.file_mode, dir_fd=self.handle)
        try:
            with open(handle, "wb") as file:
                file.write(content)
                now = os.fstat(handle).st_mtime
            os.replace(self._at(begun), self._at(name), src_dir_fd=self.handle, dst_dir_fd=self.handle)
        except BaseException:
            self._remove(begun)
            raise
        self._remove_leftovers(now)

    def _remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._at(name), dir_fd=self.handle)

    def _remove_leftovers(self, now: float) -> None:
        """Remove what crashed processes left; `now` is by the clock of the file system, which may be another's."""
        for name in os.listdir(self.path if self.handle is None else self.handle):
            if name.startswith(LEFTOVER):
                with contextlib.suppress(OSError):
                    status = os.stat(self._at(name), dir_fd=self.handle, follow_symlinks=False)
                    if abs(now - status.st_mtime) > LEFTOVER_AGE:
                        self._remove(name)


@contextlib.contextmanager
def opened(name: str, *, make: bool = False) -> Iterator[Folder | None]:
    """A folder in the cache folder, made if it is to be and is missing; None if the cache is switched off.

    `name` tells the files of this version from those of others, and is empty if nothing can. Raises `Refused` where
    others could have put something into the folder, OSError where it is not there or cannot be used.
    """
    named = _named()
    if named is None:
        yield None
        return
    if not name:
        raise Refused("neither the source nor the bytecode of cubn can be read, to tell its versions apart")
    user = os.geteuid() if HAS_OWNERS else 0
    top = _walk(named.path, named.folder_mode) if make else _walked(named.path, user)
    path = os.path.join(top, name)
    if make:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, named.folder_mode)
    if not HAS_OWNERS:
        yield Folder(path, None, named.file_mode)
        return
    handle = os.open(path, _READ_FOLDER)
    try:
        _check(os.fstat(handle), path)
        yield Folder(path, handle, named.file_mode)
    finally:
        os.close(handle)


def examined(name: str) -> str:
    """What can be done with the folder that `opened` opens, in words."""
    anew = "every process compiles its kernels anew"
    folder = cache_folder()
    shown = os.fsencode(folder or "").decode(errors="backslashreplace")
    try:
        with contextlib.suppress(FileNotFoundError), opened(name):  # what is missing will be made
            pass
    except Refused as reason:
        return f"not used, as {reason}: {anew}"
    except OSError as error:
        return f"{shown} (cannot be used: {error.strerror}; {anew})"
    if folder is None:
        return f"switched off by an empty CUBN_CACHE_DIR: {anew}"
    places = (folder / name, folder, *folder.parents)
    existing = next(place for place in places if os.path.exists(place))
    if os.access(existing, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return f"{shown} (writable)"
    return f"{shown} (not writable: kernels that are not there are compiled anew by every process)"
