"""Face of the compiled decoding of coded keys and values: arrays in, addresses to the compiled code. Importing this module loads that code, which
compiles it once for a machine.

Axes: T tokens of all spans, K components, C scale classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from kernels.cpu_decode.machine_code import functions

_FUNCTIONS = functions()
LANES = 16


class SpanTables(NamedTuple):
    """What streams are decoded with. symbols int16 [C, 2^14], of a slot; entries int32, start << 16 | frequency, class after class; centres int32 [C],
    the entry of symbol 0; gain_symbols uint8 [2^14] and gain_entries int32 [16], the same of a token's gain."""

    symbols: np.ndarray
    entries: np.ndarray
    centres: np.ndarray
    gain_symbols: np.ndarray
    gain_entries: np.ndarray


class ComponentTables(NamedTuple):
    """limits int32 [C], the greatest integer of a class that is no escape; points float32 [C, 4], what is added to 0, 1, 2 and greater integers."""

    limits: np.ndarray
    points: np.ndarray


def _as(x: np.ndarray, dtype: type) -> np.ndarray:
    return np.ascontiguousarray(x, dtype)


def _new(shape: int | tuple[int, ...], dtype: type) -> np.ndarray:
    """An array that compiled code fills."""
    return np.empty(shape, dtype)


def _stride(own: np.ndarray, tokens: int) -> int:
    """From a token's classes to the next one's."""
    if len(own) not in (1, tokens):
        raise ValueError(f"classes of {len(own)} tokens for {tokens}")
    return 0 if len(own) == 1 else own.shape[1]


def rans_decode(
    tables: SpanTables, states: np.ndarray, words: Sequence[np.ndarray], sizes: Sequence[int], own: np.ndarray, tokens_per_lane: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Integers q int16 [T, K] (an escape reads limit + 1), gains uint8 [T], and whether every span ended as it should.

    Args:
        states: uint32 [lanes], of span after span. words: uint16 of each span. sizes: tokens of each span.
        own: int32 [T or 1, K], classes before the gain.
    """
    tokens, (_, count) = sum(sizes), own.shape
    if min(sizes) < 1 or len(words) != len(sizes) or len(states) != sum(-(-size // tokens_per_lane) for size in sizes):
        raise ValueError("states, words and sizes are not those of the same spans")
    lanes, classes = states.astype(np.uint32), _as(own, np.int32)
    joined = np.concatenate([*words, np.zeros(1, np.uint16)]).astype(np.uint16, copy=False)
    starts, lengths = np.cumsum([0, *map(len, words)], dtype=np.int64), np.array(sizes, np.int64)
    q, gains, intact = _new((tokens, count), np.int16), _new(tokens, np.uint8), _new(len(sizes), np.int64)
    _FUNCTIONS["rans_decoded"](
        lanes.ctypes.data, joined.ctypes.data, starts.ctypes.data, lengths.ctypes.data, len(sizes), tokens_per_lane,
        classes.ctypes.data, _stride(classes, tokens), count, len(tables.centres), tables.symbols.ctypes.data, tables.entries.ctypes.data,
        tables.centres.ctypes.data, tables.gain_symbols.ctypes.data, tables.gain_entries.ctypes.data,
        q.ctypes.data, gains.ctypes.data, intact.ctypes.data,
    )  # fmt: skip
    return q, gains, bool(intact.all())


def rans_encode(
    tables: SpanTables, limits: np.ndarray, q: np.ndarray, own: np.ndarray, gains: np.ndarray, sizes: Sequence[int], tokens_per_lane: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(states uint32 [lanes], words uint16 [n]) of each span: inverse of `rans_decode`. q: int32 [T, K]; limits: int32 [C], as below."""
    tokens, count = q.shape
    if min(sizes, default=1) < 1 or sum(sizes) != tokens or len(gains) != tokens or own.shape[1] != count or tokens_per_lane < 1:
        raise ValueError("integers, classes, gains and sizes are not those of the same spans")
    lanes = [-(-size // tokens_per_lane) for size in sizes]
    numbers, classes, own_gains, most = _as(q, np.int32), _as(own, np.int32), _as(gains, np.uint8), _as(limits, np.int32)
    lengths, states = np.array(sizes, np.int64), _new(sum(lanes), np.uint32)
    words, starts = _new(tokens * (count + 1), np.uint16), _new(len(sizes), np.int64)
    _FUNCTIONS["rans_encoded"](
        numbers.ctypes.data, classes.ctypes.data, _stride(classes, tokens), own_gains.ctypes.data, lengths.ctypes.data, len(sizes),
        tokens_per_lane, count, len(tables.centres), most.ctypes.data, tables.entries.ctypes.data, tables.centres.ctypes.data,
        tables.gain_entries.ctypes.data, states.ctypes.data, words.ctypes.data, starts.ctypes.data,
    )  # fmt: skip
    ends, lane_ends = (count + 1) * np.cumsum(lengths), np.cumsum(lanes)
    own_states = np.split(states, lane_ends[:-1]) if len(sizes) else []
    return [(own, words[start:end].copy()) for own, start, end in zip(own_states, starts.tolist(), ends.tolist(), strict=True)]


def components(
    tables: ComponentTables, q: np.ndarray, own: np.ndarray, gains: np.ndarray, steps: np.ndarray, room: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Components float32 [T, K] of integers q int16 [T, K], up to `room` places t K + k of escapes in rising order, and how many escapes there are.

    Args:
        own: int32 [T or 1, K], classes before the gain. gains: uint8 [T]. steps: float32 [T].
    """
    tokens, count = q.shape
    if own.shape[1] != count or len(gains) != tokens or len(steps) != tokens:
        raise ValueError("classes, gains and steps are not those of the integers")
    numbers, classes, own_gains, own_steps = _as(q, np.int16), _as(own, np.int32), _as(gains, np.uint8), _as(steps, np.float32)
    out, escapes, found = _new((tokens, count), np.float32), _new(room, np.int64), _new(1, np.int64)
    _FUNCTIONS["components"](
        numbers.ctypes.data, classes.ctypes.data, _stride(classes, tokens), own_gains.ctypes.data, own_steps.ctypes.data,
        tables.limits.ctypes.data, tables.points.ctypes.data, tokens, count, len(tables.limits), out.ctypes.data,
        escapes.ctypes.data, room, found.ctypes.data,
    )  # fmt: skip
    return out, escapes[: int(found[0])], int(found[0])


class PriceTables(NamedTuple):
    """limits and centres int32 [C], as above; excess int32 [entries], what a size takes beyond a 0, in whole units; bits float32 [entries] and points
    float32 [C, 4], as `RateChoice.refine` has them."""

    limits: np.ndarray
    centres: np.ndarray
    excess: np.ndarray
    bits: np.ndarray
    points: np.ndarray


def choose_gains(
    tables: PriceTables, q: np.ndarray, base: np.ndarray, shifts: np.ndarray, sampled_zeros: np.ndarray, zeros: np.ndarray, sample: int
) -> np.ndarray:
    """Gains uint8 [T] with the shortest code for integers q int32 [T, K].

    Args:
        base: int32 [K], classes. shifts: int32 [T], classes that a token's step moves them by.
        sampled_zeros, zeros: int64 [T, 16], what a token of zeros takes under each gain on every `sample`-th component, and on all.
    """
    tokens, count = q.shape
    if len(base) != count or len(shifts) != tokens or not sampled_zeros.shape == zeros.shape == (tokens, 16):
        raise ValueError("classes, steps and costs of zeros are not those of the integers")
    numbers, classes, moves = _as(q, np.int32), _as(base, np.int32), _as(shifts, np.int32)
    few, every, gains = _as(sampled_zeros, np.int64), _as(zeros, np.int64), _new(tokens, np.uint8)
    _FUNCTIONS["gains_chosen"](
        numbers.ctypes.data, classes.ctypes.data, moves.ctypes.data, tokens, count, len(tables.limits), tables.limits.ctypes.data,
        tables.centres.ctypes.data, tables.excess.ctypes.data, sample, few.ctypes.data, every.ctypes.data, gains.ctypes.data,
    )  # fmt: skip
    return gains


def refine(
    tables: PriceTables, x: np.ndarray, q: np.ndarray, base: np.ndarray, shifts: np.ndarray, gains: np.ndarray, bit_price: float
) -> np.ndarray:
    """Integers int32 [T, K] of the least squared error + bit_price * bits near x float32 [T, K]; q int32 [T, K] where it is an escape. Others as for
    `choose_gains`; gains uint8 [T]."""
    tokens, count = q.shape
    if x.shape != q.shape or len(base) != count or not len(shifts) == len(gains) == tokens:
        raise ValueError("numbers, classes, steps and gains are not those of the integers")
    numbers, old, classes, moves, own = (
        _as(part, kind) for part, kind in ((x, np.float32), (q, np.int32), (base, np.int32), (shifts, np.int32), (gains, np.uint8))
    )
    out = _new((tokens, count), np.int32)
    _FUNCTIONS["refined"](
        numbers.ctypes.data, old.ctypes.data, classes.ctypes.data, moves.ctypes.data, own.ctypes.data, tokens, count, len(tables.limits),
        tables.limits.ctypes.data, tables.centres.ctypes.data, tables.points.ctypes.data, tables.bits.ctypes.data, bit_price, out.ctypes.data,
    )  # fmt: skip
    return out


def rotated(
    y: torch.Tensor, mu: torch.Tensor, rest: torch.Tensor | None, angles: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor
) -> None:
    """Keys and values of a layer from a product: y + mu + rest, keys rotated.

    Args:
        y: bf16 [T, 2 G d], keys before values. mu: float32 [2 G d]. rest: float32 [T, 2 G d], its rows in one piece each, or None.
        angles: cos, sin float32 [T, d / 2]. out: bf16 [T, 2, G, d], written; each row in one piece.
    """
    if not out[:1].is_contiguous():
        raise ValueError(f"a product does not fit keys and values {list(out.shape)} that lie in several pieces")
    _rotate(y, mu, rest, angles, out[:, :, None], (0, out.stride(1), out.stride(0)), None)


def rotated_into_pages(
    y: torch.Tensor,
    mu: torch.Tensor,
    rest: torch.Tensor | None,
    angles: tuple[torch.Tensor, torch.Tensor],
    kv: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Keys and values of all layers from a product, written where pages hold them.

    Args:
        y: bf16 [T, L 2 G d], keys before values in each layer. mu: float32 [L 2 G d]. rest: float32 [T, L 2 G d], its rows in one piece each, or None.
        angles: cos, sin float32 [T, d / 2]. kv: bf16 [L, 2, P, S, G, d], in one piece.
        slots: int64 [T], page S + offset of each token, within bounds.
    """
    if not kv.is_contiguous() or slots.shape != y.shape[:1] or slots.dtype != torch.int64 or not slots.is_contiguous():
        raise ValueError(f"slots {list(slots.shape)} and pages {list(kv.shape)} do not fit a product {list(y.shape)}, or lie in pieces")
    if len(slots) and not 0 <= int(slots.min()) <= int(slots.max()) < kv.shape[2] * kv.shape[3]:
        raise ValueError(f"slots {int(slots.min())} to {int(slots.max())} of {kv.shape[2] * kv.shape[3]}")
    _rotate(y, mu, rest, angles, kv[:, :, 0, :1].permute(2, 1, 0, 3, 4), (kv.stride(0), kv.stride(1), kv.stride(3)), slots)


def _rotate(
    y: torch.Tensor,
    mu: torch.Tensor,
    rest: torch.Tensor | None,
    angles: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    strides: tuple[int, int, int],
    slots: torch.Tensor | None,
) -> None:
    """out: bf16 [any, 2, L, G, d], of which the address counts; strides: elements between layers, keys and values, and slots."""
    tokens, (_, _, layers, heads, d) = len(y), out.shape
    width = layers * 2 * heads * d
    cos, sin = (part.contiguous() for part in angles)
    fits = y.shape == (tokens, width) and mu.shape == (width,) and cos.shape == sin.shape == (tokens, d // 2) and d % (2 * LANES) == 0
    kinds = y.dtype == out.dtype == torch.bfloat16 and mu.dtype == cos.dtype == sin.dtype == torch.float32
    pieces = y.is_contiguous() and mu.is_contiguous() and (slots is not None or len(out) == tokens)
    if rest is not None:
        fits, kinds, pieces = fits and rest.shape == y.shape, kinds and rest.dtype == torch.float32, pieces and rest.stride(1) == 1
    if not (fits and kinds and pieces):
        raise ValueError(f"a product {list(y.shape)} does not fit keys and values {list(out.shape)}, or they lie otherwise in memory")
    where = (0, 0) if rest is None else (rest.data_ptr(), 4 * rest.stride(0))
    _FUNCTIONS["rotated"](
        y.data_ptr(), mu.data_ptr(), *where, cos.data_ptr(), sin.data_ptr(), tokens, layers, heads, d,
        0 if slots is None else slots.data_ptr(), out.data_ptr(), *(2 * stride for stride in strides),
    )  # fmt: skip


def scatters(rows: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether `scatter` takes these: 16 bits a number, a token's heads and a page of a head each in one piece, on a CPU."""
    plain = rows.device.type == out.device.type == "cpu" and rows.dtype == out.dtype and rows.element_size() == 2
    return plain and len(rows) > 0 and rows[0].is_contiguous() and out[0, 0].is_contiguous()


def scatter(rows: torch.Tensor, pages: np.ndarray, places: np.ndarray, order: np.ndarray, out: torch.Tensor) -> None:
    """Rows [T, G, d] into pages out [P, G, S, d]: number i of token t's head goes to place order[places[t] d + i] of page pages[t]'s head.

    pages, places: int64 [T]. order: int32 [S d]. All of them are within bounds: nothing is checked here but shapes.
    """
    tokens, heads, d = rows.shape
    if out.shape[1] != heads or out.shape[3] != d or len(order) != out.shape[2] * d or not len(pages) == len(places) == tokens:
        raise ValueError(f"rows {list(rows.shape)} do not fit pages {list(out.shape)}")
    if not scatters(rows, out) or pages.dtype != np.int64 or places.dtype != np.int64 or order.dtype != np.int32:
        raise ValueError("numbers of 16 bits in pieces, places in int64 and an order in int32 are taken")
    _FUNCTIONS["scattered"](
        rows.data_ptr(), 2 * rows.stride(0), tokens, heads, d, pages.ctypes.data, places.ctypes.data, order.ctypes.data,
        out.data_ptr(), 2 * out.stride(0), 2 * out.stride(1),
    )  # fmt: skip


__all__ = [
    "ComponentTables",
    "PriceTables",
    "SpanTables",
    "choose_gains",
    "components",
    "rans_decode",
    "rans_encode",
    "refine",
    "rotated",
    "rotated_into_pages",
    "scatter",
    "scatters",
]
