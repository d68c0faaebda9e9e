"""KvCodec: (truth, prediction) tensors to bytes and back.

Everything but the container's bytes is tensors on the codec's device: products, choices by rate (codec.choice) and the entropy coder (codec.coder).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from codec.choice import CLASSES_PER_LEVEL, RateChoice, classes_before_gain, final_classes
from codec.coder import SpanCoder
from codec.container import Reference, SpanCode, read_span, read_varint_lists, read_varints, write_span, write_varints
from codec.errors import BadInput, CorruptedCode, PackMismatch
from codec.pack import CodecPack
from codec.quantize import MAX_LEVEL, MIN_LEVEL, Q_LIMIT, ROUNDING, quantise, token_steps
from codec.rans import DAMAGED, SpanStream
from codec.rate import RATE_WEIGHT, class_of
from codec.residuals import Pair, Projection, Residuals, residuals_of
from codec.spec import KEEP_FACTOR, MAX_SPAN_TOKENS, step_of
from kernels.cpu_decode import compiled_available, compiled_loads
from kernels.reconstruct import Escapes, reconstruct
from kernels.upload import upload_arrays

BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens coded in one pass: bounds the memory of a long session, and fills a GPU, which codes a span's lanes one symbol after the other."""

_JOINED_TOKENS = 256
"""Tokens that a CPU projects together in bfloat16: products of 256 rows run at 210 GFLOP/s where those of 64 run at 165 (AVX512-bf16)."""

_MOST_COUNTS = 1024  # settings whose number of components is remembered: foreign files may name any step

PRODUCT_ROWS = 1024
"""Rows of every product of a GPU's decoder, filled up with zeros: a product's shape decides how its terms are summed, so a span gives the same
bits whatever is decoded beside it."""


def tokens_per_lane(step: float) -> int:
    """Tokens that share a rANS lane: a lane's end costs three bytes, which must stay small beside the tokens it codes."""
    return 2 if step < 0.8 else 4 if step < 1.8 else 8


class _Integers(NamedTuple):
    """What the entropy coder sees: q int32 [T, K], base int32 [K] (classes at the usual step and gain), levels int32 [T], gains uint8 [T]."""

    q: torch.Tensor
    base: torch.Tensor
    levels: torch.Tensor
    gains: torch.Tensor

    def classes(self) -> torch.Tensor:
        """int32 [T, K], after step level and gain."""
        return final_classes(self.base, self.levels, self.gains)


class SpanSetting(NamedTuple):
    """How a span is coded: its quantiser step, and whether what the transform's rows leave over is coded in the fallback basis."""

    step: float
    fallback: bool = False


class QuantisedSpans(NamedTuple):
    """Spans of one setting that wait for the entropy coder: their numbers, tokens, integers of all and references of each."""

    numbers: list[int]
    sizes: list[int]
    setting: SpanSetting
    integers: _Integers
    references: list[Sequence[Reference]]


class Earlier(NamedTuple):
    """What a span is coded against: its references, and the components float32 [T, K'] they stand for, scaled, zero where a token has none."""

    references: Sequence[Reference]
    components: torch.Tensor

    def added_to(self, c: torch.Tensor) -> torch.Tensor:
        """float32 [T, max(K, K')]: components c [T, K] with these, the shorter ones ending in zeros."""
        wide, narrow = (c, self.components) if c.shape[1] >= self.components.shape[1] else (self.components, c)
        total = wide.clone()
        total[:, : narrow.shape[1]] += narrow
        return total


class DecodedSpans(NamedTuple):
    """What the entropy decoder read of spans of one step, lane length and number of components.

    sizes: tokens of each span. q int [T, K] (an escape reads limit + 1), base int32 [K], levels int32 [T], gains uint8 [T] as in the encoder. escapes:
    each span's remainders. references: each span's. faults: bool scalars on the device that nobody has waited for yet; any that is true means damage.
    """

    step: float
    sizes: list[int]
    q: torch.Tensor
    base: torch.Tensor
    levels: torch.Tensor
    gains: torch.Tensor
    escapes: list[bytes]
    references: list[Sequence[Reference]]
    faults: list[torch.Tensor]

    def check(self) -> None:
        """Wait for what was enqueued so far and raise CorruptedCode if it found damage."""
        if self.faults and bool(torch.stack(self.faults).any()):
            raise CorruptedCode(*DAMAGED)


class KvCodec:
    """Codes pre-RoPE KV vectors against a prediction of them.

    Args:
        pack: weights, transform and tables.
        device: where everything runs; what is coded on one device decodes on any.
        rounding: the quantiser's rounding constant, before the choice by rate (encoder only; any value decodes).
        rate_weight: squared error in steps that a bit is worth to the encoder; 0 rounds without looking at the rate.
        projection_dtype: of the encoder's products with the transform (`Projection`).
    """

    def __init__(
        self,
        pack: CodecPack,
        device: torch.device | str = "cpu",
        rounding: float = ROUNDING,
        rate_weight: float = RATE_WEIGHT,
        projection_dtype: torch.dtype = torch.float32,
    ):
        self.pack, self.layout, self.device = pack, pack.layout, torch.device(device)
        self.rounding, self.rate_weight = rounding, rate_weight
        self.weighting, self.transform = pack.weighting.to(device), pack.transform.to(device)
        self._projection = Projection(pack.layout, self.weighting, self.transform, self.device, projection_dtype)
        self.choice, self.coder = RateChoice(pack.model, device), SpanCoder(pack.model, device)
        self._joined = self.device.type != "cpu"  # products of many spans at once, which keep a GPU busy
        self._batch_tokens = BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cpu"])
        self._counts: dict[tuple[float, bool], int] = {}  # components of each setting: a plan asks for the same ones again and again
        self._sigma = pack.transform.variance.clamp_min(1e-12).sqrt().numpy()

    def num_components(self, step: float, *, fallback: bool = False) -> int:
        """K: components kept at a step, at least one where the pack has any (a draft that predicts exactly leaves none); with a fallback basis all of
        the rows' and those of the basis that are kept, at least one."""
        if (step, fallback) not in self._counts:
            if len(self._counts) >= _MOST_COUNTS:
                self._counts.clear()
            transform = self.pack.transform
            kept = transform.kept(KEEP_FACTOR * step, fallback=fallback)
            self._counts[step, fallback] = max(transform.num_rows + 1, kept) if fallback else min(max(1, kept), transform.num_rows)
        return self._counts[step, fallback]

    def components(self, truth: torch.Tensor, prediction: torch.Tensor, count: int) -> torch.Tensor:
        """First `count` transform components, float32 [T, count], of truth - prediction, both float32 [T, D]. Raises BadInput."""
        return self._projection.components(self._projection.weighted(truth, prediction), count)

    def residuals(self, pairs: Sequence[Pair] | Residuals) -> Residuals:
        """Of spans (truth [T, D], prediction [T, D]), float32; of residuals these themselves. Raises BadInput."""
        return pairs if isinstance(pairs, Residuals) else residuals_of(pairs, self._projection, self._joined_tokens, ahead=not self._joined)

    def residuals_read(self, sizes: Sequence[int], read: Callable[[int, int], Pair]) -> Residuals:
        """Of spans of `sizes` tokens, whose truth and prediction `read` gives when they are needed (see `Residuals`)."""
        return Residuals(self._projection, sizes, read, self._joined_tokens, ahead=not self._joined)

    @property
    def _joined_tokens(self) -> int:
        if self._joined:
            return BATCH_TOKENS["cpu"]
        return 0 if self._projection.dtype == torch.float32 else _JOINED_TOKENS

    def _levels(self, levels: Sequence[torch.Tensor | None], sizes: Sequence[int]) -> torch.Tensor:
        """Step levels, int32 [sum T]."""
        for level, size in zip(levels, sizes, strict=True):
            if level is not None and level.shape != (size,):
                raise BadInput(f"step levels of shape {tuple(level.shape)} for a span of {size} tokens", "pass one integer a token")
        parts = [torch.zeros(size, dtype=torch.int32) if v is None else v.to(torch.int32) for v, size in zip(levels, sizes, strict=True)]
        joined = torch.cat([part.to(self.device) for part in parts])
        if bool(((joined < MIN_LEVEL) | (joined > MAX_LEVEL)).any()):
            raise BadInput("step levels do not fit", f"pass integers from {MIN_LEVEL} to {MAX_LEVEL}")
        return joined

    def _base(self, step: float, count: int) -> torch.Tensor:
        return upload_arrays([class_of(self._sigma[:count], step)], self.device)

    def _quantised(
        self,
        residuals: Residuals,
        members: Sequence[int],
        setting: SpanSetting,
        levels: Sequence[torch.Tensor | None],
        earlier: Sequence[Earlier | None],
    ) -> _Integers:
        step, count = setting.step, self.num_components(setting.step, fallback=setting.fallback)
        sizes = [residuals.sizes[n] for n in members]
        base, level = self._base(step, count), self._levels(levels, sizes)
        scaled = less_earlier(residuals.components(members, count), sizes, earlier)
        scaled = scaled / token_steps(step, level, len(level), self.device)
        q = quantise(scaled, self.rounding)
        gains = self.choice.choose_gains(q, base, level)
        if self.rate_weight > 0:
            q = self.choice.refine(scaled, q, base, level, gains, self.rate_weight)
        return _Integers(q, base, level, gains)

    def _checked_batches(
        self,
        residuals: Residuals,
        numbers: Sequence[int],
        levels: Sequence[torch.Tensor | None] | None,
        settings: Sequence[SpanSetting],
        earlier: Sequence[Earlier | None] | None = None,
    ) -> Iterator[tuple[list[int], SpanSetting, _Integers]]:
        """Integers of the spans `numbers`, batch by batch of one setting, with each batch's spans as places in `numbers`; the other arguments have one
        for each of `numbers`."""
        every = [None] * len(numbers) if levels is None else levels
        before: Sequence[Earlier | None] = [None] * len(numbers) if earlier is None else earlier
        sizes = [residuals.sizes[n] for n in numbers]
        for size in sizes:
            if not 0 < size <= MAX_SPAN_TOKENS:
                raise BadInput(f"a span of {size} tokens", f"code 1 to {MAX_SPAN_TOKENS} tokens a span")
        if len(settings) != len(numbers) or (self.transform.fallback is None and any(setting.fallback for setting in settings)):
            raise BadInput("settings do not fit the spans", "pass one a span, and a fallback basis only where the pack has one")
        for setting in dict.fromkeys(settings):
            alike = [n for n, own in enumerate(settings) if own == setting]
            for some in batches([sizes[n] for n in alike], self._batch_tokens):
                members = [alike[i] for i in some]
                own_levels, own_before = [every[n] for n in members], [before[n] for n in members]
                yield members, setting, self._quantised(residuals, [numbers[n] for n in members], setting, own_levels, own_before)

    def encode_many(
        self,
        pairs: Sequence[Pair] | Residuals,
        quality: str | float | Sequence[SpanSetting],
        levels: Sequence[torch.Tensor | None] | None = None,
    ) -> list[bytes]:
        """One span of bytes for each (truth [T, D], prediction [T, D]), float32.

        Args:
            pairs: spans of at most MAX_SPAN_TOKENS tokens.
            quality: a name of codec.spec.QUALITIES, a step, or each span's own setting.
            levels: for each span None or integers [T]: token t uses step * 2 ** (level / 4).
        """
        return self.encode_with_components(pairs, quality, levels)[0]

    def encode_with_components(
        self,
        pairs: Sequence[Pair] | Residuals,
        quality: str | float | Sequence[SpanSetting],
        levels: Sequence[torch.Tensor | None] | None = None,
        earlier: Sequence[Earlier | None] | None = None,
        wanted: Sequence[bool] | None = None,
    ) -> tuple[list[bytes], list[torch.Tensor | None]]:
        """As encode_many, of spans that may refer to earlier tokens; and the components float32 [T, K'] that a decoder will have of those wanted."""
        residuals = self.residuals(pairs)
        parts, components = self.quantise(residuals, range(len(residuals)), quality, levels, earlier, wanted)
        coded = self.write(parts)
        return [coded[n] for n in range(len(residuals))], components

    def quantise(
        self,
        residuals: Residuals,
        numbers: Sequence[int],
        quality: str | float | Sequence[SpanSetting],
        levels: Sequence[torch.Tensor | None] | None = None,
        earlier: Sequence[Earlier | None] | None = None,
        wanted: Sequence[bool] | None = None,
    ) -> tuple[list[QuantisedSpans], list[torch.Tensor | None]]:
        """The integers of some spans, for `write`, and the components of those wanted; arguments as for `encode_with_components`, one for each of
        `numbers`."""
        parts: list[QuantisedSpans] = []
        components: list[torch.Tensor | None] = [None] * len(numbers)
        before: Sequence[Earlier | None] = [None] * len(numbers) if earlier is None else earlier
        settings = _settings(quality, len(numbers))
        for members, setting, integers in self._checked_batches(residuals, numbers, levels, settings, before):
            sizes = [residuals.sizes[numbers[n]] for n in members]
            references = [() if (own := before[n]) is None else own.references for n in members]
            parts.append(QuantisedSpans([numbers[n] for n in members], sizes, setting, integers, references))
            if wanted is None or not any(wanted[n] for n in members):
                continue
            c = self.choice.reconstruct(integers.q, integers.classes())
            c *= token_steps(setting.step, integers.levels, len(c), self.device)
            for n, own_c in zip(members, c.split(sizes), strict=True):
                if wanted[n]:
                    components[n] = own_c.clone() if (own := before[n]) is None else own.added_to(own_c)
        return parts, components

    def write(self, parts: Sequence[QuantisedSpans]) -> dict[int, bytes]:
        """Bytes of all spans, by number. Spans of one setting share the entropy coder's passes, of which each takes as long for few tokens as for many
        on a CPU."""
        coded: dict[int, bytes] = {}
        for setting in dict.fromkeys(part.setting for part in parts):
            alike = [part for part in parts if part.setting == setting]
            for some in batches([sum(part.sizes) for part in alike], self._batch_tokens):
                own = [alike[n] for n in some]
                base = own[0].integers.base
                q, levels, gains = (torch.cat([getattr(part.integers, name) for part in own]) for name in ("q", "levels", "gains"))
                integers = _Integers(q, base, levels, gains)
                sizes = [size for part in own for size in part.sizes]
                references = [references for part in own for references in part.references]
                numbers = [number for part in own for number in part.numbers]
                coded |= zip(numbers, self._write(integers, sizes, setting.step, references), strict=True)
        return coded

    def requantised(
        self,
        pairs: Sequence[Pair] | Residuals,
        quality: str | float | Sequence[SpanSetting],
        levels: Sequence[torch.Tensor | None] | None = None,
    ) -> list[torch.Tensor]:
        """What decode_many gives for the spans that encode_many would write, without the bytes; arguments as there."""
        residuals = self.residuals(pairs)
        decoded = [torch.empty(0)] * len(residuals)
        for members, setting, integers in self._checked_batches(
            residuals, range(len(residuals)), levels, _settings(quality, len(residuals))
        ):
            q = integers.q
            c = self.choice.reconstruct(q, integers.classes()) * token_steps(setting.step, integers.levels, len(q), self.device)
            for n, part in zip(members, self._residuals(c, [residuals.sizes[n] for n in members]), strict=True):
                decoded[n] = part + residuals.pair(n)[1].to(self.device, torch.float32)
        return decoded

    def _write(self, integers: _Integers, sizes: list[int], step: float, references: Sequence[Sequence[Reference]]) -> list[bytes]:
        per_lane, q = tokens_per_lane(step), integers.q
        streams = self.coder.encode(q, integers.base, integers.levels, integers.gains, sizes, per_lane)
        over = q.abs() - self.choice.limit[integers.classes()] - 1
        row, column = (over >= 0).nonzero(as_tuple=True)
        numbers = torch.cat((row, over[row, column].long() * 2 + (q[row, column] < 0), integers.levels.long()))
        rows, remainder, own_levels = np.split(numbers.cpu().numpy(), (len(row), 2 * len(row)))  # one copy, as a GPU is waited for
        levels, ends = own_levels.astype(np.int8), np.cumsum([0, *sizes])
        bounds = np.searchsorted(rows, ends)
        spans = []
        for n, stream in enumerate(streams):
            own = levels[ends[n] : ends[n + 1]]
            escapes = write_varints(remainder[bounds[n] : bounds[n + 1]])
            stored = own if own.any() else None
            states, words = stream.states, stream.words
            code = SpanCode(step, per_lane, sizes[n], q.shape[1], self.pack.tag, states, words, stored, escapes, references[n])
            spans.append(write_span(code))
        return spans

    def encode(self, truth: torch.Tensor, prediction: torch.Tensor, quality: str | float, levels: torch.Tensor | None = None) -> bytes:
        """encode_many of one span."""
        return self.encode_many([(truth, prediction)], quality, [levels])[0]

    def read(self, spans: Sequence[bytes | memoryview]) -> list[SpanCode]:
        """The spans' parts, every checksum compared. Named errors as in codec.container, and PackMismatch."""
        codes = [read_span(s) for s in spans]
        kinds = (False,) if self.transform.fallback is None else (False, True)
        counts = {step: {self.num_components(step, fallback=kind) for kind in kinds} for step in {code.step for code in codes}}
        for code in codes:
            if code.pack_tag != self.pack.tag:
                raise PackMismatch("a coded span was written with another codec pack", "use the pack it was written with")
            if code.num_components not in counts[code.step]:
                raise CorruptedCode("a coded span's component count is not its step's", "restore the file from a copy")
        return codes

    def entropy_decoded(self, codes: Sequence[SpanCode]) -> DecodedSpans:
        """Decode spans of one step, lane length and number of components, all at once; on a GPU nothing is waited for, `DecodedSpans.check`
        does. Raises CorruptedCode."""
        step, base = codes[0].step, self._base(codes[0].step, codes[0].num_components)
        stored = [np.zeros(c.num_tokens, np.int8) if c.levels is None else c.levels for c in codes]
        levels = upload_arrays([np.concatenate(stored).astype(np.int32)], self.device)
        streams = [SpanStream(c.num_tokens, c.states, c.words) for c in codes]
        q, gains, intact = self.coder.decode(streams, base, levels, codes[0].tokens_per_lane)
        faults = [] if intact is None else [~intact.all()]
        return DecodedSpans(
            step, [c.num_tokens for c in codes], q, base, levels, gains, [c.escapes for c in codes], [c.references for c in codes], faults
        )

    def components_of(self, decoded: DecodedSpans, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Components, float32 [T, K], of spans [first, last) of those decoded, without what they refer to. Raises CorruptedCode when their escapes do
        not fit."""
        ends = np.cumsum([0, *decoded.sizes])
        if self.device.type == "cpu" and decoded.q.dtype == torch.int16 and compiled_available() and compiled_loads():
            return self._components_compiled(decoded, ends, first, len(decoded.sizes) if last is None else last)
        last = len(decoded.sizes) if last is None else last
        tokens = slice(int(ends[first]), int(ends[last]))
        levels, q = decoded.levels[tokens], decoded.q[tokens].to(torch.int32)
        classes = final_classes(decoded.base, levels, decoded.gains[tokens])
        escapes = decoded.escapes[first:last]
        limit = self.choice.limit[classes]
        if any(escapes) or self.device.type == "cpu":
            self._fill_escapes(q, limit, ends[first : last + 1] - ends[first], escapes)
        else:  # finding them would wait for the device: that there are none is checked with the rest
            decoded.faults.append((q > limit).any())
        return self.choice.reconstruct(q, classes) * token_steps(decoded.step, levels, len(levels), self.device)

    def write_components(
        self, decoded: DecodedSpans, first: int, last: int, rows: Sequence[int], columns: torch.Tensor, out: torch.Tensor
    ) -> None:
        """The same written to `out` [R, W] of any float dtype: each span's tokens from its row of `rows` on, each component in its column, columns
        int64 [K or more]. Nothing is waited for: `DecodedSpans.check` tells of damage. Raises CorruptedCode where the escapes are malformed."""
        ends = np.cumsum([0, *decoded.sizes])
        tokens = slice(int(ends[first]), int(ends[last]))
        values, counts = read_varint_lists(decoded.escapes[first:last])
        own = ends[first : last + 1] - ends[first]
        sizes = np.diff(own)
        places = np.repeat(np.asarray(rows) - own[:-1], sizes) + np.arange(own[-1])
        bounds = upload_arrays([own, np.cumsum([0, *counts]), places, values], self.device).split(
            [len(own), len(own), len(places), len(values)]
        )
        levels = decoded.levels[tokens]
        decoded.faults.append(
            reconstruct(
                decoded.q[tokens],
                decoded.base,
                -CLASSES_PER_LEVEL * levels,
                decoded.gains[tokens],
                token_steps(decoded.step, levels, len(levels), self.device)[:, 0],
                self.choice.points,
                Escapes(bounds[3], bounds[0], bounds[1]),
                bounds[2],
                columns[: decoded.q.shape[1]],
                out,
            )
        )

    def _components_compiled(self, decoded: DecodedSpans, ends: np.ndarray, first: int, last: int) -> torch.Tensor:
        """`components_of` by compiled code; the bits are the same."""
        from kernels.cpu_decode.coded import components

        tokens = slice(int(ends[first]), int(ends[last]))
        q, levels, data = decoded.q[tokens], decoded.levels[tokens], decoded.escapes[first:last]
        own, steps = classes_before_gain(decoded.base, levels), token_steps(decoded.step, levels, len(levels))[:, 0]
        # an escape's remainder takes a byte or more
        out, places, found = components(
            self.choice.component_tables, q.numpy(), own.numpy(), decoded.gains[tokens].numpy(), steps.numpy(), sum(map(len, data))
        )
        c = torch.from_numpy(out)
        if found > len(places):
            raise CorruptedCode("a coded span's escapes do not fit its integers", "restore the file from a copy")
        row, column = (torch.from_numpy(part) for part in divmod(places, max(1, q.shape[1])))
        escaped = self._escaped(q[row, column].to(torch.int32), row, ends[first : last + 1] - ends[first], data)
        classes = final_classes(decoded.base, levels[row], decoded.gains[tokens][row]).gather(1, column[:, None])[:, 0]
        c[row, column] = self.choice.reconstruct(escaped, classes) * steps[row]
        return c

    def _fill_escapes(self, q: torch.Tensor, limit: torch.Tensor, ends: np.ndarray, escapes: Sequence[bytes]) -> None:
        """Put the escaped integers into q [T, K], limit [T, K]; ends [spans + 1]. Raises CorruptedCode."""
        row, column = (q > limit).nonzero(as_tuple=True)
        q[row, column] = self._escaped(limit[row, column] + 1, row, ends, escapes)

    def _escaped(self, least: torch.Tensor, row: torch.Tensor, ends: np.ndarray, escapes: Sequence[bytes]) -> torch.Tensor:
        """The escaped integers, int32 [n], of tokens row int64 [n] in rising order, whose sizes are `least` int32 [n] or more. Raises CorruptedCode."""
        bounds = np.searchsorted(row.cpu().numpy(), ends)
        parts = [read_varints(data, int(count)) for data, count in zip(escapes, np.diff(bounds), strict=True)]
        remainder = torch.from_numpy(np.concatenate(parts)).to(self.device)
        magnitude = least + (remainder >> 1)
        if len(remainder) and int(magnitude.max()) > Q_LIMIT:
            raise CorruptedCode("a coded integer is out of range", "restore the file from a copy")
        return torch.where(remainder % 2 == 1, -magnitude, magnitude).to(torch.int32)

    def _residual(self, c: torch.Tensor) -> torch.Tensor:
        """Unweighted residual, float32 [T, D], of components [T, K]."""
        return self.weighting.unwhiten(self.transform.expand(c, self.layout.dim))

    def _residuals(self, c: torch.Tensor, sizes: list[int]) -> Sequence[torch.Tensor]:
        """The spans' residuals, float32 [T, D] each, from the components of all of them."""
        if not self._joined:
            return [self._residual(part) for part in c.split(sizes)]
        out = c.new_empty(len(c), self.layout.dim)
        for at in range(0, len(c), PRODUCT_ROWS):
            block = c[at : at + PRODUCT_ROWS]
            missing = PRODUCT_ROWS - len(block)
            padded = torch.nn.functional.pad(block, (0, 0, 0, missing)) if missing else block
            out[at : at + len(block)] = self._residual(padded)[: len(block)]
        return out.split(sizes)

    def decode_many(self, spans: Sequence[bytes], predictions: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """KV float32 [T, D] of every span, given the predictions that the encoder used (up to rounding)."""
        if len(spans) != len(predictions):
            raise BadInput(f"{len(spans)} spans and {len(predictions)} predictions", "pass one prediction a span")
        codes = self.read(spans)
        if any(code.references for code in codes):
            raise BadInput("a span that refers to earlier tokens", "decode it together with them (codec.pages)")
        for code, prediction in zip(codes, predictions, strict=True):
            if prediction.shape != (code.num_tokens, self.layout.dim):
                what = f"a prediction of shape {tuple(prediction.shape)} for a span of {code.num_tokens} tokens"
                raise BadInput(what, "predict the tokens that were coded")
        decoded = list(predictions)
        for chosen in alike(codes):
            for some in batches([codes[n].num_tokens for n in chosen], self._batch_tokens):
                members = [chosen[i] for i in some]
                part = self.entropy_decoded([codes[n] for n in members])
                part.check()
                for n, residual in zip(members, self._residuals(self.components_of(part), part.sizes), strict=True):
                    decoded[n] = residual.add_(predictions[n].to(self.device, torch.float32))
        return decoded

    def decode(self, span: bytes, prediction: torch.Tensor) -> torch.Tensor:
        """decode_many of one span."""
        return self.decode_many([span], [prediction])[0]

    def ideal_bits(
        self,
        pairs: Sequence[Pair] | Residuals,
        quality: str | float | Sequence[SpanSetting],
        levels: Sequence[torch.Tensor | None] | None = None,
    ) -> float:
        """Code length, in bits, of the symbols that encode_many would write for these spans, under the pack's unrounded tables."""
        total, residuals = 0.0, self.residuals(pairs)
        settings = _settings(quality, len(residuals))
        for _, _, integers in self._checked_batches(residuals, range(len(residuals)), levels, settings):
            total += float(self.choice.code_lengths(integers.q, integers.classes(), integers.gains).sum())
        return total


def less_earlier(c: torch.Tensor, sizes: Sequence[int], earlier: Sequence[Earlier | None]) -> torch.Tensor:
    """Components float32 [T, K] of spans of `sizes` tokens, less those that they are coded against. Written into c."""
    for own, part in zip(earlier, c.split(list(sizes)), strict=True):
        if own is not None:
            width = min(part.shape[1], own.components.shape[1])
            part[:, :width] -= own.components[:, :width]
    return c


def alike(codes: Sequence[SpanCode]) -> list[list[int]]:
    """Numbers of the spans that can be entropy-decoded together: those of one step, lane length and number of components."""
    groups: dict[tuple[float, int, int], list[int]] = {}
    for n, code in enumerate(codes):
        groups.setdefault((code.step, code.tokens_per_lane, code.num_components), []).append(n)
    return list(groups.values())


def _settings(quality: str | float | Sequence[SpanSetting], count: int) -> Sequence[SpanSetting]:
    """One setting a span."""
    if isinstance(quality, (str, float, int)):
        return [SpanSetting(step_of(quality) if isinstance(quality, str) else float(quality))] * count
    return quality


def batches(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices in order, grouped so that a group has at most `limit` tokens (or is a single span)."""
    groups: list[list[int]] = []
    room = 0
    for n, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(n)
        room -= size
    return groups
