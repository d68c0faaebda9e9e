"""Finding the codec pack of an engine's pair: the one named by the user, the cached one, or a quick one fitted on the spot."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from codec.errors import CodecError
from codec.pack import CodecPack
from engine.calibrate.recipe import default_recomputed_layers, quick_pack
from engine.errors import InvalidOption, PackMismatch
from engine.hub.cache import CacheFolder
from engine.hub.fingerprint import model_fingerprint
from engine.inputs import named_path
from engine.runtime.core import EngineCore
from engine.text.tokenizer import tokenizer_fingerprint

Log = Callable[[str], None]

_TOKENIZER_PRINTS: WeakKeyDictionary[EngineCore, tuple[Any, int, str]] = WeakKeyDictionary()


def pair_fingerprints(core: EngineCore) -> dict[str, str]:
    """Digests of an engine's target, draft and tokenizer: what a pack or a session must agree with."""
    return {
        "target": model_fingerprint(core.target, core.config.target_dir),
        "draft": "none" if core.source is None else core.source.fingerprint(model_fingerprint),
        "tokenizer": "none" if core.tokenizer is None else _tokenizer_print(core, core.tokenizer),
    }


def _tokenizer_print(core: EngineCore, tokenizer: Any) -> str:
    """Of the engine's tokenizer; made once, as it takes tenths of a second, unless the tokenizer has got more tokens."""
    size = len(tokenizer)
    known = _TOKENIZER_PRINTS.get(core)
    if known is None or known[0] is not tokenizer or known[1] != size:
        known = _TOKENIZER_PRINTS[core] = tokenizer, size, tokenizer_fingerprint(tokenizer)
    return known[2]


def find_pack(core: EngineCore, path: str | Path | None = None, log: Log = print) -> CodecPack:
    """The pack to code an engine's sessions with: a known one (`known_pack`), else one fitted now (`fitted_pack`).

    Raises:
        PackMismatch: the pack at `path` is damaged, or of another pair or version.
        InvalidOption: no file at `path`, or no tokenizer to fit a pack with.
    """
    return known_pack(core, path, log) or fitted_pack(core, log)


def known_pack(core: EngineCore, path: str | Path | None = None, log: Log = print) -> CodecPack | None:
    """The pack at `path`. Without a path: the one that comes with the draft source, if it was made for this pair; else the cached one of the pair;
    None where one would have to be fitted.

    Raises:
        PackMismatch: the pack at `path` is damaged, or of another pair or version.
        InvalidOption: no file at `path`.
    """
    prints = pair_fingerprints(core)
    if path is not None:
        return load_pack(path, prints)
    beside = None if core.source is None else core.source.codec_params_file
    if beside is not None and (found := _usable(beside, prints, log)) is not None:
        return found
    return _usable(CacheFolder("packs").path(_cached_name(prints)), prints)


def fitted_pack(core: EngineCore, log: Log = print) -> CodecPack:
    """A quick pack of the engine's pair, fitted now, or by another process meanwhile; cached, where the cache can be written. Takes a minute of one
    thread for a target of 135 M weights. Raises InvalidOption without a tokenizer."""
    if core.tokenizer is None:
        raise InvalidOption("a codec pack is fitted on text, and the engine has no tokenizer", "give a pack made by scripts/calibrate.py")
    prints = pair_fingerprints(core)
    cache, name = CacheFolder("packs"), _cached_name(prints)
    with cache.exclusive(name, "fitting a codec pack"):
        if (found := _usable(cache.path(name), prints)) is not None:
            return found
        log("no codec pack for this pair yet: fitting a quick one (scripts/calibrate.py makes a full one)")
        recomputed = core.exit_layer or (default_recomputed_layers(core.target.config.num_layers) if core.draft_model else 0)
        head_layers = None if core.source is None else core.source.head_layers
        pack = quick_pack(
            core.target,
            core.draft_model,
            core.tokenizer,
            recomputed_layers=recomputed,
            head_layers=head_layers,
            fingerprints=prints,
            log=log,
        )
        cache.save(name, pack.save)
    return pack


def _cached_name(fingerprints: dict[str, str]) -> str:
    return f"{sha256(repr(sorted(fingerprints.items())).encode()).hexdigest()[:16]}.safetensors"


def load_pack(path: str | Path, fingerprints: dict[str, str]) -> CodecPack:
    """The pack at `path`, checked. Raises PackMismatch or InvalidOption."""
    path = named_path(path, "pack")
    try:
        pack = CodecPack.load(path)
        pack.check(fingerprints)
    except FileNotFoundError as error:
        raise InvalidOption(f"there is no codec pack {str(path)!r}", "make one with scripts/calibrate.py, or leave --pack out") from error
    except CodecError as error:
        raise PackMismatch(error.what, error.remedy) from error
    return pack


def _usable(path: Path | None, fingerprints: dict[str, str], log: Log | None = None) -> CodecPack | None:
    """A pack, or None when there is none, it is damaged or old, or of another pair: a cache heals by being made again. log: told of a damaged one, that
    came with a draft head and is not made again."""
    if path is None:
        return None
    try:
        pack = CodecPack.load(path)
    except FileNotFoundError:
        return None
    except (CodecError, OSError) as error:
        if log is not None:
            log(f"{getattr(error, 'what', error)}: it is left out (copy the draft head's folder again)")
        return None
    try:
        pack.check(fingerprints)
    except CodecError:
        return None
    return pack
