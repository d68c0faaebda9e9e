"""Meaning of a decode step in plain PyTorch: the twins of its kernels, one after another."""

from __future__ import annotations

from kernels.decode_attention.reference import decode_attention
from kernels.decode_layer.tensors import DecodeBuffers, DecodeShape, DecodeWeights
from kernels.embed_rows.reference import embed_rows
from kernels.greedy_head.reference import greedy_head
from kernels.norm_gate_up.reference import norm_gate_up
from kernels.norm_qkv.reference import norm_qkv
from kernels.skinny_linear.reference import linear_residual


def decode_embed(weights: DecodeWeights, buffers: DecodeBuffers, *, first_layer: int = 0, embed: bool = True) -> None:
    """Start a step, once its inputs are written, ready for layer `first_layer`.

    The residual stream becomes the embeddings of buffers.token_ids, or (embed=False) stays what buffers.stream holds.
    """
    norm = weights.layers[first_layer].input_norm
    ids = buffers.token_ids if embed else None
    buffers.parts = embed_rows(ids, weights.embedding, norm, buffers.stream, buffers.scaled, buffers.squares)


def decode_layers(weights: DecodeWeights, buffers: DecodeBuffers, shape: DecodeShape, layers: range | None = None) -> None:
    """Run layers (default all; consecutive ranges may follow one another): buffers.stream becomes the residual stream behind them.

    Reads positions, slots, page_table and context_lens of the buffers; writes the new tokens' keys and values to weights.pages. Comes after
    `decode_embed`, and what it reads must not be written between the two: kernels read it before their predecessors have ended.
    """
    b = buffers
    depth = len(weights.layers)
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
        )
        decode_attention(b.queries, k_pages, v_pages, b.page_table, b.positions, b.context_lens, shape.head_dim**-0.5, b.attended)
        b.parts = linear_residual(b.attended.flatten(1), w.o, w.o_bias, b.stream, w.post_norm, b.scaled, b.squares)
        norm_gate_up(b.scaled, b.squares, b.parts, shape.eps, w.gate_up, b.gated)
        following = weights.layers[number + 1].input_norm if number + 1 < depth else weights.final_norm
        b.parts = linear_residual(b.gated, w.down, None, b.stream, following, b.scaled, b.squares)


def decode_head(weights: DecodeWeights, buffers: DecodeBuffers, shape: DecodeShape) -> None:
    """Finish a step after the last layer: buffers.logits (if there) and buffers.next_tokens."""
    b = buffers
    greedy_head(b.scaled, b.squares, b.parts, shape.eps, weights.head, b.logits, b.next_tokens)
