"""The atomic writer under the engine's name (`kernels.files`), and the lock that a command holds on a session file."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from engine.errors import CacheNotWritable, SessionInUse
from engine.inputs import shown
from kernels.files import (
    HAS_LOCKS,
    PRIVATE_MODE,
    atomic_file,
    cache_home,
    stage_bytes,
    sweep,
    sync_folder,
    try_lock,
    write_atomically,
    write_bytes,
)

__all__ = [
    "atomic_file",
    "cache_home",
    "session_lock",
    "stage_bytes",
    "sweep",
    "sync_folder",
    "try_lock",
    "write_atomically",
    "write_bytes",
]


@contextmanager
def session_lock(path: str | Path) -> Iterator[None]:
    """Hold a session file against other processes for the length of the block.

    The lock is the system's (flock) on a small file beside the session, removed at the end; it is free as soon as the holder is dead, however it
    died. On file systems without such locks the block runs without one.

    Raises:
        SessionInUse: another process holds it; the error names its process id and since when.
        CacheNotWritable: the file cannot be made.
    """
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".foretold-{sha256(os.fsencode(target.name)).hexdigest()[:16]}.lock")
    try:
        descriptor = _hold(beside, path)
    except OSError as error:
        raise CacheNotWritable(
            f"no lock can be laid beside {shown(str(path), 200)}: {error.strerror or error}", "choose another path"
        ) from error
    try:
        yield
    finally:
        if descriptor is not None:
            # removed while it is held: whoever waited for it sees that its file is no longer the one in the folder
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            os.close(descriptor)


def _hold(beside: Path, session: str | Path) -> int | None:
    """A locked descriptor of the file, None where there are no such locks."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
        descriptor = os.open(beside, flags, PRIVATE_MODE)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, f"{beside.name} is not a regular file")
            if not try_lock(descriptor):
                if not HAS_LOCKS:
                    os.close(descriptor)
                    return None
                raise SessionInUse(
                    f"session file {shown(str(session), 200)} is in use by {_holder(descriptor)}",
                    "wait until that ends, or name another file",
                )
            found = None
            with suppress(FileNotFoundError):
                found = beside.stat()
            if found is not None and os.path.samestat(found, os.fstat(descriptor)):
                facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(facts).encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder removed it in between


def _holder(descriptor: int) -> str:
    """Who wrote the lock file, in words."""
    try:
        facts = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {int(facts['pid'])} on {shown(str(facts['host']))[1:-1]} since {shown(str(facts['since']))[1:-1]}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just begun
        return "another process"
