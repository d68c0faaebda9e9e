"""How much memory the KV pools are given, and the pools themselves."""

from __future__ import annotations

import torch

from engine.errors import InvalidOption
from engine.kv.formats import PLAIN, check_format, element_bits
from engine.kv.pool import KvPool
from engine.kv.quantized_pool import QuantizedPool
from engine.model.decoder import Decoder
from kernels.quantized_kv import FORMATS

POOL_TOKENS_CPU = 1 << 17
CACHED_TOKENS_CPU = 1 << 15  # of prefixes that are kept for later requests
PREFILL_TOKENS = 2048  # of all prompts a step, on a CPU
START_TOKENS = 4096  # what a pool begins with; it doubles on demand


def prefill_chunk(device: torch.device) -> int:
    """Tokens of one prompt a step, when nobody says otherwise.

    On a GPU a pass over any number of tokens up to some 2,000 takes as long as its launches do (24 ms with the 1.5B shape on an H200, where one of
    4,096 takes 32), so a prompt of 4,096 tokens is one chunk.
    """
    return 4096 if device.type == "cuda" else 512


def default_pool_tokens(target: Decoder, draft: Decoder | None, kv_format: str = PLAIN) -> int:
    """Most tokens each pool may hold: half of a GPU's free memory, over the bytes a token takes in both pools; a fixed number on a CPU.

    draft: the decoder with the second pool, if there is one. kv_format: of the target's pool. Raises InvalidOption when the target cannot have it.
    """
    check_format(kv_format, target.config.head_dim)
    if target.device.type != "cuda":
        return POOL_TOKENS_CPU
    models = [(target, kv_format)] + ([] if draft is None else [(draft, PLAIN)])
    token_bytes = sum(
        m.config.num_layers * m.config.kv_width * element_bits(format_, m.config.head_dim, m.dtype) / 8 for m, format_ in models
    )
    return max(START_TOKENS, int(torch.cuda.mem_get_info(target.device)[0] / 2 / token_bytes))


def most_cached_pages(pool: KvPool) -> int:
    """Pages that known beginnings may keep: a GPU's pool has its size at once, all of it; on a CPU, where a pool grows with what is kept, a few."""
    return pool.max_pages if pool.device.type == "cuda" else min(pool.max_pages, CACHED_TOKENS_CPU // pool.page_size)


def page_counts(tokens: int, page_size: int) -> tuple[int, int]:
    """Pages of page_size tokens that a pool for `tokens` tokens starts with, and grows to. Raises InvalidOption for less than one page."""
    if tokens < page_size:
        raise InvalidOption(f"pool_tokens cannot be {tokens}", f"give at least one page of {page_size} tokens")
    most = tokens // page_size
    return min(most, -(-START_TOKENS // page_size)), most


def open_pool(
    target: Decoder, kv_format: str, num_pages: int, page_size: int, max_pages: int, *, means: torch.Tensor | None = None
) -> KvPool:
    """A pool for the target's KV in one of `KV_CACHE_DTYPES`.

    means: [L, 2, G, d] float32, channel means of keys before rotation and of values; needed by quantised formats only.

    Raises:
        InvalidOption: see `check_format`, or a quantised format without means.
    """
    check_format(kv_format, target.config.head_dim)
    if kv_format == PLAIN:
        return target.new_pool(num_pages, page_size, max_pages=max_pages)
    if means is None:
        raise InvalidOption(f"the KV format {kv_format} takes off channel means, and there are none", "measure them, or use bf16")
    return QuantizedPool(FORMATS[kv_format], means.to(target.device), num_pages, page_size, dtype=target.dtype, max_pages=max_pages)
