"""How a codec pack's bytes are shared out between predictor, transform and the rest."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from codec.spec import KvLayout
from codec.transform import Transform
from draft.gptq import GROUP
from engine.decoder import Decoder

PACK_BUDGET = 0.08
"""A pack may take this fraction of the target's bytes."""

DENSE_SHARE = 0.65
"""A full-rank predictor is chosen when it leaves at least the rest of the budget to the transform."""

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
    """The rank whose two 8-bit factors fit beside a transform of D / 4 rows, two thirds of a byte a number, and the weights."""
    dim = layout.dim
    room = budget_bytes - dim * dim / 6 - 2 * dim * layout.head_dim - FIXED_BYTES
    return int(max(16, min(num_features, dim, MAX_RANK, room / (num_features + dim))))


def max_components(layout: KvLayout, predictor: Mapping[str, Tensor], transform: str, budget_bytes: float) -> int:
    """Most transform rows that fit the budget beside the predictor and the weights, if all but the first third take 4 bits."""
    width = layout.dim if transform == "global" else layout.layer_dim
    spent = stored_bytes(predictor) + 2 * layout.dim * layout.head_dim + FIXED_BYTES
    return max(8, min(int((budget_bytes - spent) / (width * 2 / 3)), layout.dim * 3 // 5))


def coarse_rows(transform: Transform, room_bytes: float) -> int:
    """First transform row to be stored in 4 bits instead of 8: as late as the room allows, never before the first third."""
    count, width = transform.basis.shape
    fine = int((room_bytes - count * width / 2) / (width / 2))
    return max(count // 3, min(count, fine))
