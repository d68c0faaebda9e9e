"""Spans of a run of tokens, from the features of its tokens to bytes and back: prediction, plan, codec and decoder of one pack.

Axes: T tokens, D elements of a token that are coded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from codec.codec import Earlier, KvCodec, QuantisedSpans, SpanSetting
from codec.divergence import DivergenceCurve
from codec.fidelity import plan_spans, token_importance
from codec.pack import CodecPack
from codec.pages import PageDecoder
from codec.predictor.dense import load_predictor
from codec.quantize import levels_of
from codec.spec import divergence_of

Inputs = tuple[torch.Tensor, torch.Tensor | None]
"""What `Predictor.predict` takes of some tokens."""


def curve_in(curve: DivergenceCurve | None, dtype: torch.dtype) -> DivergenceCurve | None:
    """A pack's curve for a model of a dtype: what rounding adds is known of bfloat16, and 2 ** -6 of it or less in others."""
    return curve if curve is None or dtype == torch.bfloat16 else curve.exact()


class SpanCodec:
    """One pack's codec, predictor and decoder.

    Args:
        dtype: of the decoder's product and of the encoder's.
        model_dtype: of the model whose KV is coded (None: dtype).

    curve: the pack's, for a model of that dtype; None where the pack states none.

    Raises:
        PredictorError: the pack holds no predictor.
    """

    def __init__(self, pack: CodecPack, device: torch.device | str, dtype: torch.dtype, model_dtype: torch.dtype | None = None) -> None:
        self.pack, self._device, self._dtype = pack, torch.device(device), dtype
        self.curve = curve_in(pack.curve, model_dtype or dtype)
        self.predictor = load_predictor(pack.predictor, pack.predictor_settings, self._device)
        self._matrix = self.predictor.matrix.to(dtype) if dtype != torch.float32 else None

    @cached_property
    def codec(self) -> KvCodec:
        """Made when something is first coded or decoded: its matrices take a third of a second to unpack on a CPU, and short sessions need none."""
        return KvCodec(self.pack, self._device, projection_dtype=self._dtype)

    @cached_property
    def pages(self) -> PageDecoder:
        """Made when something is first coded or decoded."""
        return PageDecoder(self.codec, self.predictor, self._dtype)

    def predict(self, latents: torch.Tensor, target_rows: torch.Tensor | None) -> torch.Tensor:
        """KV vectors float32 [T, D] before their residuals are coded."""
        if self._matrix is None:
            return self.predictor.predict(latents, target_rows)
        inputs = self.predictor.inputs(latents, target_rows).to(self._matrix.dtype)
        return (inputs @ self._matrix).float().add_(self.predictor.mu)


class SpanEncoder:
    """Codes spans that follow one another; their keys and values are read when they are needed.

    Args:
        inputs: of all tokens of the spans.
        sizes: tokens of each span.
        read: KV rows float32 [n, D] of tokens [a, b), counted from the first span's first.
        unseen: called with rows [n, D], their prediction and their first token: lets rows that nobody will read be as predicted.

    divergence: of spans that were planned, by number: expected, in nats a position.
    """

    def __init__(
        self,
        spans: SpanCodec,
        inputs: Inputs,
        sizes: Sequence[int],
        read: Callable[[int, int], torch.Tensor],
        unseen: Callable[[torch.Tensor, torch.Tensor, int], None] | None = None,
    ) -> None:
        self.spans, self.divergence = spans, dict[int, float]()
        self._parts: list[QuantisedSpans] = []
        latents, target_rows = inputs
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + size)

        def pair(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
            a, b = starts[first], starts[last]
            rows = read(a, b)
            predicted = spans.predict(latents[a:b], None if target_rows is None else target_rows[a:b])
            if unseen is not None:
                unseen(rows, predicted, a)
            return rows, predicted

        self.residuals = spans.codec.residuals_read(sizes, pair)
        octaves = spans.predictor.log2_step(latents, target_rows)
        importance, none = token_importance(octaves), [None] * len(sizes)
        self._levels: Sequence[torch.Tensor | None] = none if octaves is None else levels_of(octaves).split(list(sizes))
        self._importance: Sequence[torch.Tensor | None] = none if importance is None else importance.split(list(sizes))

    def quantise(
        self,
        quality: str | float,
        numbers: Sequence[int] | None = None,
        earlier: Sequence[Earlier | None] | None = None,
        wanted: Sequence[bool] | None = None,
        mark: Callable[[str], None] = lambda stage: None,
    ) -> list[torch.Tensor | None]:
        """Quantise the spans `numbers` (None: all), for `write`. Returns the components that a decoder will have of those wanted.

        Args:
            quality: a name or "klX", whose promised divergence is kept where the pack states its curve (`codec.fidelity`), else a fixed step; or a
                step.
            earlier, wanted: as for `KvCodec.encode_with_components`, one for each of `numbers`.
            mark: told when a stage ends.

        Raises BadInput where the KV is not finite, UnknownQuality.
        """
        numbers = range(len(self.residuals)) if numbers is None else numbers
        levels: Sequence[torch.Tensor | None] = [self._levels[n] for n in numbers]
        settings: str | float | Sequence[SpanSetting] = quality
        codec, curve = self.spans.codec, self.spans.curve
        if curve is not None and divergence_of(quality) is not None:
            importance = [self._importance[n] for n in numbers]
            plan = plan_spans(codec, curve, str(quality), self.residuals, levels, importance, earlier, numbers)
            settings, levels = plan.settings, plan.levels
            self.divergence |= zip(numbers, plan.divergence, strict=True)
            mark("plan")
        parts, components = codec.quantise(self.residuals, numbers, settings, levels, earlier, wanted)
        self._parts += parts
        mark("quantise")
        return components

    def write(self) -> list[bytes]:
        """Bytes of all spans, all of which are quantised."""
        coded = self.spans.codec.write(self._parts)
        return [coded[n] for n in range(len(self.residuals))]
