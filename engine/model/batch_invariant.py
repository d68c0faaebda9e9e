"""Shape-stable operations for the deterministic mode: a row's result is the same bits whatever rows stand beside it.

A matrix product may sum in another order for another number of rows, and an elementwise kernel may take its scalar path for the elements at
the end of a thread's share. Here products run on a fixed number of rows, padded, and the activation in pieces that no thread splits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.model.linear import Product
from kernels.silu_mul import silu_mul

ROWS = 16  # rows of the usual product: a verification block fits one
BULK_ROWS = 256  # rows for prompts, used only where it is shown to sum in the same order
_PROBE_OUTPUTS = 8192  # outputs to compare before a shape is trusted
_ALIGNMENT = 64  # bytes, what the allocator gives
_GRAIN = 32768  # elements below which PyTorch never splits an elementwise operation over threads


class StableLinear:
    """x W^T + b on fixed row counts, chosen once per weight shape by a probe of the product it is given.

    The probe multiplies random rows, each repeated over the whole tile: if every position gives the same bits, position and tile size do
    not matter for that shape. Otherwise rows go one at a time.
    """

    def __init__(self, product: Product = F.linear) -> None:
        self._product = product
        self._tiles: dict[tuple[object, ...], tuple[int, ...]] = {}

    def tiles(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[int, ...]:
        """Row counts, falling, that may be used for this weight; their results agree bit for bit."""
        key = (tuple(weight.shape), weight.is_mkldnn, weight.dtype, weight.device, bias is None, torch.get_num_threads())
        if key not in self._tiles:
            single = self._agrees(weight, bias, ROWS)
            bulk = single and self._agrees(weight, bias, BULK_ROWS)
            self._tiles[key] = (BULK_ROWS, ROWS) if bulk else (ROWS,) if single else (1,)
        return self._tiles[key]

    def _agrees(self, weight: torch.Tensor, bias: torch.Tensor | None, count: int) -> bool:
        """True when random rows come out the same from every position of `count` rows, and the same as from `ROWS` rows."""
        generator = torch.Generator().manual_seed(0)
        # a narrow product shows a different order of summation only now and then: try more rows
        for _ in range(min(64, -(-_PROBE_OUTPUTS // weight.shape[0]))):
            row = torch.randn(1, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
            expected = self._product(row.repeat(ROWS, 1), weight, bias)[:1]
            if not bool((self._product(row.repeat(count, 1), weight, bias) == expected).all()):
                return False
        return True

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [N, in] by weight [out, in] plus bias [out] -> [N, out], in x's dtype."""
        tiles = self.tiles(weight, bias)
        smallest = tiles[-1]
        count = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -count % smallest)).contiguous()
        out = torch.empty(padded.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
        start = 0
        for tile in tiles:
            while padded.shape[0] - start >= tile:
                piece = padded[start : start + tile]
                if piece.data_ptr() % _ALIGNMENT:
                    piece = piece.clone()  # some products peel off the rows before the first aligned address
                out[start : start + tile] = self._product(piece, weight, bias)
                start += tile
        return out[:count]


def stable_silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu_mul` of [N, 2I] -> [N, I] in pieces of whole rows that one thread does alone."""
    width = gate_up.shape[1] // 2
    rows = max(1, _GRAIN // width)
    if gate_up.is_cuda or gate_up.shape[0] <= rows:
        return silu_mul(gate_up)
    return torch.cat([silu_mul(piece) for piece in gate_up.split(rows)])
