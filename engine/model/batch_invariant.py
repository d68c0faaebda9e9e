"""Batch-invariant operations: a row's result is the same bits whatever rows stand beside it.

A matrix product may sum in another order for another number of rows, and an elementwise kernel may take its scalar path for the elements at
the end of a thread's share. Here every product is cut into tiles of one number of rows, padded, at aligned addresses: the library is only
ever asked for one shape, so it runs one kernel. Nothing is measured or probed. oneDNN's kernels and those of a GPU sum every row of a tile in
the same order; the other CPU libraries may treat a tile's last rows apart, and get one row at a time. The activation runs in pieces that no
thread splits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from engine.model.linear import LinearFn, compiled_linear, compiled_rows, float32_linear, onednn_linear
from kernels.dispatch import use_triton
from kernels.grouped_linear import grouped_linear
from kernels.grouped_linear.reference import grouped_linear as reference_grouped_linear

ROWS = 16  # of every product: a verification block fits one, and so does a tile of a CPU's matrix unit (AMX)
_ALIGNMENT = 64  # bytes, what the allocator gives
_GRAIN = 32768  # elements below which PyTorch never splits an elementwise operation over threads


def batch_invariant(linear_fn: LinearFn) -> LinearFn:
    """x W^T + b, [N, in] by [out, in] -> [N, out], by products of one number of rows, or by compiled ones, which treat each row alone."""
    if linear_fn is compiled_linear:
        return compiled_rows
    if linear_fn is float32_linear:
        linear_fn = onednn_linear  # whatever the weight's size: PyTorch's own product may treat a tile's last rows apart

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows = ROWS if linear_fn is onednn_linear or x.is_cuda else 1
        count = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -count % rows)).contiguous()
        if padded.shape[0] == rows:
            return linear_fn(_aligned(padded), weight, bias)[:count]
        out = torch.empty(padded.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
        for start in range(0, padded.shape[0], rows):
            out[start : start + rows] = linear_fn(_aligned(padded[start : start + rows]), weight, bias)
        return out[:count]

    return linear


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """`rows` at an address as the allocator gives them: some products peel off the rows before the first aligned one."""
    return rows.clone() if rows.data_ptr() % _ALIGNMENT else rows


def batch_invariant_gate(gate: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A gated activation of [N, 2I] -> [N, I] in pieces of whole rows that one thread does alone."""

    def gated(gate_up: torch.Tensor) -> torch.Tensor:
        rows = max(1, _GRAIN // (gate_up.shape[1] // 2))
        if gate_up.is_cuda or gate_up.shape[0] <= rows:
            return gate(gate_up)
        return torch.cat([gate(piece) for piece in gate_up.split(rows)])

    return gated


def batch_invariant_grouped(linear_fn: LinearFn) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """`grouped_linear` whose products are all of one number of rows; its kernel's tiles are so as they are."""
    invariant = batch_invariant(linear_fn)

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return invariant(x, weight, None)

    def grouped(x: torch.Tensor, weights: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        if use_triton(x, weights):
            return grouped_linear(x, weights, sizes)
        return reference_grouped_linear(x, weights, sizes, linear)

    return grouped
