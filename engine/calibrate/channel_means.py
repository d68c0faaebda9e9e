"""The channel means that the quantised KV formats take off, measured once a model and kept.

The means come from the library text that every machine with Python has (`engine.calibrate.corpus`), a few thousand tokens in plain pages.
"""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from engine.calibrate.corpus import documents, library_texts
from engine.errors import InvalidOption
from engine.files import write_bytes
from engine.hub.cache import CacheFolder
from engine.hub.fingerprint import model_fingerprint
from engine.kv.formats import PLAIN
from engine.model.decoder import Decoder
from kernels.quantized_kv import NUM_SINKS

NUM_TOKENS = 2048
_CONTEXT = 256
_VERSION = 1


def channel_means(target: Decoder, tokenizer: Any | None, target_dir: Path | None) -> torch.Tensor:
    """Means of a model's keys before rotation and of its values, float32 [L, 2, G, d] on the CPU: from the cache, measured if not there.

    Where the cache cannot be written they are measured again at the next start.

    Raises:
        InvalidOption: they are to be measured and the engine has no tokenizer, or the model's KV overflows.
    """
    print_ = model_fingerprint(target, target_dir)
    cache, name = CacheFolder("hot"), f"{print_[:16]}.safetensors"
    config = target.config
    shape = (config.num_layers, 2, config.num_kv_heads, config.head_dim)
    if (found := _load(cache.path(name), print_, shape)) is not None:
        return found
    if tokenizer is None:
        raise InvalidOption(
            "quantised KV caches take off channel means measured on text, and the engine has no tokenizer", f"use kv_cache_dtype={PLAIN!r}"
        )
    with cache.exclusive(name, "measuring channel means"):
        if (found := _load(cache.path(name), print_, shape)) is None:
            print("measuring the channel means of this model's KV (once)", file=sys.stderr, flush=True)
            found = means = measure_means(target, tokenizer)
            cache.save(name, lambda path: _save(path, print_, means))
    return found


@torch.inference_mode()
def measure_means(target: Decoder, tokenizer: Any, num_tokens: int = NUM_TOKENS) -> torch.Tensor:
    """Means over library text, first tokens left out: float32 [L, 2, G, d] on the CPU. Raises InvalidOption when the KV overflows."""
    config = target.config
    context = min(_CONTEXT, config.max_position_embeddings)
    texts, _ = documents(library_texts(), tokenizer, num_tokens, context, per_text=2)
    pool = target.new_pool(-(-context // 64))
    total, count = torch.zeros(config.num_layers * config.kv_width, dtype=torch.float64), 0
    for ids in texts:
        sequence = pool.new_sequence(len(ids))
        target.forward(torch.tensor(ids, device=target.device), [sequence], [len(ids)], logits="none")
        rows = target.read_kv(sequence, NUM_SINKS, len(ids))
        total += rows.double().sum(0).cpu()
        count += len(rows)
        sequence.free()
    mean = (total / count).float()
    if not bool(mean.isfinite().all()):
        raise InvalidOption("the model's keys or values are not finite", f"use --kv-cache-dtype {PLAIN}, or --dtype float32")
    return mean.view(config.num_layers, 2, config.num_kv_heads, config.head_dim)


def _digest(fingerprint: str, means: torch.Tensor) -> str:
    return sha256(f"{_VERSION} {fingerprint} {tuple(means.shape)}".encode() + means.numpy().tobytes()).hexdigest()


def _save(path: Path, fingerprint: str, means: torch.Tensor) -> None:
    """Whole or not at all: a half-written file is never found."""
    facts = {"kind": "foretold-hot-means", "version": _VERSION, "fingerprint": fingerprint, "digest": _digest(fingerprint, means)}
    write_bytes(path, save({"means": means.contiguous()}, {"foretold": json.dumps(facts)}))


def _load(path: Path | None, fingerprint: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Kept means, or None when there are none, or they are damaged or another model's: a cache heals by being made again."""
    if path is None:
        return None
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["foretold"])
            means = file.get_tensor("means")
        intact = facts["digest"] == _digest(fingerprint, means)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None
    return means if intact and means.dtype == torch.float32 and means.shape == shape else None
