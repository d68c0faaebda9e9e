"""What a decode step works on: a model's shape and weights, and the buffers of one captured graph.

Axes: B requests, n new tokens of each, N = B n, H query heads, G KV heads, d head size, E hidden size, I intermediate size, V vocabulary,
P pages, S page size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from kernels.decode_layer.plans import DecodePlan, DecodeShape, choose_plan, workspace


class LayerTensors(Protocol):
    """Weights of one layer, contiguous, of one dtype."""

    @property
    def input_norm(self) -> torch.Tensor: ...  # [E]
    @property
    def qkv(self) -> torch.Tensor: ...  # [(H + 2G) d, E]
    @property
    def qkv_bias(self) -> torch.Tensor | None: ...  # [(H + 2G) d]
    @property
    def qk_norm(self) -> torch.Tensor | None: ...  # [2, d]
    @property
    def o(self) -> torch.Tensor: ...  # [E, H d]
    @property
    def o_bias(self) -> torch.Tensor | None: ...  # [E]
    @property
    def post_norm(self) -> torch.Tensor: ...  # [E]
    @property
    def gate_up(self) -> torch.Tensor: ...  # [2I, E]
    @property
    def down(self) -> torch.Tensor: ...  # [E, I]


class DecodeWeights(NamedTuple):
    """Everything a step reads and never writes, and the pool, of which it writes the slots of its tokens."""

    layers: Sequence[LayerTensors]
    pages: Sequence[tuple[torch.Tensor, torch.Tensor]]  # per layer keys and values [P, S, G, d], contiguous
    embedding: torch.Tensor  # [V, E]
    final_norm: torch.Tensor  # [E]
    head: torch.Tensor  # [V, E]
    cos: torch.Tensor  # [T, d/2] float32, by position
    sin: torch.Tensor  # [T, d/2] float32


@dataclass
class DecodeBuffers:
    """Static tensors of a step of B requests with n new tokens each. The first five are the step's inputs: write them before the step.

    A request with fewer new tokens is padded: slot and position -1 (nothing is written, zeros are attended; ignore its logits).
    """

    token_ids: torch.Tensor  # [N] int64
    positions: torch.Tensor  # [N] int64
    slots: torch.Tensor  # [N] int64, page * S + row
    page_table: torch.Tensor  # [B, max_pages] int32
    context_lens: torch.Tensor  # [B] int32, new tokens included
    stream: torch.Tensor  # [N, E] residual stream
    scaled: torch.Tensor  # [N, E] residual stream times the next norm's weight
    squares: torch.Tensor  # [P, N] float32 partial sums of squares of the residual stream
    parts: int  # rows of `squares` that count now
    queries: torch.Tensor  # [N, H, d]
    attended: torch.Tensor  # [N, H, d]
    gated: torch.Tensor  # [N, I]
    logits: torch.Tensor | None  # [N, V] float32
    next_tokens: torch.Tensor  # [N] int64, most likely token after each, -1 where its logits are not finite
    part: torch.Tensor  # float32 workspace
    tickets: torch.Tensor  # int32, zero between launches
    plan: DecodePlan
    # [B] integers, an input too: keys right before a request's new tokens that other requests of the step write (None: nobody does)
    unsettled: torch.Tensor | None = None

    @classmethod
    def allocate(
        cls,
        shape: DecodeShape,
        batch: int,
        length: int,
        max_pages: int,
        page_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        logits: bool = True,
        plan: DecodePlan | None = None,
    ) -> DecodeBuffers:
        """Buffers for `batch` requests of `length` new tokens each, whose contexts lie in at most `max_pages` pages."""
        rows = batch * length
        plan = choose_plan(shape, rows, batch=batch) if plan is None else plan
        needs = workspace(shape, plan, rows, batch, max_pages * page_size)

        def floats(*sizes: int) -> torch.Tensor:
            return torch.zeros(sizes, dtype=dtype, device=device)

        def integers(*sizes: int, kind: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(sizes, dtype=kind, device=device)

        return cls(
            integers(rows),
            integers(rows),
            integers(rows),
            integers(batch, max_pages, kind=torch.int32),
            integers(batch, kind=torch.int32),
            floats(rows, shape.hidden),
            floats(rows, shape.hidden),
            torch.zeros(needs.square_rows, rows, device=device),
            0,
            floats(rows, shape.heads, shape.head_dim),
            floats(rows, shape.heads, shape.head_dim),
            floats(rows, shape.intermediate),
            torch.zeros(rows, shape.vocab, device=device) if logits else None,
            integers(rows),
            torch.zeros(needs.part_floats, device=device),
            integers(needs.tickets, kind=torch.int32),
            plan,
        )
