"""Meaning of `paged_attention` in plain PyTorch: causal attention of new tokens over keys and values kept in pages.

The work is split into tiles: up to `TILE_ROWS` query tokens of one request, which see the same stretch of keys but for the causal corner.
The query heads of one KV head become rows beside the tokens, so grouped heads need no copy of the keys. Where a request's
pages follow one another, its keys are a view of the pool; otherwise they are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.cpu_decode.prompts import attend_prompt

TILE_ROWS = 128
TREE_SPAN = 63  # places that a tree's bit masks speak of
_PART_ROWS, _PART_KEYS = 256, 1024  # new tokens, and keys before them, from which a CPU attends to both apart (`_in_two_parts`)
_COMPILED_ROWS = 32  # new tokens from which laying out all keys anew for compiled code pays


@dataclass(frozen=True)
class Tile:
    """Query tokens [start, end) of the flattened batch, which attend to keys [first, keys) of request `request`; earlier: of these, those before the
    first of the tokens, where they are attended to apart, else 0. compiled: by `kernels.cpu_decode.prompts`."""

    request: int
    start: int
    end: int
    first: int
    keys: int
    mask: (
        torch.Tensor | None
    )  # [(end - start) * (H // G), keys - first] in q's dtype, added to the scores; None when every row sees every key
    earlier: int = 0
    compiled: bool = False


@dataclass(frozen=True)
class Plan:
    """What all layers of one forward pass share: where each request's keys lie and which rows see which."""

    spans: list[slice | torch.Tensor]  # per request: a slice of the page axis, or int64 page numbers
    tiles: list[Tile]
    padded: bool = False  # whether there are rows in no tile, which see nothing


def _span(pages: list[int], device: torch.device, as_view: bool) -> slice | torch.Tensor:
    first = pages[0]
    if as_view and pages == list(range(first, first + len(pages))):
        return slice(first, first + len(pages))
    return torch.tensor(pages, dtype=torch.int64, device=device)


def _corner_mask(
    rows: int, heads_per_group: int, first: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[rows * heads_per_group, keys - first]: 0 where key <= keys - rows + row and within the row's window, else -inf."""
    count = keys - first
    mask = torch.full((rows, count), float("-inf"), dtype=dtype, device=device).triu_(count - rows + 1)
    if window is not None:
        mask += torch.full((rows, count), float("-inf"), dtype=dtype, device=device).tril_(count - rows - window)
    return mask.repeat_interleave(heads_per_group, dim=0)


def _tree_mask(
    visible: torch.Tensor, windows: torch.Tensor, first: int, keys: int, sliding_window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """[rows, keys - first]: 0 where a key's place lies before the row's tree, or where bit (place - windows) of its mask is set, else -inf."""
    new = torch.arange(first, keys, device=visible.device) - windows[:, None]
    inside = (new >= 0) & (new < TREE_SPAN)
    seen = (new < 0) | (inside & ((visible[:, None] >> new.clamp(0, TREE_SPAN - 1)) & 1).bool())
    if sliding_window is not None:
        seen &= new > -sliding_window
    return torch.zeros(seen.shape, dtype=dtype, device=visible.device).masked_fill_(~seen, float("-inf"))


def plan(
    page_lists: Sequence[Sequence[int]],
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    page_size: int,
    heads_per_group: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    deterministic: bool = False,
    tree: tuple[torch.Tensor, torch.Tensor] | None = None,
    sliding_window: int | None = None,
    in_parts: bool = True,
    compiled: bool = False,
) -> Plan:
    """Cut a ragged batch into tiles.

    With `deterministic` every tile is one query token and the keys are always gathered: the shapes and strides of a token's
    computation then follow from its position alone, so its result is the same bits alone, in a batch, and inside a block.

    Args:
        page_lists: per request its page numbers, at least ceil(context_len / page_size) of them.
        query_lens, context_lens: [B] ints; a context length includes the request's new tokens, or is 0 where they are padding, which has no tile.
        heads_per_group: H // G.
        dtype, device: of the queries.
        tree: `visible` and `windows`, each [N], as in `paged_attention`.
        sliding_window: as there.
        in_parts: many tokens of a request may attend to the keys before them and to their own apart; not where scores are capped.
        compiled: where they may, they attend by compiled code instead (`kernels.cpu_decode.prompts.attends_prompts`).
    """
    spans: list[slice | torch.Tensor] = []
    tiles: list[Tile] = []
    masks: dict[tuple[int, int, int], torch.Tensor] = {}
    tile_rows = 1 if deterministic else TILE_ROWS
    start = 0
    for request, (pages, rows, context) in enumerate(zip(page_lists, query_lens, context_lens, strict=True)):
        if context == 0:  # padding
            spans.append(slice(0, 0))
            start += rows
            continue
        used = list(pages[: -(-context // page_size)])
        spans.append(_span(used, device, as_view=not deterministic))
        plain = (
            in_parts and tree is None and sliding_window is None and not deterministic and dtype == torch.bfloat16 and device.type == "cpu"
        )
        if plain and compiled and rows >= _COMPILED_ROWS:
            tiles.append(Tile(request, start, start + rows, 0, context, None, compiled=True))
            start += rows
            continue
        if plain and rows >= _PART_ROWS and context - rows >= _PART_KEYS:
            tiles.append(Tile(request, start, start + rows, 0, context, None, context - rows))
            start += rows
            continue
        for first in range(0, rows, tile_rows):
            last = min(first + tile_rows, rows)
            keys = context - rows + last
            low = 0 if sliding_window is None else max(0, context - rows + first + 1 - sliding_window)  # first key that any row sees
            mask = None
            if tree is not None:
                visible, windows = (part[start + first : start + last] for part in tree)
                keys = context
                if sliding_window is not None:
                    low = max(0, int(windows.min()) + 1 - sliding_window)
                mask = _tree_mask(visible, windows, low, keys, sliding_window, dtype).repeat_interleave(heads_per_group, dim=0)
            elif last - first > 1:
                key = (last - first, low, keys)
                if key not in masks:
                    masks[key] = _corner_mask(last - first, heads_per_group, low, keys, sliding_window, dtype, device)
                mask = masks[key]
            tiles.append(Tile(request, start + first, start + last, low, keys, mask))
        start += rows
    return Plan(spans, tiles, padded=0 in context_lens)


def capped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None, scale: float, softcap: float
) -> torch.Tensor:
    """q [*, T, d] over k and v [*, T', d] -> [*, T, d], scores x becoming softcap * tanh(x / softcap) (Gemma 2, 2024, arXiv 2408.00118).

    hidden: bool [T, T'], keys that a row does not see; None when all see all.
    """
    scores = torch.tanh((q @ k.transpose(-1, -2)) * (scale / softcap)) * softcap
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.float().softmax(-1).to(v.dtype) @ v


def _in_two_parts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, earlier: int, scale: float) -> torch.Tensor:
    """Causal attention of the last tokens q [T, H, d] over k, v [G, earlier + T, d] -> [T, H, d], on a CPU.

    Keys before the tokens are seen by all of them: no mask is added to their scores, which takes as long as a third of the products. Both parts are
    joined by the logarithms of their sums.
    """
    flash, groups, (rows, heads, d) = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, len(k), q.shape
    own_k, own_v = (part[None, :, earlier:].repeat_interleave(heads // groups, 1) for part in (k, v))
    own, own_sum = flash(q.transpose(0, 1)[None], own_k, own_v, 0.0, True, scale=scale)
    queries = q.unflatten(1, (groups, -1)).transpose(0, 1).reshape(1, groups, -1, d)
    past, past_sum = flash(queries, k[None, :, :earlier], v[None, :, :earlier], 0.0, False, scale=scale)
    past = past.view(groups, rows, -1, d).transpose(1, 2).reshape(heads, rows, d)
    past_sum = past_sum.view(groups, rows, -1).transpose(1, 2).reshape(heads, rows, 1)
    share = torch.sigmoid(past_sum - own_sum.view(heads, rows, 1))
    return torch.lerp(own[0].float(), past.float(), share).transpose(0, 1).to(q.dtype)


def attend(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, batch: Plan, scale: float, softcap: float | None = None
) -> torch.Tensor:
    """Attention of one layer under a plan.

    Args:
        q: [N, H, d] rotated queries.
        k_pages, v_pages: [P, S, G, d] contiguous, the same dtype as q.
        scale: factor of the scores.
        softcap: as in `paged_attention`.

    Returns:
        [N, H, d] in q's dtype.
    """
    groups, head_dim = k_pages.shape[2:]
    out = (torch.zeros_like if batch.padded else torch.empty_like)(q, memory_format=torch.contiguous_format)
    request, k, v = -1, k_pages, v_pages
    for tile in batch.tiles:
        if tile.request != request:
            request = tile.request
            span = batch.spans[request]
            k = k_pages[span].view(-1, groups, head_dim).transpose(0, 1).unsqueeze(0)  # [1, G, pages * S, d]
            v = v_pages[span].view(-1, groups, head_dim).transpose(0, 1).unsqueeze(0)
        rows = tile.end - tile.start
        if tile.compiled:
            assert softcap is None, "a plan for capped scores has no compiled tiles"
            own_k, own_v = (part[0, :, : tile.keys].transpose(0, 1) for part in (k, v))
            out[tile.start : tile.end] = attend_prompt(q[tile.start : tile.end], own_k, own_v, scale)
            continue
        if tile.earlier:
            assert softcap is None, "a plan for capped scores has no parts"
            out[tile.start : tile.end] = _in_two_parts(
                q[tile.start : tile.end], k[0, :, : tile.keys], v[0, :, : tile.keys], tile.earlier, scale
            )
            continue
        grouped = q[tile.start : tile.end].unflatten(1, (groups, -1))  # [rows, G, H // G, d]
        queries = grouped.transpose(0, 1).reshape(1, groups, -1, head_dim)  # [1, G, rows * H // G, d]
        keys, values = k[:, :, tile.first : tile.keys], v[:, :, tile.first : tile.keys]
        if softcap is None:
            result = F.scaled_dot_product_attention(queries, keys, values, attn_mask=tile.mask, scale=scale)
        else:
            result = capped_attention(queries, keys, values, None if tile.mask is None else tile.mask < 0, scale, softcap)
        tokens = result.view(groups, rows, -1, head_dim).transpose(0, 1).reshape(rows, -1, head_dim)
        if len(batch.tiles) == 1 and not batch.padded:
            return tokens
        out[tile.start : tile.end] = tokens
    return out


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    query_lens: Sequence[int] | torch.Tensor,
    context_lens: Sequence[int] | torch.Tensor,
    scale: float,
    *,
    deterministic: bool = False,
    visible: torch.Tensor | None = None,
    windows: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention over pages: the j-th of a request's n new tokens sees the first context_len - n + 1 + j keys.

    Args:
        q: [N, H, d] rotated queries of all requests, one after another.
        k_pages, v_pages: [P, S, G, d] of one layer, the new tokens' rows already written; H is a multiple of G.
        page_table: [B, max_pages] int32; entries past a request's context are not read.
        query_lens, context_lens: [B]; a context length includes the request's new tokens, or is 0 where they are padding: their results are 0.
        scale: factor of the scores, usually d ** -0.5.
        deterministic: a token's result is the same bits whatever it is batched with.
        visible: int64 [N] for a tree of drafts: a row sees every key before its window, and of the TREE_SPAN keys from there on those whose bits are
            set, the window's first key in bit 0.
        windows: [N] ints, first places of these windows; without it they begin with the request's first new token.
        sliding_window: a token sees no more than so many keys, its own included; of a tree's row the places from windows + 1 - sliding_window on.
        softcap: scores become softcap * tanh(score / softcap) before the softmax.

    Returns:
        [N, H, d] in q's dtype.
    """
    lens = query_lens.tolist() if isinstance(query_lens, torch.Tensor) else list(query_lens)
    contexts = context_lens.tolist() if isinstance(context_lens, torch.Tensor) else list(context_lens)
    size, groups = k_pages.shape[1:3]
    tree = None
    if visible is not None:
        if windows is None:
            first = [context - count for context, count in zip(contexts, lens, strict=True) for _ in range(count)]
            windows = torch.tensor(first, device=q.device)
        tree = visible, windows
    batch = plan(
        page_table.tolist(),
        lens,
        contexts,
        size,
        q.shape[1] // groups,
        q.dtype,
        q.device,
        deterministic=deterministic,
        tree=tree,
        sliding_window=sliding_window,
        in_parts=softcap is None,
    )
    return attend(q, k_pages, v_pages, batch, scale, softcap)
