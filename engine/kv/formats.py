"""Number formats of the KV cache while it is attended: the model's own, or one of the quantised ones."""

from __future__ import annotations

import torch

from engine.errors import InvalidOption
from kernels.quantized_kv import FORMATS
from kernels.quantized_kv.reference import check_head_dim

PLAIN = "bf16"  # pages in the model's own number format
KV_CACHE_DTYPES = (PLAIN, *FORMATS)


def check_name(kv_format: str) -> None:
    """Raises InvalidOption for a format that does not exist."""
    if kv_format not in KV_CACHE_DTYPES:
        raise InvalidOption(f"unknown KV cache dtype {kv_format!r}", f"choose one of {', '.join(KV_CACHE_DTYPES)}")


def check_format(kv_format: str, head_dim: int) -> None:
    """Raises InvalidOption for an unknown format, or one that does not go with a model of this head size."""
    check_name(kv_format)
    if kv_format != PLAIN:
        try:
            check_head_dim(head_dim)
        except ValueError as error:
            raise InvalidOption(
                f"--kv-cache-dtype {kv_format} does not go with this model: {error}", f"use --kv-cache-dtype {PLAIN}"
            ) from error


def element_bits(kv_format: str, head_dim: int, dtype: torch.dtype) -> float:
    """Bits that an element of KV takes in pages of this format, of a model whose own numbers are `dtype`."""
    return torch.finfo(dtype).bits if kv_format == PLAIN else FORMATS[kv_format] + 16 / head_dim
