"""Choosing how each span is coded so that a quality keeps its word: the encoder has the truth, so it measures each span's weighted distortion at a
setting, and takes the coarsest one whose expected divergence (`codec.divergence`) is the quality's.

Text like that of the calibration meets the usual step. Other text needs a finer one, or the fallback basis for what the transform's rows do not carry:
it costs bits, and not quality.

Axes: S spans, T tokens of all spans, K components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from codec.codec import Earlier, KvCodec, SpanSetting, batches, less_earlier
from codec.divergence import DivergenceCurve
from codec.quantize import LEVELS_PER_OCTAVE, MAX_LEVEL, MIN_LEVEL, quantise
from codec.spec import QUALITY_DIVERGENCE, step_of
from codec.weighting import apply_blocks

FINEST, COARSEST = -4 * LEVELS_PER_OCTAVE, 6
"""Rungs: a step is 2 ** (rung / LEVELS_PER_OCTAVE), of the same ladder for every quality."""

_MEASURED_TOKENS = {"cpu": 256, "cuda": 4096}


def token_importance(octaves: torch.Tensor | None) -> torch.Tensor | None:
    """Factors of the tokens' squared errors, float32 [T], from how many octaves their steps lie above the usual one: equal marginal returns put a step
    at importance ** -1/2."""
    return None if octaves is None else torch.exp2(-2 * octaves)


class SpanPlan(NamedTuple):
    """Of every span: its setting, its tokens' step levels int32 [T], and its expected divergence in nats a position."""

    settings: list[SpanSetting]
    levels: list[torch.Tensor]
    divergence: list[float]


class Distortion:
    """The weighted distortion of some spans at any setting.

    Args:
        pairs: (truth [T, D], prediction [T, D]) of each span.
        levels: each span's step levels, integers [T], or None.
        importance: each span's factors of its tokens' errors, float32 [T], or None for ones.
        earlier: what each span is coded against, or None.
    """

    def __init__(
        self,
        codec: KvCodec,
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
        levels: Sequence[torch.Tensor | None],
        importance: Sequence[torch.Tensor | None],
        earlier: Sequence[Earlier | None] | None = None,
    ) -> None:
        self.codec, device = codec, codec.device
        self.sizes = torch.tensor([len(truth) for truth, _ in pairs], device=device)
        self._span = torch.repeat_interleave(torch.arange(len(pairs), device=device), self.sizes)
        zeros = torch.zeros(len(self._span), dtype=torch.float32, device=device)
        parts = list(zip(zeros.split(self.sizes.tolist()), levels, importance, strict=True))
        self.levels = torch.cat([(z if own is None else own.to(device)).to(torch.int32) for z, own, _ in parts])
        self._importance = torch.cat([(z + 1) if own is None else own.to(device, torch.float32) for z, _, own in parts])
        self._given = levels, importance
        self._pairs, self._earlier = pairs, [None] * len(pairs) if earlier is None else earlier
        self._rows: list[torch.Tensor | None] = [None] * len(pairs)  # components along the transform's rows, once they are known
        self._components: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}

    def of_spans(self, numbers: Sequence[int]) -> Distortion:
        """That of some of the spans, with what is known of their components."""
        levels, importance = self._given
        pairs, earlier = [self._pairs[n] for n in numbers], [self._earlier[n] for n in numbers]
        some = Distortion(self.codec, pairs, [levels[n] for n in numbers], [importance[n] for n in numbers], earlier)
        some._rows = [self._rows[n] for n in numbers]
        return some

    def _of(self, fallback: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Components [T, K], less those of earlier tokens, and the energy [T, K + 1] of all that is no component, and of components k and later."""
        if fallback not in self._components:
            transform = self.codec.transform
            count = transform.num_components if fallback else transform.num_rows
            own = [self.codec.components(*pair, count, rows) for pair, rows in zip(self._pairs, self._rows, strict=True)]
            if not fallback:
                self._rows = list(own)
            c = torch.cat(own)
            device, root = self.codec.device, self.codec.weighting.sensitivity_sqrt
            energy = [apply_blocks((t.to(device) - p.to(device)).float(), root).pow(2).sum(1) for t, p in self._pairs]
            outside = (torch.cat(energy) - c.pow(2).sum(1)).clamp_min_(0)
            c = less_earlier(c, self.sizes.tolist(), self._earlier)
            rest = torch.cat([c.pow(2), outside[:, None]], 1).flip(1).cumsum(1).flip(1)
            self._components[fallback] = c, rest
        return self._components[fallback]

    def measure(
        self, steps: torch.Tensor, offsets: torch.Tensor, counts: torch.Tensor, fallback: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Distortion, float32 [S], and a measure of the bits [S] (for comparing settings only).

        Args:
            steps: float32 [S]. offsets: int32 [S], added to the tokens' levels. counts: int64 [S], components that are kept.
        """
        every, rest = self._of(fallback)
        most = int(counts.max())  # what no span keeps is lost as it is
        c = every[:, :most]
        levels = (self.levels + offsets[self._span]).clamp_(MIN_LEVEL, MAX_LEVEL)
        own = (steps[self._span] * torch.exp2(levels.float() / LEVELS_PER_OCTAVE))[:, None]
        x = c / own
        kept = torch.arange(c.shape[1], device=c.device)[None] < counts[self._span, None]
        q = torch.where(kept, quantise(x), 0).float()
        error = ((x - q) * own).pow_(2).sum(1).add_(rest[:, most]).mul_(self._importance)
        size = q.abs()
        bits = torch.where(size > 0, 4 + 2 * torch.log2(size.clamp_min(1)), 0).sum(1)
        zeros = torch.zeros(len(self.sizes), dtype=torch.float32, device=c.device)
        total, cost = (zeros.index_add(0, self._span, values) for values in (error, bits))
        return total / (self.sizes * self.codec.layout.dim), cost


class _Ladder:
    """Settings in quarter octaves: the step in whole octaves, the rest in the tokens' levels, so that few settings differ."""

    def __init__(self, codec: KvCodec) -> None:
        self.codec = codec

    def step(self, rung: int) -> tuple[float, int]:
        """The step, and the offset of the tokens' levels."""
        octave = (rung + LEVELS_PER_OCTAVE // 2) // LEVELS_PER_OCTAVE
        return 2.0**octave, rung - LEVELS_PER_OCTAVE * octave

    def measure(self, distortion: Distortion, rungs: torch.Tensor, fallback: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """`Distortion.measure` with each span on its own rung, int64 [S]."""
        device = self.codec.device
        chosen = [self.step(rung) for rung in rungs.tolist()]
        counts = [self.codec.num_components(step, fallback=fallback) for step, _ in chosen]
        steps, offsets = (
            torch.tensor([s for s, _ in chosen], dtype=torch.float32, device=device),
            torch.tensor([o for _, o in chosen], dtype=torch.int32, device=device),
        )
        return distortion.measure(steps, offsets, torch.tensor(counts, device=device), fallback)

    def coarsest(self, distortion: Distortion, most: float, fallback: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each span's coarsest rung with a distortion of at most `most` (the finest where there is none), its distortion and its bits."""
        low = torch.full_like(distortion.sizes, FINEST)
        high = torch.full_like(low, COARSEST + 1)  # too coarse, as far as is known
        found = self.measure(distortion, low, fallback)
        while bool((high - low > 1).any()):
            middle = torch.where(high - low > 1, (low + high) // 2, low)
            tried = self.measure(distortion, middle, fallback)
            fine = tried[0] <= most
            better = fine & (middle > low)
            found = torch.where(better, tried[0], found[0]), torch.where(better, tried[1], found[1])
            low, high = torch.where(fine, torch.maximum(low, middle), low), torch.where(fine | (middle == low), high, middle)
        return low, *found


def plan_spans(
    codec: KvCodec,
    curve: DivergenceCurve,
    quality: str,
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    levels: Sequence[torch.Tensor | None],
    importance: Sequence[torch.Tensor | None],
    earlier: Sequence[Earlier | None] | None = None,
) -> SpanPlan:
    """How to code spans at a quality; arguments as for `Distortion`. Raises UnknownQuality."""
    usual = LEVELS_PER_OCTAVE * math.log2(step_of(quality))
    ladder, most = _Ladder(codec), curve.distortion_of(QUALITY_DIVERGENCE[quality])
    plan = SpanPlan([], [], [])
    before: Sequence[Earlier | None] = [None] * len(pairs) if earlier is None else earlier
    for some in batches([len(truth) for truth, _ in pairs], _MEASURED_TOKENS.get(codec.device.type, _MEASURED_TOKENS["cpu"])):
        own_importance, own_before = [importance[n] for n in some], [before[n] for n in some]
        distortion = Distortion(codec, [pairs[n] for n in some], [levels[n] for n in some], own_importance, own_before)
        rungs, found, bits = ladder.coarsest(distortion, most, fallback=False)
        fallback = torch.zeros_like(rungs, dtype=torch.bool)
        asking = ((rungs < usual) | (found > most)).nonzero()[:, 0]
        if codec.transform.fallback is not None and len(asking):
            other, finer, cost = ladder.coarsest(distortion.of_spans(asking.tolist()), most, fallback=True)
            # a span that no step of the rows alone brings down needs the basis; where both do, the shorter code is taken
            had, least = found[asking], rungs[asking]
            chosen = ((had > most) & (finer < had)) | ((finer <= most) & (cost < bits[asking]) & (least < usual))
            fallback[asking] = chosen
            rungs[asking], found[asking] = torch.where(chosen, other, least), torch.where(chosen, finer, had)
        for rung, use, own, measured in zip(
            rungs.tolist(), fallback.tolist(), distortion.levels.split(distortion.sizes.tolist()), found.tolist(), strict=True
        ):
            step, offset = ladder.step(rung)
            plan.settings.append(SpanSetting(step, use))
            plan.levels.append((own + offset).clamp_(MIN_LEVEL, MAX_LEVEL))
            plan.divergence.append(curve.divergence_of(measured))
    return plan
