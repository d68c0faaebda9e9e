"""The cache folder: where it lies, who may write at a time, and what a full disk looks like."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from engine import files
from engine.errors import CacheNotWritable, DiskFull
from engine.files import write_bytes

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def cache_home() -> Path:
    """FORETOLD_HOME when set, else `foretold` in the user's cache folder (XDG_CACHE_HOME or ~/.cache).

    Raises:
        CacheNotWritable: there is no home folder, or no user of the name that the path begins with.
    """
    try:
        return files.cache_home()
    except (RuntimeError, OSError) as error:
        raise CacheNotWritable(f"the cache folder cannot be found: {error}", "set FORETOLD_HOME to a folder you may write to") from error


class CacheFolder:
    """Small files that are made again where they are missing: what a start measured or derived, a folder of the cache for each kind.

    Reading and writing never fail. Where nothing can be written, a warning on standard error says so, once in a process.

    Args:
        kind: the folder's name.
    """

    _warned = False

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def path(self, name: str) -> Path | None:
        """Where the file of this name lies; None where there is no cache folder at all."""
        with suppress(CacheNotWritable):
            return cache_home() / self._kind / name
        return None

    def read(self, name: str, most_bytes: int = 1 << 28) -> bytes | None:
        """Content of the file of this name; None where there is none, it cannot be read, or it is larger than `most_bytes`."""
        with suppress(OSError, ValueError, CacheNotWritable):
            with (cache_home() / self._kind / name).open("rb") as file:
                content = file.read(most_bytes + 1)
            return content if len(content) <= most_bytes else None
        return None

    def write(self, name: str, content: bytes) -> bool:
        """Keep this content under the name, readable for the user alone; whether that could be done. Whoever reads it notices damage."""
        return self.save(name, lambda path: write_bytes(path, content, private=True, synced=False))

    def save(self, name: str, write: Callable[[Path], object]) -> bool:
        """Have `write` make the file of this name, in a folder that exists; whether that could be done."""
        try:
            folder = cache_home() / self._kind
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                write(folder / name)
        except (CacheNotWritable, DiskFull) as error:
            self._warn(f"{error.what} ({error.remedy})")
            return False
        except (OSError, ValueError) as error:
            self._warn(str(error))
            return False
        return True

    def keeps(self) -> bool:
        """Whether files can be kept, found by keeping one for a moment."""

        def tried(path: Path) -> None:
            write_bytes(path, b"", private=True, synced=False)
            path.unlink(missing_ok=True)

        return self.save(f"tried-{os.getpid()}", tried)

    @contextmanager
    def exclusive(self, name: str, doing: str) -> Iterator[None]:
        """Holds this name's lock against other processes, so that one makes the file; nothing is held where no lock file can be made.

        Args:
            name: the file to make.
            doing: shown on standard error while another process holds the lock.
        """
        with ExitStack() as held:
            # saving will tell why; a lock that cannot be had costs other processes the same work
            with suppress(OSError, ValueError, CacheNotWritable):
                folder = cache_home() / self._kind
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(exclusive((folder / name).with_suffix(".lock"), doing))
            yield

    @classmethod
    def _warn(cls, why: str) -> None:
        if not CacheFolder._warned and sys.stderr is not None:
            CacheFolder._warned = True
            with suppress(OSError, ValueError):
                print(f"warning: nothing is remembered for the next start: {why}", file=sys.stderr, flush=True)


def is_disk_full(error: BaseException) -> bool:
    """Whether the error says that the disk, or the user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in _FULL


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk into `DiskFull` and a refused write into `CacheNotWritable`, both naming the folder."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(f"no room left in {folder}", "free space, or set FORETOLD_HOME to a roomier folder") from error
        if error.errno in _REFUSED:
            raise CacheNotWritable(
                f"cannot write to {folder}: {error.strerror}", "set FORETOLD_HOME to a folder you may write to"
            ) from error
        raise


def require_free(folder: Path, num_bytes: int) -> None:
    """Raises DiskFull now rather than after minutes of work when `folder`'s disk has less than `num_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise DiskFull(
            f"{folder} has {free / 1e9:.1f} GB free, {num_bytes / 1e9:.1f} GB are needed",
            "free space, or set FORETOLD_HOME to a roomier folder",
        )


@contextmanager
def exclusive(path: Path, doing: str) -> Iterator[None]:
    """Holds a lock file against other processes; the system frees it when a process dies, so none is ever stale.

    Args:
        path: lock file.
        doing: shown on standard error while another process holds the lock.
    """
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process is {doing}; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
