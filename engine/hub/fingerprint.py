"""Fingerprints of models, by which packs and sessions know the weights they were made with."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from engine.errors import ModelNotFound
from engine.hub.cache import cache_home, write_atomically
from engine.hub.fetch import file_sha256

CACHE_NAME = "foretold-fingerprint.json"
# what a library writes into a config without changing the model
_IDLE_KEYS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")


def fingerprint(path: Path) -> str:
    """SHA-256 (hex) over the model's config and the digests of its safetensors files.

    Digests are kept beside the model (in the cache folder when that cannot be written) and taken again when a file's size or
    modification time changes. The folder's name and place do not matter.

    Raises:
        ModelNotFound: no config.json or no safetensors file.
    """
    weights = sorted(path.glob("*.safetensors"))
    if not weights or not (path / "config.json").is_file():
        raise ModelNotFound(f"{path} holds no config.json with safetensors weights", "give the folder of a Hugging Face model")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in _IDLE_KEYS}
    content = {"config": kept, "weights": sorted(_digests(path, weights).values())}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def remember_digest(weights: Path, sha256: str) -> None:
    """Notes the digest of a folder's only weights file, known from writing it, so that `fingerprint` need not read it again."""
    entry = {"stamp": _stamp(weights), "sha256": sha256}
    write_atomically(weights.parent / CACHE_NAME, json.dumps({weights.name: entry}, indent=2) + "\n")


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _digests(path: Path, weights: list[Path]) -> dict[str, str]:
    elsewhere = cache_home() / "fingerprints" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]}.json"
    noted: dict[str, Any] = {}
    for cache in (elsewhere, path / CACHE_NAME):
        with contextlib.suppress(OSError, ValueError):
            noted |= json.loads(cache.read_text(encoding="utf-8"))
    known: dict[str, Any] = {}
    changed = False
    for file in weights:
        stamp = _stamp(file)
        entry = noted.get(file.name)
        if not isinstance(entry, dict) or entry.get("stamp") != stamp or "sha256" not in entry:
            entry = {"stamp": stamp, "sha256": file_sha256(file)}
            changed = True
        known[file.name] = entry
    if changed:
        _keep(known, path / CACHE_NAME, elsewhere)
    return {name: entry["sha256"] for name, entry in known.items()}


def _keep(known: dict[str, Any], beside: Path, elsewhere: Path) -> None:
    text = json.dumps(known, indent=2) + "\n"
    try:
        write_atomically(beside, text)
    except OSError:
        # a read-only model folder; without any place to write, the digest is simply taken again next time
        with contextlib.suppress(OSError):
            elsewhere.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(elsewhere, text)
