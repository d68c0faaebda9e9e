"""Coded spans straight into a pool's pages, keys rotated to their positions, in one product (`kernels.residual_decode`): how a GPU resumes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from codec.codec import KvCodec, batches
from codec.errors import BadInput
from codec.weighting import apply_blocks
from kernels.residual_decode import residual_decode_pages

_TILE = 64
"""Components are filled up with zeros to a multiple of this: the kernel then reads without masks."""

_PRODUCT_TOKENS = 4096
_FOLDED_ROWS = 512


class PageDecoder:
    """Decodes with transform and weighting folded into one matrix [K, D] of the pool's dtype, made at first use.

    In bfloat16 components and matrix are rounded to eight bits, as the KV itself is when it is stored: an error of two thousandths of what the
    prediction left over, where the code's own is a tenth and more. A token's result depends on nothing that is decoded beside it.
    """

    def __init__(self, codec: KvCodec) -> None:
        self.codec = codec
        self._matrix: torch.Tensor | None = None

    def decode(
        self,
        spans: Sequence[bytes],
        predictions: Sequence[torch.Tensor],
        kv: torch.Tensor,
        slots: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        first_layer: int = 0,
    ) -> None:
        """Write the tokens of all spans, one span's after another's.

        Args:
            spans: of `KvCodec.encode_many`; their errors as in `decode_many`, before anything of a batch is written.
            predictions: float32 [T, D] of each span, those that the encoder used (up to rounding).
            kv: [L, 2, P, S, G, d] contiguous pool on the codec's device, of which layers first_layer .. L - 1 are written.
            slots: int64 [T], page * S + offset of each token, no slot twice.
            cos, sin: float32 [T, d/2], of each token's angles.
        """
        codes = self.codec.read(spans, predictions)
        starts = np.cumsum([0, *(code.num_tokens for code in codes)]).tolist()
        if {len(slots), len(cos), len(sin)} != {starts[-1]}:
            raise BadInput(f"{len(slots)} slots and {len(cos)} angles for {starts[-1]} coded tokens", "pass one of each a token")
        if kv.shape[0] - first_layer != self.codec.layout.coded_layers or kv.shape[1:2] + kv.shape[4:] != (2, *self._heads()):
            raise BadInput(
                f"pages {tuple(kv.shape)} from layer {first_layer} on do not fit {self.codec.layout}", "pass the pool that was coded"
            )
        for members, c in self.codec.decoded_batches(codes):
            # components and the matrix are far smaller than the rows: many spans are entropy-decoded at once, fewer multiplied
            sizes = [codes[n].num_tokens for n in members]
            ends = np.cumsum([0, *sizes]).tolist()
            for some in batches(sizes, _PRODUCT_TOKENS):
                own = [members[i] for i in some]
                rows = torch.cat([torch.arange(starts[n], starts[n + 1]) for n in own]).to(slots.device)
                prediction = torch.cat([predictions[n].to(c.device, torch.float32) for n in own])
                narrow = self._narrow(c[ends[some[0]] : ends[some[-1] + 1]], kv.dtype)
                ones, weight = torch.ones(len(rows), device=c.device), self._weight(kv.dtype)[: narrow.shape[1]]
                residual_decode_pages(narrow, ones, None, weight, prediction, kv, slots[rows], cos[rows], sin[rows], first_layer)

    def _narrow(self, c: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[T, K up to a whole tile], tokens adjacent, which the kernel reads fastest."""
        return torch.nn.functional.pad(c.to(dtype), (0, -c.shape[1] % _TILE)).t().contiguous().t()

    def _heads(self) -> tuple[int, int]:
        return self.codec.layout.num_kv_heads, self.codec.layout.head_dim

    def _weight(self, dtype: torch.dtype) -> torch.Tensor:
        """[K up to a whole tile, D]: U^T S^-1."""
        if self._matrix is None or self._matrix.dtype != dtype:
            codec, dim = self.codec, self.codec.layout.dim
            count = codec.transform.num_components
            matrix = torch.zeros(-(-count // _TILE) * _TILE, dim, dtype=dtype, device=codec.device)
            eye = torch.eye(count, device=codec.device)
            for at in range(0, count, _FOLDED_ROWS):
                some = eye[at : at + _FOLDED_ROWS]
                matrix[at : at + len(some)] = apply_blocks(codec.transform.expand(some, dim), codec.weighting.inverse).to(dtype)
            self._matrix = matrix
        return self._matrix
