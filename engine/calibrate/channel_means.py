"""Opening an engine's pool in a format of its own; the channel means that the hot formats take off, measured once a model and kept.

The means come from the library text that every machine with Python has (`engine.calibrate.corpus`), a few thousand tokens in plain pages.
"""

from __future__ import annotations

import json
import os
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine.calibrate.corpus import documents, library_texts
from engine.errors import InvalidOption
from engine.hub.cache import cache_home, disk_errors, exclusive
from engine.kv.pool import KvPool
from engine.kv.quantized_pool import QuantizedPool
from engine.model.decoder import Decoder
from engine.sessions.codec_params import model_fingerprint
from kernels.quantized_kv import FORMATS, NUM_SINKS
from kernels.quantized_kv.reference import check_head_dim

PLAIN = "bf16"  # pages in the model's own number format
KV_CACHE_DTYPES = (PLAIN, *FORMATS)
NUM_TOKENS = 2048
_CONTEXT = 256
_VERSION = 1


def element_bits(hot: str, head_dim: int, dtype: torch.dtype) -> float:
    """Bits an element of KV takes in pages of this format."""
    return torch.finfo(dtype).bits if hot == PLAIN else FORMATS[hot] + 16 / head_dim


def check_format(hot: str, target: Decoder) -> None:
    """Raises InvalidOption for an unknown format, or one that does not go with the model."""
    if hot not in KV_CACHE_DTYPES:
        raise InvalidOption(f"unknown hot format {hot!r}", f"choose one of {', '.join(KV_CACHE_DTYPES)}")
    if hot != PLAIN:
        try:
            check_head_dim(target.config.head_dim)
        except ValueError as error:
            raise InvalidOption(f"--hot {hot} does not go with this model: {error}", f"use --hot {PLAIN}") from error


def open_pool(
    target: Decoder, hot: str, num_pages: int, page_size: int, max_pages: int, *, tokenizer: Any | None, target_dir: Path | None
) -> KvPool:
    """A pool for the target's KV in a format of `KV_CACHE_DTYPES`; the means of a hot one are measured at first use.

    Raises:
        InvalidOption: see `check_format` and `channel_means`. DiskFull, CacheNotWritable: the means could not be kept.
    """
    check_format(hot, target)
    if hot == PLAIN:
        return target.new_pool(num_pages, page_size, max_pages=max_pages)
    means = channel_means(target, tokenizer, target_dir).to(target.device)
    return QuantizedPool(FORMATS[hot], means, num_pages, page_size, dtype=target.dtype, max_pages=max_pages)


def channel_means(target: Decoder, tokenizer: Any | None, target_dir: Path | None) -> torch.Tensor:
    """Means of a model's keys before rotation and of its values, float32 [L, 2, G, d] on the CPU: from the cache, measured if not there.

    Raises:
        InvalidOption: they are to be measured and the engine has no tokenizer, or the model's KV overflows.
        DiskFull, CacheNotWritable: they could not be kept.
    """
    print_ = model_fingerprint(target, target_dir)
    cached = cache_home() / "hot" / f"{print_[:16]}.safetensors"
    config = target.config
    shape = (config.num_layers, 2, config.num_kv_heads, config.head_dim)
    if (found := _load(cached, print_, shape)) is not None:
        return found
    if tokenizer is None:
        raise InvalidOption(
            "the hot formats take off channel means measured on text, and the engine has no tokenizer", f"use hot={PLAIN!r}"
        )
    with disk_errors(cache_home()):
        cached.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(cached.with_suffix(".lock"), "measuring channel means"):
            if (found := _load(cached, print_, shape)) is None:
                print("measuring the channel means of this model's KV (once)", file=sys.stderr, flush=True)
                found = measure_means(target, tokenizer)
                _save(cached, print_, found)
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
        sequence = pool.new_sequence()
        target(torch.tensor(ids, device=target.device), [sequence], [len(ids)], logits="none")
        rows = target.read_kv(sequence, NUM_SINKS, len(ids))
        total += rows.double().sum(0).cpu()
        count += len(rows)
        sequence.free()
    mean = (total / count).float()
    if not bool(mean.isfinite().all()):
        raise InvalidOption("the model's keys or values are not finite", f"use --hot {PLAIN}, or --dtype float32")
    return mean.view(config.num_layers, 2, config.num_kv_heads, config.head_dim)


def _digest(fingerprint: str, means: torch.Tensor) -> str:
    return sha256(f"{_VERSION} {fingerprint} {tuple(means.shape)}".encode() + means.numpy().tobytes()).hexdigest()


def _save(path: Path, fingerprint: str, means: torch.Tensor) -> None:
    """Under a temporary name first: a half-written file is never found."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        facts = {"kind": "foretold-hot-means", "version": _VERSION, "fingerprint": fingerprint, "digest": _digest(fingerprint, means)}
        save_file({"means": means.contiguous()}, temporary, {"foretold": json.dumps(facts)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _load(path: Path, fingerprint: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Kept means, or None when there are none, or they are damaged or another model's: a cache heals by being made again."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["foretold"])
            means = file.get_tensor("means")
        intact = facts["digest"] == _digest(fingerprint, means)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None
    return means if intact and means.dtype == torch.float32 and means.shape == shape else None
