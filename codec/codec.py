"""KvCodec: (truth, prediction) tensors to bytes and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from codec.container import SpanCode, read_span, read_varints, write_span, write_varints
from codec.errors import BadInput, CorruptedCode, PackMismatch
from codec.pack import CodecPack
from codec.quantize import LEVELS_PER_OCTAVE, MAX_LEVEL, MIN_LEVEL, Q_LIMIT, ROUNDING, quantise, token_steps
from codec.rans import RansTables, SpanStream, decode, encode
from codec.rate import CLASSES_PER_OCTAVE, NUM_CLASSES, RATE_WEIGHT, class_of, final_classes
from codec.spec import KEEP_FACTOR, MAX_SPAN_TOKENS, step_of
from codec.weighting import apply_blocks

BATCH_TOKENS = 4096
"""Tokens coded in one numpy pass: bounds the memory of a long session."""

_CLASSES_PER_LEVEL = CLASSES_PER_OCTAVE // LEVELS_PER_OCTAVE


def tokens_per_lane(step: float) -> int:
    """Tokens that share a rANS lane: a lane's end costs three bytes, which must stay small beside the tokens it codes."""
    return 2 if step < 0.8 else 4 if step < 1.8 else 8


@dataclass
class DecodedSpan:
    """A span after entropy decoding: its header, integers q int32 [T, K] and their scale classes int32 [T, K], which give reconstruction points."""

    code: SpanCode
    q: np.ndarray
    classes: np.ndarray


class KvCodec:
    """Codes pre-RoPE KV vectors against a prediction of them.

    Args:
        pack: weights, transform and tables.
        device: where the matrix products run; the entropy coder runs on the CPU.
        rounding: the quantiser's rounding constant, before the choice by rate (encoder only; any value decodes).
        rate_weight: squared error in steps that a bit is worth to the encoder; 0 rounds without looking at the rate.
    """

    def __init__(self, pack: CodecPack, device: torch.device | str = "cpu", rounding: float = ROUNDING, rate_weight: float = RATE_WEIGHT):
        self.pack, self.layout, self.device = pack, pack.layout, torch.device(device)
        self.rounding, self.rate_weight = rounding, rate_weight
        self.weighting, self.transform = pack.weighting.to(device), pack.transform.to(device)
        self.tables = RansTables.build(pack.model)
        self._sigma = pack.transform.variance.clamp_min(1e-12).sqrt().numpy()

    def num_components(self, step: float) -> int:
        """K: components kept at a step."""
        return max(1, self.transform.kept(KEEP_FACTOR * step))

    def components(self, truth: torch.Tensor, prediction: torch.Tensor, count: int) -> torch.Tensor:
        """First `count` transform components, float32 [T, count], of truth - prediction, both float32 [T, D]."""
        if truth.shape != prediction.shape or truth.ndim != 2 or truth.shape[1] != self.layout.dim:
            raise BadInput(
                f"truth {tuple(truth.shape)} and prediction {tuple(prediction.shape)} do not fit",
                f"pass two [T, {self.layout.dim}] tensors",
            )
        residual = truth.to(self.device, torch.float32) - prediction.to(self.device, torch.float32)
        c = self.transform.project(apply_blocks(residual, self.weighting.root), count)
        if not bool(torch.isfinite(c).all()):
            raise BadInput("the KV to be coded holds NaN or infinity", "the model overflowed; try float32")
        return c

    def _quantised(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], step: float, levels: Sequence[torch.Tensor | None]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Integers int32 [sum T, K], classes before the gain int32 [sum T or 1, K], gains uint8 [sum T]."""
        k = self.num_components(step)
        base = class_of(self._sigma[:k], step)
        parts, classes, gains = [], [], []
        for (truth, prediction), level in zip(pairs, levels, strict=True):
            c = self.components(truth, prediction, k)
            if level is not None and (level.shape != (len(c),) or int(level.min()) < MIN_LEVEL or int(level.max()) > MAX_LEVEL):
                raise BadInput("step levels do not fit", f"pass integers [T] from {MIN_LEVEL} to {MAX_LEVEL}")
            scaled = c / token_steps(step, level, len(c), self.device)
            q, x = quantise(scaled, self.rounding).cpu().numpy(), scaled.cpu().numpy()
            own = self._token_classes(base, None if level is None else level.cpu().numpy(), len(q))
            model = self.tables.model
            if level is None:
                gain = model.choose_gains(q, base)
            else:
                gain = np.zeros(len(q), np.uint8)
                for value in np.unique(level.cpu().numpy()):
                    rows = level.cpu().numpy() == value
                    gain[rows] = model.choose_gains(q[rows], own[rows][0])
            if self.rate_weight > 0:
                q = model.refine(x, q, final_classes(own, gain), self.rate_weight)
            parts.append(q)
            classes.append(own)
            gains.append(gain)
        return np.concatenate(parts), np.concatenate(classes), np.concatenate(gains)

    @staticmethod
    def _token_classes(base: np.ndarray, levels: np.ndarray | None, tokens: int) -> np.ndarray:
        """int32 [tokens, K]: a coarser step moves every component down by whole classes."""
        if levels is None:
            return np.broadcast_to(base, (tokens, len(base)))
        return np.clip(base[None] - _CLASSES_PER_LEVEL * levels.astype(np.int32)[:, None], 0, NUM_CLASSES - 1)

    def encode_many(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], quality: str | float, levels: Sequence[torch.Tensor | None] | None = None
    ) -> list[bytes]:
        """One span of bytes for each (truth [T, D], prediction [T, D]), float32.

        Args:
            pairs: spans of at most MAX_SPAN_TOKENS tokens.
            quality: a name of codec.spec.QUALITIES, or a step.
            levels: for each span None or integers [T]: token t uses step * 2 ** (level / 4).
        """
        step = step_of(quality) if isinstance(quality, str) else float(quality)
        levels = [None] * len(pairs) if levels is None else levels
        for truth, _ in pairs:
            if not 0 < len(truth) <= MAX_SPAN_TOKENS:
                raise BadInput(f"a span of {len(truth)} tokens", f"code 1 to {MAX_SPAN_TOKENS} tokens a span")
        spans: list[bytes] = []
        for some in _batches([len(t) for t, _ in pairs]):
            spans += self._encode_batch([pairs[n] for n in some], step, [levels[n] for n in some])
        return spans

    def _encode_batch(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], step: float, levels: Sequence[torch.Tensor | None]
    ) -> list[bytes]:
        per_lane, sizes = tokens_per_lane(step), [len(t) for t, _ in pairs]
        q, classes, gains = self._quantised(pairs, step, levels)
        streams = encode(self.tables, q, classes, gains, sizes, per_lane)
        limit = self.tables.model.limit[final_classes(classes, gains)]
        over = np.abs(q) - limit - 1
        spans, at = [], 0
        for stream, level, size in zip(streams, levels, sizes, strict=True):
            rows = slice(at, at + size)
            at += size
            escaped = over[rows] >= 0
            remainder = over[rows][escaped].astype(np.int64) * 2 + (q[rows][escaped] < 0)
            stored = level.cpu().numpy().astype(np.int8) if level is not None and bool((level != 0).any()) else None
            spans.append(
                write_span(
                    SpanCode(step, per_lane, size, q.shape[1], self.pack.tag, stream.states, stream.words, stored, write_varints(remainder))
                )
            )
        return spans

    def encode(self, truth: torch.Tensor, prediction: torch.Tensor, quality: str | float, levels: torch.Tensor | None = None) -> bytes:
        """encode_many of one span."""
        return self.encode_many([(truth, prediction)], quality, [levels])[0]

    def read_integers(self, spans: Sequence[bytes]) -> list[DecodedSpan]:
        """Entropy decoding only. Named errors as in codec.container, and PackMismatch."""
        codes = [read_span(s) for s in spans]
        for code in codes:
            if code.pack_tag != self.pack.tag:
                raise PackMismatch("a coded span was written with another codec pack", "use the pack it was written with")
            if code.num_components != self.num_components(code.step) or code.num_components > self.transform.num_components:
                raise CorruptedCode("a coded span's component count is not its step's", "restore the file from a copy")
        result: list[DecodedSpan | None] = [None] * len(codes)
        for key in sorted({(c.step, c.tokens_per_lane) for c in codes}):
            chosen = [n for n, c in enumerate(codes) if (c.step, c.tokens_per_lane) == key]
            for some in _batches([codes[n].num_tokens for n in chosen]):
                group = [chosen[i] for i in some]
                for n, decoded in zip(group, self._decode_batch([codes[n] for n in group]), strict=True):
                    result[n] = decoded
        return [decoded for decoded in result if decoded is not None]

    def _decode_batch(self, codes: list[SpanCode]) -> list[DecodedSpan]:
        base = class_of(self._sigma[: codes[0].num_components], codes[0].step)
        classes = [self._token_classes(base, c.levels, c.num_tokens) for c in codes]
        streams = [SpanStream(c.num_tokens, c.states, c.words) for c in codes]
        q, gains = decode(self.tables, streams, classes, codes[0].tokens_per_lane)
        final = final_classes(np.concatenate(classes), gains)
        limit = self.tables.model.limit[final]
        out, at = [], 0
        for code in codes:
            rows = slice(at, at + code.num_tokens)
            at += code.num_tokens
            mine = q[rows]
            escaped = mine > limit[rows]
            remainder = read_varints(code.escapes, int(escaped.sum()))
            magnitude = limit[rows][escaped] + 1 + (remainder >> 1)
            if len(magnitude) and int(magnitude.max()) > Q_LIMIT:
                raise CorruptedCode("a coded integer is out of range", "restore the file from a copy")
            mine[escaped] = np.where(remainder & 1, -magnitude, magnitude)
            out.append(DecodedSpan(code, mine, final[rows]))
        return out

    def decode_many(self, spans: Sequence[bytes], predictions: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """KV float32 [T, D] of every span, given the predictions that the encoder used (up to rounding)."""
        if len(spans) != len(predictions):
            raise BadInput(f"{len(spans)} spans and {len(predictions)} predictions", "pass one prediction a span")
        decoded = []
        for span, prediction in zip(self.read_integers(spans), predictions, strict=True):
            if prediction.shape != (span.code.num_tokens, self.layout.dim):
                what = f"a prediction of shape {tuple(prediction.shape)} for a span of {span.code.num_tokens} tokens"
                raise BadInput(what, "predict the tokens that were coded")
            decoded.append(prediction.to(self.device, torch.float32) + self.residual(span))
        return decoded

    def residual(self, span: DecodedSpan) -> torch.Tensor:
        """float32 [T, D]: what a span adds to the prediction."""
        level = None if span.code.levels is None else torch.from_numpy(span.code.levels.copy())
        points = torch.from_numpy(self.tables.model.reconstruct(span.q, span.classes)).to(self.device)
        c = points * token_steps(span.code.step, level, len(points), self.device)
        return apply_blocks(self.transform.expand(c, self.layout.dim), self.weighting.inverse)

    def decode(self, span: bytes, prediction: torch.Tensor) -> torch.Tensor:
        """decode_many of one span."""
        return self.decode_many([span], [prediction])[0]

    def ideal_bits(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], quality: str | float, levels: Sequence[torch.Tensor | None] | None = None
    ) -> float:
        """Code length, in bits, of the symbols that encode_many would write for these spans, under the pack's unrounded tables."""
        step = step_of(quality) if isinstance(quality, str) else float(quality)
        total = 0.0
        for number, pair in enumerate(pairs):
            q, classes, gains = self._quantised([pair], step, [None if levels is None else levels[number]])
            total += float(self.tables.model.code_lengths(q, classes, gains).sum())
        return total


def _batches(sizes: Sequence[int]) -> list[list[int]]:
    """Indices in order, grouped so that a group has at most BATCH_TOKENS tokens (or is a single span)."""
    groups: list[list[int]] = []
    room = 0
    for n, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = BATCH_TOKENS
        groups[-1].append(n)
        room -= size
    return groups
