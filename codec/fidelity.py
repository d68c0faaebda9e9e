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
from codec.quantize import LEVELS_PER_OCTAVE, MAX_LEVEL, MIN_LEVEL, ROUNDING
from codec.residuals import SAMPLED_EVERY, Pair, Residuals
from codec.spec import divergence_of, step_of
from kernels.quantised_sums import code_bits, saved_energy
from kernels.upload import upload

FINEST, COARSEST = -4 * LEVELS_PER_OCTAVE, 6
"""Rungs: a step is 2 ** (rung / LEVELS_PER_OCTAVE), of the same ladder for every quality."""

_MEASURED_TOKENS = {"cpu": 64, "cuda": 4096}
"""Tokens of the spans that are measured together: what a look at a setting reads and writes should stay in a core's cache, or fill a GPU."""

_SAMPLED_TOKENS = {"cpu": 1024, "cuda": 4096}
"""Tokens of the spans whose samples are projected on the fallback basis together."""


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
        residuals: of spans, or (truth [T, D], prediction [T, D]) of each.
        levels: each span's step levels, integers [T], or None.
        importance: each span's factors of its tokens' errors, float32 [T], or None for ones.
        earlier: what each span is coded against, or None.
        numbers: which of the spans (None: all); the lists above have one for each of these.
        sampled: look only at every SAMPLED_EVERY-th token of each span.
    """

    def __init__(
        self,
        codec: KvCodec,
        residuals: Residuals | Sequence[Pair],
        levels: Sequence[torch.Tensor | None],
        importance: Sequence[torch.Tensor | None],
        earlier: Sequence[Earlier | None] | None = None,
        numbers: Sequence[int] | None = None,
        *,
        sampled: bool = False,
    ) -> None:
        self.codec, device = codec, codec.device
        self._residuals = codec.residuals(residuals)
        self._numbers = range(len(self._residuals)) if numbers is None else numbers
        self._every = SAMPLED_EVERY if sampled else 1
        sizes = [-(-self._residuals.sizes[n] // self._every) for n in self._numbers]
        before: list[Earlier | None] = [None] * len(sizes) if earlier is None else list(earlier)
        self._given = list(levels), list(importance), before
        self.sizes = upload(sizes, device)
        # told how many they are, a GPU is not asked for it
        self._span = torch.repeat_interleave(torch.arange(len(sizes), device=device), self.sizes, output_size=sum(sizes))
        zeros, ones = (torch.full((len(self._span),), value, dtype=torch.float32, device=device) for value in (0, 1))
        parts = [
            torch.cat(
                [z if own is None else self._taken(own.to(device)).to(z.dtype) for own, z in zip(given, like.split(sizes), strict=True)]
            )
            for given, like in zip(self._given[:2], (zeros, ones), strict=True)
        ]
        self.levels, self._importance = parts[0].to(torch.int32), parts[1]
        self._components: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}

    def _taken(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:: self._every]

    def of_spans(self, places: Sequence[int], *, sampled: bool = False) -> Distortion:
        """That of some of the spans, by their places among these."""
        levels, importance, earlier = self._given
        return Distortion(
            self.codec,
            self._residuals,
            [levels[n] for n in places],
            [importance[n] for n in places],
            [earlier[n] for n in places],
            [self._numbers[n] for n in places],
            sampled=sampled,
        )

    def _of(self, fallback: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Sizes of the components [T, K], less those of earlier tokens, and the energy [T] of all that is lost where none is kept."""
        if fallback not in self._components:
            residuals, numbers, transform = self._residuals, self._numbers, self.codec.transform
            if self._every > 1 and fallback:
                c = residuals.sampled_components(numbers)
            else:
                c = residuals.components(numbers, transform.num_components if fallback else transform.num_rows)
                if self._every > 1:
                    c = torch.cat([self._taken(part) for part in c.split([residuals.sizes[n] for n in numbers])])
            energy = residuals.energy(numbers)
            if self._every > 1:
                energy = torch.cat([self._taken(part) for part in energy.split([residuals.sizes[n] for n in numbers])])
            # rows that are stored coarsely are not quite orthogonal: their components may hold more than the residual
            outside = (energy - c.square().sum(1)).clamp_min_(0)
            if any(own is not None for own in self._given[2]):
                before = [None if own is None else own._replace(components=self._taken(own.components)) for own in self._given[2]]
                c = less_earlier(c, self.sizes.tolist(), before)
            self._components[fallback] = c.abs_(), outside + c.square().sum(1)
        return self._components[fallback]

    def _steps(self, steps: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """The tokens' steps, float32 [T]."""
        levels = (self.levels + offsets[self._span]).clamp_(MIN_LEVEL, MAX_LEVEL)
        return steps[self._span] * torch.exp2(levels.float() / LEVELS_PER_OCTAVE)

    def measure(self, steps: torch.Tensor, offsets: torch.Tensor, counts: torch.Tensor, fallback: bool) -> torch.Tensor:
        """Distortion, float32 [S].

        Args:
            steps: float32 [S]. offsets: int32 [S], added to the tokens' levels. counts: int64 [S], components that are kept.
        """
        (sizes, energy), own = self._of(fallback), self._steps(steps, offsets)
        saved = saved_energy(sizes, 1 / own, counts[self._span], ROUNDING)  # what is not kept is lost as it is
        error = (energy - saved * own.square()).clamp_min_(0).mul_(self._importance)
        return self._total(error) / (self.sizes * self.codec.layout.dim)

    def bits(self, steps: torch.Tensor, offsets: torch.Tensor, counts: torch.Tensor, fallback: bool) -> torch.Tensor:
        """A measure of the bits of each span, float32 [S], for comparing settings only; arguments as for `measure`."""
        return self._total(code_bits(self._of(fallback)[0], 1 / self._steps(steps, offsets), counts[self._span], ROUNDING))

    def _total(self, values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(self.sizes), dtype=torch.float32, device=values.device).index_add_(0, self._span, values)


class _Ladder:
    """Settings in quarter octaves: the step in whole octaves, the rest in the tokens' levels, so that few settings differ."""

    def __init__(self, codec: KvCodec) -> None:
        self.codec, device = codec, codec.device
        chosen = [self.step(rung) for rung in range(FINEST, COARSEST + 1)]
        self._waits = device.type == "cpu"  # whose results cost nothing to look at
        self._steps = upload([step for step, _ in chosen], device, torch.float32)
        self._offsets = upload([offset for _, offset in chosen], device, torch.int32)
        self._counts = {
            fallback: upload([codec.num_components(step, fallback=fallback) for step, _ in chosen], device)
            for fallback in ((False,) if codec.transform.fallback is None else (False, True))
        }

    def step(self, rung: int) -> tuple[float, int]:
        """The step, and the offset of the tokens' levels."""
        octave = (rung + LEVELS_PER_OCTAVE // 2) // LEVELS_PER_OCTAVE
        return 2.0**octave, rung - LEVELS_PER_OCTAVE * octave

    def _settings(self, rungs: torch.Tensor, fallback: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
        """What `Distortion.measure` takes, with each span on its own rung, int64 [S]."""
        at = rungs - FINEST
        return self._steps[at], self._offsets[at], self._counts[fallback][at], fallback

    def measure(self, distortion: Distortion, rungs: torch.Tensor, fallback: bool) -> torch.Tensor:
        """`Distortion.measure`, float32 [S], with each span on its own rung, int64 [S]."""
        return distortion.measure(*self._settings(rungs, fallback))

    def bits(self, distortion: Distortion, rungs: torch.Tensor, fallback: bool) -> torch.Tensor:
        """`Distortion.bits`, float32 [S], likewise."""
        return distortion.bits(*self._settings(rungs, fallback))

    def coarsest(
        self, distortion: Distortion, most: float | torch.Tensor, fallback: bool, fine: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each span's coarsest rung with a distortion of at most `most` (one for all spans, or float32 [S]; the finest where there is none), and its
        distortion. fine: rungs int64 [S] that are known to be fine enough, of which none finer is looked at."""
        low = torch.full_like(distortion.sizes, FINEST) if fine is None else fine.clone()
        high = torch.full_like(low, COARSEST + 1)  # too coarse, as far as is known
        found = torch.full(low.shape, -1.0, dtype=torch.float32, device=low.device)
        for _ in range((COARSEST - FINEST).bit_length()):
            if self._waits and not bool((high - low > 1).any()):
                break
            middle = torch.where(high - low > 1, (low + high) // 2, low)
            tried = self.measure(distortion, middle, fallback)
            enough = tried <= most
            found = torch.where(enough & (middle > low), tried, found)
            low, high = torch.where(enough, torch.maximum(low, middle), low), torch.where(enough | (middle == low), high, middle)
        known = self._waits and not bool((found < 0).any())
        return low, found if known else torch.where(found < 0, self.measure(distortion, low, fallback), found)


def plan_spans(
    codec: KvCodec,
    curve: DivergenceCurve,
    quality: str,
    residuals: Residuals | Sequence[Pair],
    levels: Sequence[torch.Tensor | None],
    importance: Sequence[torch.Tensor | None],
    earlier: Sequence[Earlier | None] | None = None,
    numbers: Sequence[int] | None = None,
) -> SpanPlan:
    """How to code spans at a quality, a name or "klX"; other arguments as for `Distortion`. Raises UnknownQuality."""
    usual = LEVELS_PER_OCTAVE * math.log2(step_of(quality))
    promise = divergence_of(quality)
    assert promise is not None, "every quality that has a step promises a divergence"
    ladder, most = _Ladder(codec), curve.distortion_of(promise)
    plan, residuals = SpanPlan([], [], []), codec.residuals(residuals)
    numbers = range(len(residuals)) if numbers is None else numbers
    before: Sequence[Earlier | None] = [None] * len(numbers) if earlier is None else earlier
    sizes = [residuals.sizes[n] for n in numbers]
    whole = Distortion(codec, residuals, levels, importance, before, numbers)
    rungs = torch.empty(len(numbers), dtype=torch.int64, device=codec.device)
    found = torch.empty(len(numbers), dtype=torch.float32, device=codec.device)
    fallback = torch.zeros_like(rungs, dtype=torch.bool)
    for some in batches(sizes, _MEASURED_TOKENS.get(codec.device.type, _MEASURED_TOKENS["cpu"])):
        part = slice(some[0], some[-1] + 1)
        rungs[part], found[part] = ladder.coarsest(whole.of_spans(some), most, fallback=False)
    if codec.transform.fallback is not None:
        asking = _asking_for_fallback(ladder, whole, sizes, most, usual, rungs, found)
        for places in batches([sizes[n] for n in asking], _MEASURED_TOKENS.get(codec.device.type, _MEASURED_TOKENS["cpu"])):
            some = [asking[n] for n in places]
            at = upload(some, codec.device)
            _try_fallback(ladder, whole.of_spans(some), most, usual, at, rungs, found, fallback)
            for n, rung, use in zip(some, *torch.stack((rungs[at], fallback[at].to(rungs.dtype))).tolist(), strict=True):
                residuals.keep(numbers[n], codec.num_components(ladder.step(rung)[0], fallback=bool(use)))
    own_levels = whole.levels.split(sizes)
    chosen = torch.stack((rungs.double(), fallback.double(), found.double())).tolist()  # looked at once
    for rung, use, measured, own in zip(*chosen, own_levels, strict=True):
        step, offset = ladder.step(int(rung))
        plan.settings.append(SpanSetting(step, bool(use)))
        plan.levels.append((own + offset).clamp_(MIN_LEVEL, MAX_LEVEL))
        plan.divergence.append(curve.divergence_of(measured))
    return plan


def _asking_for_fallback(
    ladder: _Ladder, whole: Distortion, sizes: Sequence[int], most: float, usual: float, rungs: torch.Tensor, found: torch.Tensor
) -> list[int]:
    """Places of the spans, of `sizes` tokens, that the fallback basis may serve better, given the rungs int64 and distortions float32 [S]
    along the rows alone.

    A span that no step of the rows alone brings down to `most` needs the basis. Of those at a finer step than the usual one it may serve a span where a
    sample of its tokens promises a shorter code.
    """
    unmet, fine = torch.stack((found > most, rungs < usual)).tolist()
    asking = [n for n, own in enumerate(unmet) if own]
    finer = [n for n, own in enumerate(fine) if own and not unmet[n]]
    for places in batches([sizes[n] for n in finer], _SAMPLED_TOKENS.get(rungs.device.type, _SAMPLED_TOKENS["cpu"])):
        some = [finer[n] for n in places]
        at = upload(some, rungs.device)
        sample, own = whole.of_spans(some, sampled=True), rungs[at]
        had = ladder.measure(sample, own, fallback=False)
        # the sample's tokens are more or less distorted than all: held to the same distance from the promise as they are
        allowed = torch.maximum(most * had / found[at].clamp_min(1e-30), had)
        other, _ = ladder.coarsest(sample, allowed, fallback=True, fine=own)
        shorter = ladder.bits(sample, other, fallback=True) < ladder.bits(sample, own, fallback=False)
        asking += [n for n, pays in zip(some, shorter.tolist(), strict=True) if pays]
    return sorted(asking)


def _try_fallback(
    ladder: _Ladder,
    some: Distortion,
    most: float,
    usual: float,
    places: torch.Tensor,
    rungs: torch.Tensor,
    found: torch.Tensor,
    fallback: torch.Tensor,
) -> None:
    """Measure some spans in the fallback basis, and write rungs, found and fallback bool [S] at their places where it serves them better: where the
    rows alone miss the promise by more, or where both keep it and the code is shorter."""
    least, had = rungs[places], found[places]
    other, finer = ladder.coarsest(some, most, fallback=True)
    shorter = ladder.bits(some, other, fallback=True) < ladder.bits(some, least, fallback=False)
    chosen = ((had > most) & (finer < had)) | ((finer <= most) & shorter & (least < usual))
    fallback[places] = chosen
    rungs[places], found[places] = torch.where(chosen, other, least), torch.where(chosen, finer, had)
