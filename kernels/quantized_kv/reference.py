"""Meaning of the quantised formats q4, q3 and q2 in plain PyTorch: rotated Lloyd-Max codes of keys and values being attended.

A row x of d channels (a key or value minus its channel mean, the key rotated to its position) is kept as d codes of 2, 3 or 4 bits and one
16-bit scale: its norm is taken off, random signs and a Hadamard transform make its channels Gaussian, each becomes the nearest of the
levels (Zandieh et al.: "TurboQuant", arXiv 2504.19874). The scale makes the decoded row as long as the true one.
The means come back analytically: a key's as a term of the score that depends on the query and the position only, a value's as one
addition to the output. The rotation is undone on the query and on the output, so no key or value is ever rotated back.
The first tokens of a request draw attention from all others whatever they say (Xiao et al.: "attention sinks", arXiv 2309.17453) and
look like no other: theirs may be kept exact beside the codes. So may a few tokens before each query, which it attends to most (the
residual window of Liu et al.: "KIVI", arXiv 2402.02750, here of a fixed length for every query, whatever block it comes in).

Axes: P pages, S page size, G KV heads, H query heads, d head size (a power of two from 32 on), N new tokens, B requests, R sink slots.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.paged_attention import reference as paged
from kernels.rope.reference import apply_rope

FORMATS = {"q4": 4, "q3": 3, "q2": 2}
NUM_SINKS = 4  # tokens at a request's start that are kept exact, where they are
NUM_RECENT = 32  # tokens up to each query's own that it reads exactly, where they are kept
RING = 96  # of a request's last tokens kept for that: NUM_RECENT still lie before a block of 65, should all its drafts be rejected

# A level is v (v^2 + a), v = 2^-shift times an odd integer, in bfloat16, in units of `unit` standard deviations: within 2% of the best codebook's
# squared error on a Gaussian (0.00965, 0.0346, 0.1175 at 4, 3 and 2 bits), and three packed operations to evaluate where a table would cost a
# lookup for every element. The unit is nobody's: a row's scale is taken from the levels that the row got.
LEVEL_COEFFICIENTS = {4: (4, 1.8515625, 1.046875), 3: (3, 2.609375, 0.73046875), 2: (2, 4.46875, 0.400390625)}  # bits: (shift, a, unit)


class QuantizedPages(NamedTuple):
    """One layer's pages. codes: uint8 [P, G, S, d * bits / 8], packed by `pack`; scales: float16 [P, G, S]."""

    bits: int
    k_codes: torch.Tensor
    k_scale: torch.Tensor
    v_codes: torch.Tensor
    v_scale: torch.Tensor


class ChannelMeans(NamedTuple):
    """One layer's calibrated channel means, float32 [G, d]: of keys before rotation (None: zero, which saves a product) and of values."""

    k_mean: torch.Tensor | None
    v_mean: torch.Tensor


class ExactSinks(NamedTuple):
    """One layer's first tokens kept exact; attention reads these and leaves their codes alone."""

    k: torch.Tensor  # [R, NUM_SINKS, G, d] bfloat16 or float32, keys rotated to positions 0, 1, ..., their mean not taken off
    v: torch.Tensor  # the same of values
    rows: torch.Tensor  # [B] int32, the slot of each request


class ExactRecent(NamedTuple):
    """One layer's last tokens kept exact: a query reads the NUM_RECENT up to its own here and leaves their codes alone."""

    k_new: torch.Tensor  # [N, G, d] this step's keys, rotated, in the queries' dtype
    v_new: torch.Tensor  # [N, G, d]
    k_ring: torch.Tensor  # [R, RING, G, d] of the same dtype: keys of earlier tokens, rotated, position p in row p % RING
    v_ring: torch.Tensor
    rows: torch.Tensor  # [B] int32, the slot of each request
    since: torch.Tensor  # [B] int32, first position that its ring holds, at most the first new token's


def check_head_dim(head_dim: int) -> None:
    """ValueError for a head size that is not a power of two of at least 32."""
    if head_dim < 32 or head_dim & (head_dim - 1):
        raise ValueError(f"quantised formats need a head size that is a power of two of at least 32, not {head_dim}")


def new_pages(
    bits: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, device: torch.device | str = "cpu"
) -> QuantizedPages:
    """Empty pages of one layer. ValueError for other bits than 2, 3, 4, or as `check_head_dim`."""
    if bits not in LEVEL_COEFFICIENTS:
        raise ValueError(f"no quantised format of {bits} bits (choose one of {', '.join(FORMATS)})")
    check_head_dim(head_dim)
    codes = [torch.zeros((num_pages, num_kv_heads, page_size, head_dim * bits // 8), dtype=torch.uint8, device=device) for _ in range(2)]
    scales = [torch.zeros((num_pages, num_kv_heads, page_size), dtype=torch.float16, device=device) for _ in range(2)]
    return QuantizedPages(bits, codes[0], scales[0], codes[1], scales[1])


@functools.cache
def rotation(head_dim: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """R float32 [d, d], orthonormal: random signs, then Sylvester's Hadamard matrix. A row x becomes x @ R."""
    matrix = torch.ones(1, 1, dtype=torch.float32)
    while len(matrix) < head_dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (head_dim, 1), generator=torch.Generator().manual_seed(head_dim)) * 2.0 - 1
    return (signs * matrix * head_dim**-0.5).to(device)


@functools.cache
def levels(bits: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """bfloat16 [2^bits], rising."""
    shift, a, _ = LEVEL_COEFFICIENTS[bits]
    v = (torch.arange(2**bits, dtype=torch.float32) * 2 - (2**bits - 1)) * 2.0**-shift
    inner = (v * v + a).bfloat16().float()
    return (v * inner).bfloat16().to(device)


@functools.cache
def thresholds(bits: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """float32 [2^bits - 1], half way between neighbouring levels, in standard deviations."""
    value = levels(bits).float() * LEVEL_COEFFICIENTS[bits][2]
    return ((value[1:] + value[:-1]) / 2).to(device)


@functools.cache
def hadamard_signs(head_dim: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """bfloat16 [d, d]: `rotation` without its factor d^-1/2, exact in 16 bits."""
    return rotation(head_dim, device).sign().bfloat16()


def hadamard(x: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    """x @ `rotation`, or @ its transpose, by the fast transform: float32 [*, d]. Sums of pairs only, so no row depends on the rows beside it."""
    d, factors = x.shape[-1], _sign_factors(x.shape[-1], x.device)
    if not inverse:
        x = x * factors
    for _ in range(d.bit_length() - 1):
        # the same geometry at every stage (Pease, 1968): whole halves are written
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        x = torch.cat((a + b, a - b), -1)
    return x * factors if inverse else x


@functools.cache
def _sign_factors(head_dim: int, device: torch.device | str) -> torch.Tensor:
    """float32 [d], +-d^-1/2: the signs of `rotation` with its scale."""
    return rotation(head_dim, device)[:, 0].contiguous()


def _to_bytes(values: torch.Tensor, width: int) -> torch.Tensor:
    """Numbers of `width` bits [*, n] to bytes uint8 [*, n * width / 8], the first in the lowest bits."""
    grouped = values.long().unflatten(-1, (-1, 8 // width))
    return (grouped << (width * torch.arange(8 // width, device=values.device))).sum(-1).to(torch.uint8)


def _from_bytes(packed: torch.Tensor, width: int) -> torch.Tensor:
    shifts = width * torch.arange(8 // width, device=packed.device)
    return ((packed[..., None].long() >> shifts) & ((1 << width) - 1)).flatten(-2)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [*, d] to bytes uint8 [*, d * bits / 8], neighbours in one byte. 3 bits: all lower two bits first, then the upper ones."""
    if bits == 3:
        return torch.cat([_to_bytes(codes & 3, 2), _to_bytes(codes >> 2, 1)], -1)
    return _to_bytes(codes, bits)


def unpack(packed: torch.Tensor, bits: int, head_dim: int) -> torch.Tensor:
    """Inverse of `pack`: uint8 [*, d]."""
    if bits == 3:
        codes = _from_bytes(packed[..., : head_dim // 4], 2) | _from_bytes(packed[..., head_dim // 4 :], 1) << 2
    else:
        codes = _from_bytes(packed, bits)
    return codes.to(torch.uint8)


def quantise(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows x float32 [*, d] to (packed codes uint8 [*, d * bits / 8], scale float16 [*])."""
    rotated = hadamard(x)
    norm = rotated.norm(dim=-1)
    unit = rotated * (x.shape[-1] ** 0.5 / norm.clamp_min(1e-20))[..., None]
    codes = torch.bucketize(unit, thresholds(bits, x.device))
    length = levels(bits, x.device).float()[codes].norm(dim=-1)
    return pack(codes.to(torch.uint8), bits), (norm / length).to(torch.float16)


def dequantise(packed: torch.Tensor, scale: torch.Tensor, bits: int, head_dim: int) -> torch.Tensor:
    """Inverse of `quantise`: float32 [*, d]."""
    if bits == 3:
        value = F.embedding(unpack(packed, bits, head_dim).int(), levels(bits, packed.device).float()[:, None])[..., 0]
    else:
        value = F.embedding(packed.int(), _levels_of_bytes(bits, packed.device)).flatten(-2)
    return hadamard(value * scale.float()[..., None], inverse=True)


@functools.cache
def _levels_of_bytes(bits: int, device: torch.device | str) -> torch.Tensor:
    """float32 [256, 8 / bits]: the levels that a byte holds."""
    every = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
    return levels(bits, device).float()[_from_bytes(every, bits)]


def quantized_kv_write(
    k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor, means: ChannelMeans, pages: QuantizedPages
) -> None:
    """Take the means off, rotate keys to their positions, quantise both and write them into their slots, in place.

    Args:
        k, v: [N, G, d], keys before rotation.
        cos, sin: [N, d/2] float32.
        slots: [N] int64, slot = page * S + offset, no slot twice.
    """
    page_size = pages.k_scale.shape[2]
    page, offset = slots // page_size, slots % page_size
    keys = k.float() if means.k_mean is None else k.float() - means.k_mean
    packed, scale = quantise(torch.stack((apply_rope(keys, cos, sin), v.float() - means.v_mean)), pages.bits)
    pages.k_codes[page, :, offset], pages.v_codes[page, :, offset] = packed
    pages.k_scale[page, :, offset], pages.v_scale[page, :, offset] = scale


def quantized_paged_attention(
    q: torch.Tensor,
    pages: QuantizedPages,
    means: ChannelMeans,
    cos_table: torch.Tensor,
    sin_table: torch.Tensor,
    page_table: torch.Tensor,
    query_lens: Sequence[int] | torch.Tensor,
    context_lens: Sequence[int] | torch.Tensor,
    scale: float,
    *,
    sinks: ExactSinks | None = None,
    recent: ExactRecent | None = None,
    deterministic: bool = False,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """`paged_attention` over decoded pages; the other arguments and the result are those of `kernels.paged_attention`.

    Args:
        q: [N, H, d] rotated queries.
        cos_table, sin_table: [positions, d/2] float32, row p the angles of position p, p times a frequency (all may be scaled by one factor);
            a request's keys stand at positions 0, 1, ...
        sinks: the requests' first tokens, read in the place of their codes; None where the codes are all there is.
        recent: the same for the last tokens before each query.
    """
    head_dim, page_size = q.shape[-1], pages.k_scale.shape[2]
    lens = context_lens.tolist() if isinstance(context_lens, torch.Tensor) else list(context_lens)
    counts = [-(-context // page_size) for context in lens]
    used = torch.cat([row[:count] for row, count in zip(page_table, counts, strict=True)]).long()
    codes, scales = torch.stack((pages.k_codes[used], pages.v_codes[used])), torch.stack((pages.k_scale[used], pages.v_scale[used]))
    k, v = dequantise(codes, scales, pages.bits, head_dim).transpose(2, 3).contiguous()  # [used pages, S, G, d]
    v += means.v_mean
    if means.k_mean is not None:
        stop = max(counts) * page_size
        angles = [F.pad(t[:stop], (0, 0, 0, max(0, stop - len(t)))) for t in (cos_table, sin_table)]
        mean = apply_rope(means.k_mean.expand(stop, -1, -1), *angles).unflatten(0, (-1, page_size))
        k += torch.cat([mean[:count] for count in counts])
    firsts = [sum(counts[:b]) for b in range(len(counts))]
    if sinks is not None:
        for first, context, row in zip(firsts, lens, sinks.rows.tolist(), strict=True):
            n, start = min(NUM_SINKS, context), first * page_size
            k.flatten(0, 1)[start : start + n] = sinks.k[row, :n].float()
            v.flatten(0, 1)[start : start + n] = sinks.v[row, :n].float()
    if recent is not None:
        queries = query_lens.tolist() if isinstance(query_lens, torch.Tensor) else list(query_lens)
        starts = [first * page_size for first in firsts]
        num_sinks = 0 if sinks is None else NUM_SINKS
        return _attend_recent(q, k, v, starts, queries, lens, scale, recent, num_sinks, deterministic, sliding_window, softcap)
    own = torch.arange(max(counts)) + torch.tensor(firsts)[:, None]
    out = paged.paged_attention(
        q.float(),
        k,
        v,
        own.clamp_max(len(used) - 1),
        query_lens,
        lens,
        scale,
        deterministic=deterministic,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    return out.to(q.dtype)


def _attend_recent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    firsts: list[int],
    query_lens: list[int],
    context_lens: list[int],
    scale: float,
    recent: ExactRecent,
    num_sinks: int,
    deterministic: bool,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention over decoded keys and values, request b's from row firsts[b] of k and v [*, S, G, d] on, and over exact ones near each query but
    for the sinks, which k and v hold exactly."""
    out, row = torch.empty_like(q), 0
    for b, (first, n, context) in enumerate(zip(firsts, query_lens, context_lens, strict=True)):
        start, since = context - n, int(recent.since[b])
        low = max(start + 1 - NUM_RECENT, 0)
        before = torch.arange(low, start, device=q.device)
        keys, values = (x.flatten(0, 1)[first : first + context].transpose(0, 1) for x in (k, v))  # [G, context, d]
        exact_k, exact_v = (
            torch.cat(
                (
                    # a row that is not held may be anything
                    ring[recent.rows[b], before % RING].masked_fill((before < since)[:, None, None], 0.0),
                    new[row : row + n].to(ring.dtype),
                )
            )
            .float()
            .transpose(0, 1)  # [G, context - low, d]
            for ring, new in ((recent.k_ring, recent.k_new), (recent.v_ring, recent.v_new))
        )
        step = 1 if deterministic else paged.TILE_ROWS
        for a in range(0, n, step):
            block = q[row + a : row + min(a + step, n)].float()
            count, end = len(block), start + a + len(block)
            grouped = block.unflatten(1, (k.shape[2], -1)).permute(1, 0, 2, 3).flatten(1, 2)  # [G, count * (H // G), d]
            position = torch.arange(start + a, end, device=q.device)[:, None]
            key = torch.arange(end, device=q.device)
            near = max(low, start + a + 1 - NUM_RECENT)
            exact = ((key >= position + 1 - NUM_RECENT) & (key >= max(since, num_sinks)))[:, near:].repeat_interleave(
                grouped.shape[1] // count, 0
            )
            outside = key > position
            if sliding_window is not None:
                outside |= key <= position - sliding_window
            hidden = outside.repeat_interleave(grouped.shape[1] // count, 0)
            scores = grouped @ keys[:, :end].transpose(1, 2)
            close = grouped @ exact_k[:, near - low : end - low].transpose(1, 2)
            scores[..., near:] = torch.where(exact, close, scores[..., near:])
            scores *= scale
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            close = weights[..., near:] * exact
            weights[..., near:] *= ~exact
            result = weights @ values[:, :end] + close @ exact_v[:, near - low : end - low]
            out[row + a : row + a + count] = result.unflatten(1, (count, -1)).permute(1, 0, 2, 3).flatten(1, 2).to(q.dtype)
        row += n
    return out
