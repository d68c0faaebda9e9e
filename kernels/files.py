"""Whole and private files: the one atomic writer of all packages. It lies here, as `errors` does, because every package may import this one."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not on Windows: neither locks nor the sweep
    fcntl = None  # type: ignore[assignment]

HAS_LOCKS = fcntl is not None
PRIVATE_MODE = 0o600
STALE_AFTER_S = 60.0
"""Age from which a temporary file that nobody holds open is swept."""

_TEMPORARY = re.compile(r"\.foretold-[0-9a-f]{16}\.part")
_CREATE = os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def cache_home() -> Path:
    """FORETOLD_HOME when set, else `foretold` in the user's cache folder (XDG_CACHE_HOME or ~/.cache).

    Raises:
        RuntimeError, OSError: there is no home folder, or no user of the name that the path begins with.
    """
    if chosen := os.environ.get("FORETOLD_HOME"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "foretold"


@contextmanager
def atomic_file(path: str | Path, *, private: bool = False, synced: bool = True) -> Iterator[BinaryIO]:
    """A binary file to write to that takes `path`'s place when the block ends without an error, and leaves it untouched otherwise.

    The content goes to a new file of a random name in the same folder, is synced, renamed, and the folder is synced. A symbolic link is followed:
    its target is replaced, the link stays. An earlier file's mode and owner are kept (the owner as far as the system allows). Temporary files that
    writers left behind when they were killed are removed.

    private: the mode is 0600, whatever an earlier file's was. synced: False for a file whose damage is noticed and that is made again then: nothing
    waits for the disk, which may be busy with gigabytes of other files.

    Raises:
        OSError: whatever the system refuses; EINVAL when something else than a regular file is there.
    """
    target = Path(os.path.realpath(path))
    earlier = None
    with suppress(FileNotFoundError):
        earlier = target.stat()
    if earlier is not None and not (stat.S_ISREG(earlier.st_mode) or stat.S_ISDIR(earlier.st_mode)):
        raise OSError(errno.EINVAL, "it is not a regular file")
    if earlier is not None and stat.S_ISDIR(earlier.st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    temporary = target.with_name(f".foretold-{secrets.token_hex(8)}.part")
    # a mode given here is cut by the umask; an earlier file's own is set below
    descriptor = os.open(temporary, os.O_WRONLY | _CREATE, PRIVATE_MODE if private or earlier is not None else 0o666)
    try:
        with open(descriptor, "wb") as file:
            try_lock(descriptor)  # tells the sweep of another process that the writer lives
            if earlier is not None and hasattr(os, "fchmod"):
                if (earlier.st_uid, earlier.st_gid) != (os.geteuid(), os.getegid()):
                    with suppress(OSError):
                        os.fchown(descriptor, earlier.st_uid, earlier.st_gid)
                os.fchmod(descriptor, PRIVATE_MODE if private else stat.S_IMODE(earlier.st_mode))
            yield file
            file.flush()
            if synced:
                os.fsync(descriptor)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if synced:
        sync_folder(target.parent)
    sweep(target.parent)


def stage_bytes(folder: Path, content: bytes) -> Path:
    """A new private file of a random name in `folder` with this content, synced; the caller renames it to where it belongs, soon. Raises OSError."""
    temporary = folder / f".foretold-{secrets.token_hex(8)}.part"
    descriptor = os.open(temporary, os.O_WRONLY | _CREATE, PRIVATE_MODE)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return temporary


def write_bytes(path: str | Path, content: bytes, *, private: bool = False, synced: bool = True) -> None:
    """`atomic_file` with this content."""
    with atomic_file(path, private=private, synced=synced) as file:
        file.write(content)


def write_atomically(path: str | Path, content: str) -> None:
    """`atomic_file` with this content in UTF-8."""
    write_bytes(path, content.encode("utf-8"))


def try_lock(descriptor: int) -> bool:
    """Take the system's lock on an open file, True when it is ours; False as well where there are none."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return True
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove temporary files of dead writers: old ones whose lock is free. What cannot be removed stays."""
    if fcntl is None:
        return
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not _TEMPORARY.fullmatch(entry.name):
                continue
            with suppress(OSError):
                if not entry.is_file(follow_symlinks=False) or time.time() - entry.stat(follow_symlinks=False).st_mtime < STALE_AFTER_S:
                    continue
                descriptor = os.open(entry.path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
                try:
                    if try_lock(descriptor):
                        os.unlink(entry.path)
                finally:
                    os.close(descriptor)
