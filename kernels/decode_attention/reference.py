"""Meaning of `decode_attention` in plain PyTorch: a block of new tokens of each request over the keys and values in its pages."""

from __future__ import annotations

import torch


def decode_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    positions: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Each token sees its request's keys at positions up to its own; a token at a negative position sees none and gets zeros.

    Args:
        q: [N, H, d] rotated queries, N / B of each request, one request after another.
        k_pages, v_pages: [P, S, G, d], the new tokens' rows already written; H is a multiple of G.
        page_table: [B, max_pages] int32; entries past a request's context are not read.
        positions: [N] integers.
        context_lens: [B] int32, a bound on each request's positions + 1.
        scale: factor of the scores, usually d ** -0.5.
        out: [N, H, d], written.
    """
    size, groups, head_dim = k_pages.shape[1:]
    length = q.shape[0] // page_table.shape[0]
    for row in range(q.shape[0]):
        request = row // length
        keys = min(int(positions[row]) + 1, int(context_lens[request]))
        if keys <= 0:
            out[row] = 0.0
            continue
        pages = page_table[request, : -(-keys // size)].long()
        k, v = (pool[pages].reshape(-1, groups, head_dim)[:keys].float().transpose(0, 1) for pool in (k_pages, v_pages))  # [G, T, d]
        scores = torch.matmul(q[row].float().view(groups, -1, head_dim), k.transpose(1, 2)) * scale
        out[row] = torch.matmul(torch.softmax(scores, -1), v).view(-1, head_dim).to(out.dtype)
