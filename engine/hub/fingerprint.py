"""Fingerprints of models, by which packs and sessions know the weights they were made with.

A fingerprint covers config.json, but for keys that do not change the model, and every byte of the files that the model is loaded from:
`model.safetensors`, or the shards its index names, in subfolders as well. The folder's name and place, and other files in it, do not matter.

Digests are taken once (1.7 GB a second) and noted with the file's size and modification time. What a loader read is summed on the way, at no
cost to speak of, and noted too: weights that changed while size and time did not are noticed when the model is loaded, by a sum that any one
changed byte changes. Without a loaded model, as in scripts that only name a folder, size and time are trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

from engine.errors import ForetoldError, ModelNotFound
from engine.files import write_atomically
from engine.hub.cache import cache_home
from engine.hub.fetch import file_sha256
from engine.inputs import is_file, read_json_object
from engine.model.weights import weight_files

CACHE_NAME = "foretold-fingerprint.json"
_LOADED = "/loaded"  # no file's name: the sum over what was loaded, and the stamps of the files it came from
# what a library writes into a config without changing the model
_IDLE_KEYS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")


def fingerprint(path: Path, loaded_sum: int | None = None) -> str:
    """SHA-256 (hex) over the model's config and the digests of its weight files.

    Digests are kept beside the model (in the cache folder when that cannot be written) and taken again when a file's size or
    modification time changes, or the sum over what was loaded.

    Args:
        path: model folder.
        loaded_sum: `Decoder.weight_sum` of the model loaded from there.

    Raises:
        ModelNotFound: no config.json or no safetensors file, or they cannot be read.
    """
    if not is_file(path / "config.json"):
        raise ModelNotFound(f"{path} holds no config.json with safetensors weights", "give the folder of a Hugging Face model")
    weights = weight_files(path)
    config = read_json_object(path / "config.json", ModelNotFound, "download or convert the model again")
    kept = {key: value for key, value in config.items() if key not in _IDLE_KEYS}
    content = {"config": kept, "weights": sorted(_digests(path, weights, loaded_sum).values())}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_DIGESTS: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # of models that came from no folder: reading all weights takes seconds


class Fingerprinted(Protocol):
    """The part of a decoder that its fingerprint is taken of."""

    @property
    def config(self) -> Any: ...

    @property
    def weight_sum(self) -> int | None: ...  # over what was loaded

    def hf_tensors(self) -> dict[str, torch.Tensor]: ...


def model_fingerprint(decoder: Fingerprinted, folder: Path | None) -> str:
    """SHA-256 (hex) of the folder a model came from (`fingerprint`); of its config and weights where it came from none."""
    if folder is not None:
        return fingerprint(folder, decoder.weight_sum)
    if decoder in _DIGESTS:
        return _DIGESTS[decoder]
    digest = hashlib.sha256(repr(decoder.config).encode())
    for name, tensor in sorted(decoder.hf_tensors().items()):  # not state_dict, which leaves packed weights out
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return _DIGESTS.setdefault(decoder, digest.hexdigest())


def remember_digest(weights: Path, sha256: str) -> None:
    """Notes the digest of the only weights file of a folder that nobody uses yet, known from writing it: `fingerprint` need not read it again."""
    entry = {"stamp": _stamp(weights), "sha256": sha256}
    (weights.parent / CACHE_NAME).write_text(json.dumps({weights.name: entry}, indent=2) + "\n", encoding="utf-8")


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _digests(path: Path, weights: list[Path], loaded_sum: int | None) -> dict[str, str]:
    elsewhere = None
    with contextlib.suppress(ForetoldError):
        elsewhere = cache_home() / "fingerprints" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]}.json"
    noted: dict[str, Any] = {}
    for cache in (elsewhere, path / CACHE_NAME):
        with contextlib.suppress(ForetoldError):
            if cache is not None:
                noted |= read_json_object(cache, ModelNotFound, "")
    names = {file: file.relative_to(path).as_posix() for file in weights}
    stamps = {names[file]: _stamp(file) for file in weights}
    loaded = {"sum": loaded_sum, "stamps": stamps}
    trusted = loaded_sum is None or noted.get(_LOADED) == loaded
    known: dict[str, Any] = {}
    changed = not trusted
    for file in weights:
        name = names[file]
        entry = noted.get(name)
        if not trusted or not isinstance(entry, dict) or entry.get("stamp") != stamps[name] or not isinstance(entry.get("sha256"), str):
            entry = {"stamp": stamps[name], "sha256": file_sha256(file)}
            changed = True
        known[name] = entry
    if changed:
        _keep(known | ({} if loaded_sum is None else {_LOADED: loaded}), path / CACHE_NAME, elsewhere)
    return {name: entry["sha256"] for name, entry in known.items()}


def _keep(known: dict[str, Any], beside: Path, elsewhere: Path | None) -> None:
    text = json.dumps(known, indent=2) + "\n"
    try:
        write_atomically(beside, text)
    except OSError:
        # a read-only model folder; without any place to write, the digest is simply taken again next time
        if elsewhere is None:
            return
        with contextlib.suppress(OSError):
            elsewhere.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(elsewhere, text)
