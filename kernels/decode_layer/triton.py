"""A decode step through the fused kernels: five launches a layer, nothing read back, every size and length in static buffers.

Each kernel may be launched while the one before it runs: it asks for its weights, which no kernel writes, and only then waits. What a
kernel of the step writes is read after that wait alone, and written after it too.
"""

from __future__ import annotations

from kernels.decode_attention.triton import decode_attention
from kernels.decode_layer.tensors import DecodeBuffers, DecodeShape, DecodeWeights
from kernels.embed_rows.triton import embed_rows
from kernels.greedy_head.triton import greedy_head
from kernels.norm_gate_up.triton import norm_gate_up
from kernels.norm_qkv.triton import norm_qkv
from kernels.skinny_linear.triton import linear_residual


def decode_embed(weights: DecodeWeights, buffers: DecodeBuffers, *, first_layer: int = 0, embed: bool = True) -> None:
    """See `reference.decode_embed`."""
    norm = weights.layers[first_layer].input_norm
    ids = buffers.token_ids if embed else None
    buffers.parts = embed_rows(ids, weights.embedding, norm, buffers.stream, buffers.scaled, buffers.squares)


def decode_layers(weights: DecodeWeights, buffers: DecodeBuffers, shape: DecodeShape, layers: range | None = None) -> None:
    """See `reference.decode_layers`."""
    b, plan = buffers, buffers.plan
    depth = len(weights.layers)
    scratch = {"part": b.part, "tickets": b.tickets, "early": plan.early}
    for number in range(depth) if layers is None else layers:
        w = weights.layers[number]
        k_pages, v_pages = weights.pages[number]
        if b.plan.in_pieces:
            b.parts = embed_rows(None, weights.embedding, w.input_norm, b.stream, b.scaled, b.squares)
        norm_qkv(
            b.scaled,
            b.squares,
            b.parts,
            shape.eps,
            w.qkv,
            w.qkv_bias,
            w.qk_norm,
            weights.cos,
            weights.sin,
            b.positions,
            b.slots,
            k_pages,
            v_pages,
            b.queries,
            tile=plan.qkv,
            **scratch,
        )
        decode_attention(
            b.queries,
            k_pages,
            v_pages,
            b.page_table,
            b.positions,
            b.context_lens,
            shape.head_dim**-0.5,
            b.attended,
            config=plan.attention,
            unsettled=b.unsettled,
            **scratch,
        )
        b.parts = linear_residual(b.attended.flatten(1), w.o, w.o_bias, b.stream, w.post_norm, b.scaled, b.squares, tile=plan.o, **scratch)
        norm_gate_up(b.scaled, b.squares, b.parts, shape.eps, w.gate_up, b.gated, tile=plan.gate_up, early=plan.early)
        following = weights.layers[number + 1].input_norm if number + 1 < depth else weights.final_norm
        b.parts = linear_residual(b.gated, w.down, None, b.stream, following, b.scaled, b.squares, tile=plan.down, **scratch)


def decode_head(weights: DecodeWeights, buffers: DecodeBuffers, shape: DecodeShape) -> None:
    """See `reference.decode_head`."""
    b = buffers
    greedy_head(
        b.scaled,
        b.squares,
        b.parts,
        shape.eps,
        weights.head,
        b.logits,
        b.next_tokens,
        tile=b.plan.head,
        part=b.part,
        tickets=b.tickets,
        early=b.plan.early,
    )
