"""Finding the codec pack of an engine's pair: the one named by the user, the cached one, or a quick one fitted on the spot."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from codec.errors import CodecError
from codec.pack import CodecPack
from draft.head_file import PACK_FILE
from engine.calibrate.recipe import default_rerun_layers, quick_pack
from engine.errors import InvalidOption, PackMismatch
from engine.hub.cache import cache_home, disk_errors, exclusive
from engine.hub.resolve import fingerprint, tokenizer_fingerprint
from engine.model.decoder import Decoder

if TYPE_CHECKING:
    from engine.engine import Engine

Log = Callable[[str], None]

_DIGESTS: WeakKeyDictionary[Decoder, str] = WeakKeyDictionary()  # of models that came from no folder: reading all weights takes seconds


def trunk_layers(engine: Engine) -> int:
    """Layers of the target that its own drafter runs first (0: a separate draft, or none); their KV is recomputed, not coded."""
    return engine.drafter.verify_from if engine.drafter else 0


def pair_fingerprints(engine: Engine) -> dict[str, str]:
    """Digests of an engine's target, draft and tokenizer: what a pack or a session must agree with."""
    target = model_fingerprint(engine.target, engine.target_dir)
    if engine.draft_decoder is not None:
        draft = model_fingerprint(engine.draft_decoder, engine.draft_dir)
    elif engine.trained_trunk is not None:
        draft = engine.trained_trunk.fingerprint
    else:
        draft = f"trunk-{trunk_layers(engine)}" if engine.drafter else "none"
    tokenizer = tokenizer_fingerprint(engine.tokenizer) if engine.tokenizer is not None else "none"
    return {"target": target, "draft": draft, "tokenizer": tokenizer}


def find_pack(engine: Engine, path: str | Path | None = None, log: Log = print) -> CodecPack:
    """The pack to code an engine's sessions with. Without a path: the one beside the engine's trained trunk, if it was made for this pair; else the
    cached one of the pair, fitted now (and cached) if there is none.

    Raises:
        PackMismatch: the pack at `path` is damaged, or of another pair or version.
        InvalidOption: no file at `path`, or no tokenizer to fit a pack with.
    """
    prints = pair_fingerprints(engine)
    if path is not None:
        return load_pack(path, prints)
    if engine.trained_trunk is not None and (found := _usable(engine.trained_trunk.folder / PACK_FILE, prints)) is not None:
        return found
    cached = cache_home() / "packs" / f"{sha256(repr(sorted(prints.items())).encode()).hexdigest()[:16]}.safetensors"
    if (found := _usable(cached, prints)) is not None:
        return found
    if engine.tokenizer is None:
        raise InvalidOption("a codec pack is fitted on text, and the engine has no tokenizer", "give a pack made by scripts/calibrate.py")
    with disk_errors(cache_home()):
        cached.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(cached.with_suffix(".lock"), "fitting a codec pack"):
            if (found := _usable(cached, prints)) is not None:
                return found
            log("no codec pack for this pair yet: fitting a quick one (scripts/calibrate.py makes a full one)")
            again = trunk_layers(engine) or (default_rerun_layers(engine.target.config.num_layers) if engine.draft_decoder else 0)
            adapter = engine.trained_trunk.decoder if engine.trained_trunk else None
            pack = quick_pack(
                engine.target, engine.draft_decoder, engine.tokenizer, trunk_layers=again, adapter=adapter, fingerprints=prints, log=log
            )
            pack.save(cached)
    return pack


def load_pack(path: str | Path, fingerprints: dict[str, str]) -> CodecPack:
    """The pack at `path`, checked. Raises PackMismatch or InvalidOption."""
    try:
        pack = CodecPack.load(path)
        pack.check(fingerprints)
    except FileNotFoundError as error:
        raise InvalidOption(f"there is no codec pack {str(path)!r}", "make one with scripts/calibrate.py, or leave --pack out") from error
    except CodecError as error:
        raise PackMismatch(error.what, error.remedy) from error
    return pack


def _usable(path: Path, fingerprints: dict[str, str]) -> CodecPack | None:
    """A cached pack, or None when there is none, or it is damaged or old: a cache heals by being made again."""
    try:
        pack = CodecPack.load(path)
        pack.check(fingerprints)
        return pack
    except (CodecError, OSError):
        return None


def model_fingerprint(decoder: Decoder, folder: Path | None) -> str:
    """Of the folder a model came from; of its weights where it came from none."""
    if folder is not None:
        return fingerprint(folder, decoder.weight_sum)
    if decoder in _DIGESTS:
        return _DIGESTS[decoder]
    digest = sha256(repr(decoder.config).encode())
    for name, tensor in sorted(decoder.hf_tensors().items()):  # not state_dict, which leaves packed weights out
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return _DIGESTS.setdefault(decoder, digest.hexdigest())
