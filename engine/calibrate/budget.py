"""How a codec pack's bytes are shared out between predictor, transform and the rest."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from codec.predictor.gptq import GROUP
from codec.rows import ROW_BITS, row_bytes
from codec.spec import KvLayout
from engine.model.decoder import Decoder

PACK_BUDGET = 0.08
"""A pack may take this fraction of the target's bytes."""

DENSE_SHARE = 0.65
"""A full-rank predictor is chosen when it leaves at least the rest of the budget to the transform."""

FALLBACK_SHARE = 0.5
"""A pack has a fallback basis when that takes at most this part of the transform's room."""

FIXED_BYTES = 500_000
"""Entropy tables, scales and header of a pack."""

MAX_RANK = 4096
"""Of a low-rank predictor."""


def bf16_bytes(target: Decoder) -> int:
    """Size of the target's weights in 16 bits, whatever they are loaded in: a pack's size must not depend on that."""
    return 2 * target.weight_bytes // target.dtype.itemsize


def stored_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def dense_bytes(num_features: int, dim: int) -> int:
    """Bytes of a full-rank predictor in 4 bits with its scales."""
    return num_features * dim // 2 + 2 * -(-num_features // GROUP) * dim + 12 * num_features + 4 * dim


def default_rank(num_features: int, layout: KvLayout, budget_bytes: float) -> int:
    """The rank whose two 8-bit factors fit beside a transform of D / 3 rows, half a byte a number, and the weights."""
    dim = layout.dim
    room = budget_bytes - dim * dim / 6 - 2 * dim * layout.head_dim - FIXED_BYTES
    return int(max(16, min(num_features, dim, MAX_RANK, room / (num_features + dim))))


def transform_bytes(layout: KvLayout, predictor: Mapping[str, Tensor], budget_bytes: float, transform: str) -> float:
    """Room that the budget leaves for the transform's rows beside the predictor and the weights. There is no codec without: so D / 16 rows in 3 bits
    have room in any case, and of the short rows of single layers D / 2 in 8 bits."""
    rows, bits = (layout.dim // 16, 3) if transform == "global" else (layout.dim // 2, 8)
    least = rows * row_bytes(_row_width(layout, transform), bits)
    return max(least, budget_bytes - stored_bytes(predictor) - 2 * layout.dim * layout.head_dim - FIXED_BYTES)


def fallback_bytes(layout: KvLayout) -> int:
    """Of a fallback basis: all components of every layer, in 8 bits."""
    return layout.dim * (row_bytes(layout.layer_dim, 8) + 2)


def max_components(layout: KvLayout, transform: str, room_bytes: float) -> int:
    """Most transform rows worth computing: as many as fit the room in the fewest bits."""
    return min(int(room_bytes / row_bytes(_row_width(layout, transform), min(ROW_BITS))), layout.dim * 3 // 5)


def _row_width(layout: KvLayout, transform: str) -> int:
    return layout.dim if transform == "global" else layout.layer_dim
