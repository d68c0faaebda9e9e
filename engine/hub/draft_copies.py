"""Copies of weights in few bits, from one process to the next: making them takes a second, reading them some hundredths of one.

A file is a SHA-256 of the copies and the copies themselves, in the cache folder; one that is damaged counts as none and is made again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from engine.files import atomic_file
from engine.hub.cache import CacheFolder

MOST_BYTES = 1 << 30  # of all files together; those used longest ago are removed
_DIGEST_BYTES = sha256().digest_size


class CopiesFile:
    """Where the copies of one decoder's matrices lie.

    Args:
        facts: whatever the copies' bytes depend on; files of other facts are others.
    """

    _cache = CacheFolder("copies")

    def __init__(self, facts: tuple[object, ...]) -> None:
        self.name = f"{sha256(repr(facts).encode()).hexdigest()[:24]}.tiles"

    @property
    def exists(self) -> bool:
        """Whether there is a file, damaged or not."""
        path = self._cache.path(self.name)
        with suppress(OSError):
            return path is not None and path.is_file()
        return False

    def read_into(self, room: memoryview) -> bool:
        """Fill room, n bytes, with the copies; whether that could be done: False where there is no whole file of so many bytes."""
        path = self._cache.path(self.name)
        if path is None:
            return False
        with suppress(OSError):
            with path.open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != _DIGEST_BYTES + len(room):
                    return False
                digest, filled = file.read(_DIGEST_BYTES), 0
                while filled < len(room) and (count := file.readinto(room[filled:])):
                    filled += count
            if filled == len(room) and sha256(room).digest() == digest:
                with suppress(OSError):  # of another user's file, or one that cannot be written
                    os.utime(path)
                return True
        return False

    def write(self, room: memoryview) -> None:
        """Keep the copies, n bytes; where nothing can be written they are made again by the next process."""
        if _DIGEST_BYTES + len(room) > MOST_BYTES:
            return

        def write(path: Path) -> None:
            with atomic_file(path, private=True, synced=False) as file:
                file.write(sha256(room).digest())
                file.write(room)
            _remove_oldest(path)

        self._cache.save(self.name, write)


def _remove_oldest(kept: Path) -> None:
    """Remove files beside `kept` until all are within MOST_BYTES."""
    found = sorted(_sizes(kept.parent), reverse=True)
    room = MOST_BYTES - kept.stat().st_size
    for _, size, path in found:
        if path == kept:
            continue
        room -= size
        if room < 0:
            with suppress(OSError):
                path.unlink()


def _sizes(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """(when it was used last, bytes, path) of each file of copies."""
    for path in folder.glob("*.tiles"):
        with suppress(OSError):
            status = path.stat()
            yield status.st_mtime, status.st_size, path
