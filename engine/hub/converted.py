"""Folders of the cache that were converted from GGUF files: made once for a file's content, made anew when damaged, bounded in size."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

from engine.errors import ModelNotFound
from engine.files import write_atomically
from engine.hub.cache import CacheFolder, cache_home, disk_errors, exclusive, require_free
from engine.hub.fetch import file_sha256
from engine.hub.fingerprint import CACHE_NAME, remember_digest
from engine.hub.pairs import PAIRS, ModelSource
from engine.hub.progress import Progress
from engine.inputs import open_regular

if TYPE_CHECKING:
    from engine.hub.gguf import GgufFile

MOST_CONVERTED_BYTES = 64 << 30  # of all folders made from users' files; the least recently used go first
IN_USE_S = 3600.0  # a folder used since then is not deleted: a process may be loading it
_MARKER = "foretold.json"
_FORMAT = 1
_WEIGHTS = "model.safetensors"
_BLOCK_BYTES = 4 << 20
_SYNCED_AT_ONCE_BYTES = 16 << 20


def converted_file(path: Path, progress: Progress) -> Path:
    """Folder of a user's GGUF file, converted when the cache does not hold its content.

    The file's SHA-256 is taken once and noted with its size, time and inode.

    Raises:
        ModelNotFound: no readable GGUF file, one that is damaged or lies about itself, or that changed while it was read.
        UnsupportedArchitecture: a family, tokenizer or block format that is not read.
        DiskFull, CacheNotWritable.
    """
    with open_regular(path, ModelNotFound, "give an existing GGUF file"):
        stamp = _stamp(path)
    notes, note = CacheFolder("gguf"), f"{sha256(os.fsencode(path.resolve())).hexdigest()[:24]}.json"
    with ExitStack() as opened:

        @cache
        def source() -> GgufFile:  # its libraries are not needed for a file that is known
            from engine.hub.gguf import GgufFile

            return opened.enter_context(GgufFile(path))

        digest = _noted(notes.read(note, 1 << 12), stamp)
        if digest is None:
            with ThreadPoolExecutor(1) as beside:
                reading = beside.submit(_sha256_until, path, stop := Event())
                try:
                    source()
                except BaseException:
                    stop.set()  # what is no such file need not be read to its end
                    raise
                digest = reading.result()
            notes.write(note, json.dumps({"stamp": stamp, "sha256": digest}).encode())

        def convert(folder: Path) -> str:
            from engine.hub.convert import convert_gguf

            made = convert_gguf(source(), folder, progress)
            if _stamp(path) != stamp:
                raise ModelNotFound(f"{path.name} changed while it was read", "run again when it is whole")
            return made

        def room(home: Path) -> None:
            _make_room(home / "models", source().num_float_bytes)
            require_free(home, source().num_float_bytes)

        known = next((source for source in _known_sources() if source.sha256 == digest), None)
        if known is not None:  # the same folder as the pair's, so that its packs and sessions fit
            return converted(known.name, digest, convert, room)
        name = re.sub(r"[^\w.-]+", "-", path.name.removesuffix(".gguf"), flags=re.ASCII).strip("-.")[:80] or "model"
        return converted(name, digest, convert, room, of_file=True)


def converted(
    name: str, source_sha256: str, convert: Callable[[Path], str], room: Callable[[Path], None], *, of_file: bool = False
) -> Path:
    """The folder `models/<name>-<hash>` of the cache, whole.

    It appears under its name only when it is complete; what an interrupted run left is cleared under a lock.

    Args:
        name, source_sha256: of what is converted.
        convert: fills a folder; returns the SHA-256 of its weights.
        room: makes sure of room in the cache folder, which it is given.
        of_file: the folder can be made again from a user's file, and may be deleted to make room for others.
    """
    home = cache_home()
    models, locks = home / "models", home / "locks"
    folder = models / f"{name}-{source_sha256[: 12 if of_file else 8]}"
    if is_whole(folder, source_sha256):
        return _used(folder)
    with disk_errors(home):
        for needed in (models, locks):
            needed.mkdir(parents=True, exist_ok=True)
        with exclusive(locks / f"{folder.name}.lock", f"preparing {name}"):
            if is_whole(folder, source_sha256):
                return _used(folder)
            for left in (*models.glob(f"{folder.name}.tmp*"), folder):
                shutil.rmtree(left, ignore_errors=True)
            room(home)
            building = models / f"{folder.name}.tmp"
            building.mkdir()
            try:
                digest = convert(building)
                remember_digest(building / _WEIGHTS, digest)
                files = {file.name: file.stat().st_size for file in building.iterdir()}
                digests = {file: digest if file == _WEIGHTS else file_sha256(building / file) for file in files if file != CACHE_NAME}
                marker = {"format": _FORMAT, "source_sha256": source_sha256, "files": files, "digests": digests, "of_file": of_file}
                (building / _MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
                os.replace(building, folder)
            except BaseException:
                shutil.rmtree(building, ignore_errors=True)
                raise
            _sync_behind(folder)
    return folder


def is_whole(folder: Path, source_sha256: str) -> bool:
    """Whether a folder is what was made of a source: every file's size, the content of all but the weights, and theirs too if they were touched."""
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        if marker["format"] != _FORMAT or marker["source_sha256"] != source_sha256:
            return False
        # the note of digests grows when the model is loaded
        if any((folder / name).stat().st_size != size for name, size in marker["files"].items() if name != CACHE_NAME):
            return False
        untouched = marker.get("weights_time_ns") == (folder / _WEIGHTS).stat().st_mtime_ns
        digests = marker.get("digests", {})  # folders made by earlier versions have none
        return all(file_sha256(folder / name) == digest for name, digest in digests.items() if not (name == _WEIGHTS and untouched))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _used(folder: Path) -> Path:
    with suppress(OSError):  # a cache that is only read
        os.utime(folder / _MARKER)
    with suppress(OSError, ValueError):
        if "weights_time_ns" not in json.loads((folder / _MARKER).read_text(encoding="utf-8")):
            _sync_behind(folder)
    return folder


def _sync_behind(folder: Path) -> None:
    """Have the weights on the disk, and the marker say so, which costs a large file seconds that nobody need wait for. Until then, or where the process
    ends before, their digest decides (`is_whole`)."""
    if (folder / _WEIGHTS).stat().st_size < _SYNCED_AT_ONCE_BYTES:
        _sync(folder)
    else:
        Thread(target=_sync, args=(folder,), name="foretold-sync").start()


def _sync(folder: Path) -> None:
    with suppress(OSError, ValueError, RecursionError):  # a cache that is only read, or a folder that has gone
        with (folder / _WEIGHTS).open("r+b") as weights:
            os.fsync(weights.fileno())
            written = os.fstat(weights.fileno()).st_mtime_ns
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        write_atomically(folder / _MARKER, json.dumps(marker | {"weights_time_ns": written}, indent=2) + "\n")


def _make_room(models: Path, num_bytes: int) -> None:
    """Delete folders of users' files, least recently used first, until so many bytes more stay within the bound and fit on the disk."""
    now = time.time()
    held: list[tuple[float, int, Path]] = []
    for marker in models.glob(f"*/{_MARKER}"):
        with suppress(OSError, ValueError, AttributeError, RecursionError):
            if json.loads(marker.read_text(encoding="utf-8")).get("of_file") is True:
                size = sum(file.stat().st_size for file in marker.parent.iterdir())
                held.append((marker.stat().st_mtime, size, marker.parent))
    total = sum(size for _, size, _ in held) + num_bytes
    for used, size, folder in sorted(held):
        if total <= MOST_CONVERTED_BYTES and shutil.disk_usage(models).free >= num_bytes:
            return
        if now - used > IN_USE_S:
            shutil.rmtree(folder, ignore_errors=True)
            total -= size


def _sha256_until(path: Path, stop: Event) -> str:
    """SHA-256 (hex) of a file; of its beginning, once `stop` is set."""
    digest = sha256()
    with path.open("rb", buffering=0) as file:
        while not stop.is_set() and (block := file.read(_BLOCK_BYTES)):
            digest.update(block)
    return digest.hexdigest()


def _known_sources() -> list[ModelSource]:
    sources = [side for pair in PAIRS.values() for side in (pair.target, pair.draft)]
    return [source for source in sources if isinstance(source, ModelSource)]


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _noted(content: bytes | None, stamp: list[int]) -> str | None:
    try:
        note = json.loads(content or b"{}")
        return str(note["sha256"]) if note["stamp"] == stamp and re.fullmatch(r"[0-9a-f]{64}", note["sha256"]) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
