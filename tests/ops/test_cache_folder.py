"""The folder of object files: what is found in it may be hostile, broken or another user's, and is never run then."""

import contextlib
import errno
import functools
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from cubn.backends import folder, kernel_files
from cubn.backends.cpu import cache
from cubn.cli.info import info

resource = pytest.importorskip("resource", reason="this system has neither owners nor limits of files")

STRANGER = 4242  # a user and a group without an entry in the password database
needs_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture(autouse=True)
def not_yet_told():
    """Forget what was found and said before."""
    kernel_files.tell.cache_clear()
    folder._walked.cache_clear()
    yield
    folder._walked.cache_clear()


@pytest.fixture
def umask():
    """Set the umask; it is put back after the test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.fixture
def place(tmp_path, monkeypatch, umask):
    """An empty cache folder, which CUBN_CACHE_DIR names."""
    monkeypatch.setenv("CUBN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def home(tmp_path, monkeypatch, umask):
    """A home folder, in which the user's own cache is."""
    monkeypatch.delenv("CUBN_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def public(monkeypatch, umask):
    """A folder that every user can reach, and the cache folder in it."""
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    path.chmod(0o755)
    monkeypatch.setenv("CUBN_CACHE_DIR", str(path / "cache"))
    yield path
    shutil.rmtree(path)


@contextlib.contextmanager
def another_user():
    os.setegid(STRANGER)
    os.seteuid(STRANGER)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def file_of(place):
    return place / cache.fingerprint() / "kernel.o"


def mode(path):
    return stat.S_IMODE(path.lstat().st_mode)


def files(place):
    return sorted(path.name for path in place.rglob("*") if not path.is_dir())


# Where the folder is


def test_a_user_without_a_home_has_no_cache(monkeypatch, tmp_path, caplog):
    for name in ("CUBN_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    monkeypatch.chdir(tmp_path)
    assert cache.cache_folder() is None
    cache.store("kernel", b"code")
    assert cache.load("kernel") is None
    assert cache.load("another") is None
    assert files(tmp_path) == []
    assert "not used, as this user has no home folder; set CUBN_CACHE_DIR" in cache.state()
    assert len(caplog.messages) == 1


@needs_root
def test_a_container_user_without_a_home_can_compute(tmp_path):
    """As `docker run --user 4242` starts a process, but for HOME=/."""
    program = """
        import os, numpy, cubn
        cubn.moments(numpy.ones((4, 3)))  # imports what that user might not be allowed to read
        del os.environ["CUBN_CACHE_DIR"]
        os.setgid(4242); os.setuid(4242)
        assert cubn.moments(numpy.ones((4, 3), "float32")).mean.tolist() == [1, 1, 1]
        from cubn.backends.cpu import cache
        assert cache.cache_folder() is None
    """
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "CUBN_CACHE_DIR": ""}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd="/")
    assert run.returncode == 0, run.stderr
    assert "this user has no home folder" in run.stderr


@pytest.mark.parametrize("named", ["cache", "./cache", "~/cache", "~"])
def test_a_relative_folder_is_refused(named, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CUBN_CACHE_DIR", named)
    monkeypatch.chdir(tmp_path)
    cache.store("kernel", b"code")
    assert cache.load("kernel") is None
    assert list(tmp_path.iterdir()) == []
    assert cache.cache_folder() is None
    assert f"CUBN_CACHE_DIR must be an absolute path; got {named!r}" in cache.state()
    assert f"got {named!r}" in caplog.text


@pytest.mark.parametrize("home", ["", "home", "~", "."])
def test_a_home_that_is_no_absolute_path_is_none(home, monkeypatch):
    monkeypatch.delenv("CUBN_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", home)
    assert cache.cache_folder() is None


def test_a_relative_xdg_folder_is_ignored(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    assert cache.cache_folder() == home / ".cache" / "cubn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "caches"))
    assert cache.cache_folder() == home / "caches" / "cubn"


def test_a_home_that_is_not_there_is_not_made(home, caplog):
    home.rmdir()
    cache.store("kernel", b"code")
    assert not home.exists()
    assert "is not there" in caplog.text
    assert "is not there" in cache.state()


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_have_other_folders(system, home, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setenv("LOCALAPPDATA", str(home / "AppData"))
    expected = {"darwin": home / "Library" / "Caches" / "cubn", "win32": home / "AppData" / "cubn"}
    assert cache.cache_folder() == expected[system]
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("LOCALAPPDATA")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert cache.cache_folder() is None


def test_a_name_that_is_no_text_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBN_CACHE_DIR", os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    cache.store("kernel", b"code")
    assert cache.load("kernel") == b"code"
    assert r"/\xff (writable)" in info().encode().decode()


def test_switching_off_is_no_reason_to_say_anything(monkeypatch, caplog):
    monkeypatch.setenv("CUBN_CACHE_DIR", "")
    cache.store("kernel", b"code")
    assert cache.load("kernel") is None
    assert not caplog.messages


# What is found in it


def test_a_file_in_the_place_of_another_is_no_file(place, monkeypatch):
    cache.store("kernel", b"code")
    cache.store("other", b"other code")
    os.replace(file_of(place).with_name("other.o"), file_of(place))
    assert cache.load("kernel") is None
    cache.store("kernel", b"code")
    shutil.copytree(file_of(place).parent, place / "another")
    monkeypatch.setattr(cache, "fingerprint", lambda: "another")
    assert cache.load("kernel") is None


def a_pipe(path):
    os.mkfifo(path)


def a_socket(path):
    os.mknod(path, stat.S_IFSOCK | 0o600)


def a_device(path):
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # zeros without an end


def a_folder(path):
    path.mkdir()


def a_link(path):
    cache.store("kernel", b"code")
    path.symlink_to(path.rename(path.with_name("target.o")))


def a_link_to_itself(path):
    path.symlink_to(path)


def a_link_to_nothing(path):
    path.symlink_to("nothing")


def a_sparse_file(path):
    with path.open("wb") as file:
        file.truncate(1 << 42)


def a_file_others_write(path):
    cache.store("kernel", b"code")
    path.chmod(0o666)


def a_file_the_group_writes(path):
    cache.store("kernel", b"code")
    os.chown(path, -1, STRANGER)
    path.chmod(0o664)


def a_file_of_another_user(path):
    cache.store("kernel", b"code")
    os.chown(path, STRANGER, -1)


def a_truncated_file(path):
    cache.store("kernel", b"code")
    path.write_bytes(path.read_bytes()[:-1])


def a_longer_file(path):
    cache.store("kernel", b"code")
    path.write_bytes(path.read_bytes() + b"\0")


def a_flipped_bit(path):
    cache.store("kernel", b"code")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


HEALED = [a_pipe, a_link_to_itself, a_link_to_nothing, a_sparse_file, a_file_others_write, a_truncated_file]
HEALED += [a_longer_file, a_flipped_bit, a_link, a_socket]
OF_ROOT = [pytest.param(make, marks=needs_root) for make in (a_device, a_file_of_another_user, a_file_the_group_writes)]


@pytest.mark.parametrize("make", [*HEALED, *OF_ROOT, a_folder])
def test_what_is_no_object_file_is_not_loaded_and_replaced(make, place):
    cache.store("first", b"code")
    make(file_of(place))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert cache.load("kernel") is None
    cache.store("kernel", b"new code")
    assert cache.load("kernel") == (None if make is a_folder else b"new code")
    assert (len(os.listdir("/proc/self/fd")) if before else 0) == before  # nothing stays open
    assert not [name for name in files(place) if name.startswith(folder.LEFTOVER)]


def test_what_is_refused_is_said_once(place, caplog):
    cache.store("kernel", b"code")
    file_of(place).chmod(0o666)
    assert [cache.load("kernel"), cache.load("kernel")] == [None, None]
    assert len(caplog.messages) == 1
    assert "can be written by other users (mode 0666)" in caplog.messages[0]
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize("make", [a_pipe, a_folder, pytest.param(a_device, marks=needs_root)])
def test_what_is_no_regular_file_is_not_even_read(make, place, caplog):
    cache.store("first", b"code")
    make(file_of(place))
    assert cache.load("kernel") is None
    assert f"{str(file_of(place))!r} is not a regular file" in caplog.text


@pytest.mark.parametrize("what", ["file", "link", "link to itself", "pipe"])
@pytest.mark.parametrize("where", ["folder", "version"])
def test_what_is_no_folder_is_not_used(what, where, place, caplog):
    path = place if where == "folder" else file_of(place).parent
    path.parent.mkdir(exist_ok=True)
    (place.parent / "elsewhere").mkdir()
    make = {
        "file": path.touch,
        "link": lambda: path.symlink_to(place.parent / "elsewhere"),
        "link to itself": lambda: path.symlink_to(path),
        "pipe": lambda: os.mkfifo(path),
    }
    make[what]()
    cache.store("kernel", b"code")
    kept = b"code" if (what, where) == ("link", "folder") else None  # as people do, to have it on another disk
    assert cache.load("kernel") == kept
    assert ("(writable)" in cache.state()) == bool(kept)


def test_a_folder_deleted_in_between_is_made_again(place):
    cache.store("kernel", b"code")
    assert cache.load("kernel") == b"code"
    shutil.rmtree(place)
    assert cache.load("kernel") is None
    cache.store("kernel", b"code")
    assert cache.load("kernel") == b"code"


def test_folders_above_are_looked_at_once(place, monkeypatch):
    cache.store("kernel", b"code")
    assert cache.load("kernel") == b"code"
    monkeypatch.setattr(os, "lstat", None)
    assert cache.load("kernel") == b"code"


# What is left in it


@contextlib.contextmanager
def files_of_at_most(size):
    """As on a full disk, writing more fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1, 40, 100_000])
def test_a_full_disk_leaves_nothing_behind(size, place):
    cache.store("first", b"code")
    with files_of_at_most(size):
        cache.store("kernel", bytes(1_000_000))
    assert cache.load("kernel") is None
    assert files(place) == ["first.o"]


@pytest.mark.parametrize("failing", ["open", "fstat", "replace"])
def test_a_failing_write_leaves_nothing_behind_and_is_said_once(failing, place, monkeypatch, caplog):
    cache.store("first", b"code")

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, failing, full)
        cache.store("kernel", b"code")
        cache.store("kernel", b"code")
    assert files(place) == ["first.o"]
    (said,) = caplog.messages
    assert said.endswith(f"{str(place)!r} cannot be written (No space left on device)")


def test_an_interrupted_write_leaves_nothing_behind(place, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.store("kernel", b"code")
    assert files(place) == []


@pytest.mark.parametrize("hours", [-1000, -2, 2, 1000])
def test_what_crashed_processes_left_is_removed_whatever_the_clock(hours, place):
    cache.store("kernel", b"code")
    left, begun = (file_of(place).with_name(f"{folder.LEFTOVER}{name}") for name in ("left", "begun"))
    left.touch()
    begun.touch()
    now = file_of(place).stat().st_mtime
    os.utime(left, (now + 3600 * hours,) * 2)
    cache.store("other", b"code")
    assert files(place) == [begun.name, "kernel.o", "other.o"]


STORING = """
import sys
from cubn.backends.cpu import cache
own = bytes([int(sys.argv[1])]) * 300_000
for _ in range(50):
    cache.store("kernel", own)
    found = cache.load("kernel")
    assert found in {bytes([i]) * 300_000 for i in range(3)}
"""


def test_processes_that_keep_the_same_kernel_find_a_whole_one(place):
    command = [sys.executable, "-c", STORING]
    storing = [subprocess.Popen([*command, str(i)]) for i in range(3)]
    assert [process.wait(timeout=120) for process in storing] == [0, 0, 0]
    assert files(place) == ["kernel.o"]


# Whose it is


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077])
def test_the_users_own_folder_is_private(mask, home, umask):
    umask(mask)
    cache.store("kernel", b"code")
    own = home / ".cache" / "cubn"
    assert [mode(path) for path in (own.parent, own, file_of(own).parent, file_of(own))] == [0o700] * 3 + [0o600]
    assert cache.load("kernel") == b"code"


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o027, 0o077])
def test_a_named_folder_follows_the_umask_and_is_never_writable_by_others(mask, place, umask):
    umask(mask)
    cache.store("kernel", b"code")
    assert [mode(path) for path in (place, file_of(place).parent)] == [0o755 & ~mask] * 2
    assert mode(file_of(place)) == 0o644 & ~mask
    assert cache.load("kernel") == b"code"


@pytest.mark.parametrize("bits", [0o777, 0o1777, 0o757])
@pytest.mark.parametrize("where", ["above", "folder", "version"])
def test_a_folder_others_can_write_is_refused(where, bits, place, caplog):
    cache.store("kernel", b"code")
    path = {"above": place.parent, "folder": place, "version": file_of(place).parent}[where]
    path.chmod(bits)
    folder._walked.cache_clear()
    is_sticky_above = (where, bits) == ("above", 0o1777)  # as /tmp is
    assert cache.load("kernel") == (b"code" if is_sticky_above else None)
    cache.store("other", b"code")
    assert files(place) == (["kernel.o", "other.o"] if is_sticky_above else ["kernel.o"])
    reason = f"{str(path)!r} can be written by other users (mode {bits:04o})"
    assert (reason in cache.state()) is not is_sticky_above
    assert caplog.messages == ([] if is_sticky_above else [caplog.messages[0]])
    assert (reason in caplog.text) is not is_sticky_above


@needs_root
@pytest.mark.parametrize("where", ["above", "folder", "version"])
def test_a_folder_of_another_user_is_refused(where, place):
    cache.store("kernel", b"code")
    path = {"above": place.parent, "folder": place, "version": file_of(place).parent}[where]
    os.chown(path, STRANGER, -1)
    folder._walked.cache_clear()
    assert cache.load("kernel") is None
    assert f"{str(path)!r} belongs to user {STRANGER}, who is neither root nor" in cache.state()


@needs_root
def test_folders_above_the_home_are_not_looked_at(home):
    """As of ssh: who can change them can change everything of the user's."""
    os.chown(home.parent, STRANGER, -1)
    cache.store("kernel", b"code")
    assert cache.load("kernel") == b"code"


@needs_root
def test_root_in_the_home_of_a_user_keeps_nothing(home, caplog):
    """As `sudo -E` starts a process."""
    os.chown(home, STRANGER, -1)
    cache.store("kernel", b"code")
    assert list(home.iterdir()) == []
    assert "belongs to user" in caplog.text


@needs_root
def test_a_folder_of_roots_serves_every_user(public):
    cache.store("kernel", b"code")
    with another_user():
        assert cache.load("kernel") == b"code"
        cache.store("other", b"code")
        assert cache.load("other") is None
        assert "not writable: kernels that are not there" in cache.state()
    assert files(public) == ["kernel.o"]


@needs_root
def test_a_folder_of_a_users_serves_that_user_alone(public, monkeypatch):
    monkeypatch.setattr(cache, "_software", functools.cache(lambda: "which that user might not be allowed to read"))
    public.chmod(0o1777)
    with another_user():
        cache.store("kernel", b"code")
        assert cache.load("kernel") == b"code"
    assert cache.load("kernel") is None
    assert f"belongs to user {STRANGER}" in cache.state()


@needs_root
def test_a_folder_others_cannot_read_is_no_error(public, umask):
    umask(0o077)
    cache.store("kernel", b"code")
    with another_user():
        assert cache.load("kernel") is None
        cache.store("kernel", b"code")
        assert "cannot be used: Permission denied" in cache.state()
    assert cache.load("kernel") == b"code"


@needs_root
def test_a_read_only_file_system_can_be_read(place):
    cache.store("kernel", b"code")
    mounts = [["mount", "--bind", place, place], ["mount", "-o", "remount,ro,bind", place]]
    if any(subprocess.run(command, capture_output=True).returncode for command in mounts):
        subprocess.run(["umount", place], capture_output=True)
        pytest.skip("nothing can be mounted here")
    try:
        assert cache.load("kernel") == b"code"
        cache.store("other", b"code")
        assert cache.load("other") is None
        assert "not writable" in cache.state()
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_group_of_ones_own_may_write(home):
    """Where everybody has a group of their own and a umask of 002."""
    if not folder._is_private(os.getegid()):
        pytest.skip("this user has no such group")
    (home / ".cache").mkdir()
    (home / ".cache").chmod(0o775)
    cache.store("kernel", b"code")
    assert cache.load("kernel") == b"code"


@needs_root
def test_a_group_with_other_members_may_not_write(home):
    (home / ".cache").mkdir()
    os.chown(home / ".cache", -1, STRANGER)
    (home / ".cache").chmod(0o775)
    cache.store("kernel", b"code")
    assert files(home) == []
    assert "can be written by other users (mode 0775)" in cache.state()


def test_a_system_without_owners_keeps_files_all_the_same(place, monkeypatch):
    monkeypatch.setattr(folder, "HAS_OWNERS", False)
    cache.store("kernel", b"code")
    left = file_of(place).with_name(f"{folder.LEFTOVER}left")
    left.touch()
    os.utime(left, (0, 0))
    cache.store("kernel", b"other code")
    assert cache.load("kernel") == b"other code"
    assert files(place) == ["kernel.o"]
    assert "(writable)" in cache.state()
