"""Choosing a predictor by what a restore may cost: candidates within a budget, fitted from one matrix of moments, compared by bits on held-out tokens.

Axes: n held-out tokens, F features of a set, D KV elements (of the coded layers), r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codec.predictor.features import FeatureSpec
from codec.predictor.fit import Moments
from codec.quantize import ROUNDING, quantise
from codec.weighting import Weighting
from engine.calibrate.budget import DENSE_SHARE, dense_bytes
from engine.calibrate.restore_cost import PassTimes, RestoreCost, predictor_multiplies, restore_cost
from engine.errors import InvalidOption
from engine.model.config import DecoderConfig

RANKS = (2048, 1024, 512, 256, 128)
"""Of the low-rank predictors that are tried where a dense one is beyond the budget."""

DRAFT_LAYERS = (0, 1, 2, 4, 8)
_RIDGE = 0.01  # the chosen set's own is chosen later
_HELD_OUT_TOKENS = 2048


@dataclass(frozen=True)
class FeatureSet:
    """name; taps: layers of the draft (or of the target below its early exit). target_taps: the target's own states, 0 its embeddings. first_layer:
    the target's layers below it are recomputed, exact and not coded."""

    name: str
    taps: tuple[int, ...]
    target_taps: tuple[int, ...]
    first_layer: int

    @property
    def spec(self) -> FeatureSpec:
        """As a predictor takes it."""
        return FeatureSpec(self.taps, self.target_taps)


class Whole:
    """Moments of all features and layers, and held-out rows: a set's are parts of them.

    Args:
        taps, target_taps: what the columns of the features are, in this order; sizes E and E_t.
        moments: of all tokens.
        features, y: held-out raw features [n, F] and KV [n, D].
        weighting: of all layers, so that a step means the same for every set.
        layer_dim: KV elements of a layer.
        first_layer: of y.
    """

    def __init__(
        self,
        taps: tuple[int, ...],
        target_taps: tuple[int, ...],
        sizes: tuple[int, int],
        moments: Moments,
        features: Tensor,
        y: Tensor,
        weighting: Weighting,
        layer_dim: int,
        first_layer: int,
    ) -> None:
        self.taps, self.target_taps, self.sizes = taps, target_taps, sizes
        self.moments, self.features, self.y, self.weighting = moments, features, y, weighting
        self.layer_dim, self.first_layer = layer_dim, first_layer

    def columns(self, one: FeatureSet) -> Tensor:
        """Feature columns of a set, int64 [F]."""
        size, target_size = self.sizes
        offset = len(self.taps) * size
        parts = [torch.arange(size) + size * self.taps.index(tap) for tap in one.taps]
        parts += [torch.arange(target_size) + offset + target_size * self.target_taps.index(tap) for tap in one.target_taps]
        return torch.cat(parts).to(self.features.device)

    def part(self, one: FeatureSet) -> tuple[Moments, Tensor, Tensor, Weighting]:
        """Moments, held-out features and KV, and weights of a set."""
        index, skip = self.columns(one), (one.first_layer - self.first_layer) * self.layer_dim
        m, root = self.moments, self.weighting.sensitivity_sqrt
        blocks = skip // root.shape[-1]
        whole = len(index) == len(m.ff)
        ff = m.ff if whole else m.ff[index][:, index]
        part = Moments(m.n, ff, m.fy[index][:, skip:], m.yy[skip:, skip:], m.f_mean[index], m.f_scale[index], m.mu[skip:])
        return part, self.features[:, index], self.y[:, skip:], Weighting(root[blocks:], self.weighting.inverse[blocks:])


@dataclass(frozen=True)
class Candidate:
    """A set of features with a predictor's rank (None: dense), and what a restore with it costs."""

    features: FeatureSet
    rank: int | None
    cost: RestoreCost


def separate_feature_sets(target: DecoderConfig, draft: DecoderConfig) -> Iterator[FeatureSet]:
    """States of the draft's first layers, all of them or every third, with or without the target's own first layers; and these alone."""
    depths = sorted({*(n for n in DRAFT_LAYERS if n < draft.num_layers), draft.num_layers - 1})
    for recomputed in sorted({0, target.num_layers // 14, target.num_layers // 7}):
        own = {(0,)} if not recomputed else {tuple(sorted({0, recomputed // 2, recomputed})), (recomputed,)}
        for depth in depths:
            taps = {()} if not depth else {tuple(range(depth + 1)), tuple(range(depth, -1, -3))[::-1], (depth,)}
            for some in sorted(taps):
                for states in sorted(own):
                    yield FeatureSet(_name(some, states, recomputed), some, states, recomputed)


def exit_feature_sets(exit_layer: int, head_layers: int) -> Iterator[FeatureSet]:
    """States of the target's layers below its early exit, and of a draft head's last layer."""
    last = () if not head_layers else (exit_layer + head_layers,)
    every_second = tuple(range(exit_layer, 0, -2))[::-1]
    for some in sorted({every_second, (exit_layer,), (*every_second, *last), (exit_layer, *last), last or (exit_layer,)}):
        yield FeatureSet(_name(some, (0,), exit_layer), some, (0,), exit_layer)


def _name(taps: tuple[int, ...], target_taps: tuple[int, ...], recomputed: int) -> str:
    said = [f"states {','.join(map(str, taps))}"] if taps else []
    return " + ".join([*said, f"target {','.join(map(str, target_taps))}"]) + (f", {recomputed} layers recomputed" if recomputed else "")


def affordable(
    target: DecoderConfig,
    draft: DecoderConfig | None,
    exit_layer: int,
    head: DecoderConfig | None,
    *,
    restore_budget: float,
    predictor_bytes: float,
    times: PassTimes | None = None,
) -> list[Candidate]:
    """One candidate for every set of features that fits, with the largest predictor that does.

    Args:
        draft: a separate draft model; None for an early exit after `exit_layer` layers, with or without a draft head's layers.
        restore_budget: passes and predictor over the target's prefill, in arithmetic (`RestoreCost.budget_share`) or, with `times`, in seconds.
        predictor_bytes: largest predictor as stored.

    Raises:
        InvalidOption: nothing fits; the remedy names the cheapest.
    """
    if draft is not None:
        sets, size = separate_feature_sets(target, draft), draft.hidden_size
    else:
        sets, size = exit_feature_sets(exit_layer, 0 if head is None else head.num_layers), target.hidden_size
    found, least = [], math.inf
    for one in sets:
        num_features, dim = one.spec.num_features(size, target.hidden_size), (target.num_layers - one.first_layer) * target.kv_width
        for rank in (None, *RANKS):
            if rank is not None and rank >= min(num_features, dim):
                continue
            multiplies = predictor_multiplies(num_features, dim, rank)
            cost = restore_cost(target, one.spec, one.first_layer, draft=draft, head=head, predictor_multiplies=multiplies)
            stored_bytes = dense_bytes(num_features, dim) if rank is None else rank * (num_features + dim)
            if stored_bytes > predictor_bytes:
                continue
            share = cost.budget_share if times is None else cost.time_share(times)
            least = min(least, share)
            if share <= restore_budget:
                found.append(Candidate(one, rank, cost))
                break
    if not found:
        raise InvalidOption(
            f"no predictor takes at most {restore_budget:.0%} of the target's prefill",
            "raise the pack's budget" if least == math.inf else f"the cheapest takes {least:.1%}: give a restore budget of that",
        )
    return found


def predictor_bytes_of(budget_bytes: float) -> float:
    """Most bytes of a predictor in a pack of `budget_bytes`."""
    return DENSE_SHARE * budget_bytes


def wide_spec(found: Sequence[Candidate]) -> tuple[FeatureSpec, int]:
    """Features that hold every candidate's, and the first layer that any of them codes."""
    taps = tuple(sorted({tap for one in found for tap in one.features.taps}))
    own = tuple(sorted({tap for one in found for tap in one.features.target_taps}))
    return FeatureSpec(taps, own), min(one.features.first_layer for one in found)


def choose(whole: Whole, found: Sequence[Candidate], step: float, num_elements: int) -> tuple[Candidate, list[dict[str, Any]]]:
    """The candidate with the fewest bits, and a row for each: name, rank, share of the prefill, bits an element.

    Bits are those of each layer's own principal components under Laplace densities: more than a transform of all layers needs, for every candidate.

    Args:
        step: of the quantiser. num_elements: KV elements a token, of all layers.
    """
    rows: list[dict[str, Any]] = []
    for candidate in found:
        m, features, y, weighting = whole.part(candidate.features)
        features, y = features[:_HELD_OUT_TOKENS], y[:_HELD_OUT_TOKENS]
        if candidate.rank is None:
            predicted = m.mu + (features - m.f_mean) / m.f_scale @ m.ridge(_RIDGE)
        else:
            fit = m.fit(_RIDGE, candidate.rank, weighting.whiten, weighting.unwhiten)
            predicted = fit(features)
        bits = layer_bits(weighting.whiten(y - predicted), whole.layer_dim, step) / num_elements
        rows.append(
            {
                "features": candidate.features.name,
                "rank": candidate.rank,
                "budget_share": round(candidate.cost.budget_share, 4),
                "bits_per_element": round(bits, 4),
            }
        )
    best = min(range(len(rows)), key=lambda n: rows[n]["bits_per_element"])
    return found[best], rows


def layer_bits(z: Tensor, layer_dim: int, step: float) -> float:
    """Ideal bits a token of weighted residuals z float32 [n, D], each layer in its own principal components."""
    total = 0.0
    for part in z.split(layer_dim, 1):
        variance, basis = torch.linalg.eigh(part.T @ part / len(part))
        scale = variance.clamp_min(1e-12).sqrt() / step
        kept = scale > 0.125  # a component below never leaves zero
        if bool(kept.any()):
            total += float(laplace_bits(part @ basis[:, kept] / step, scale[kept]).sum(1).mean())
    return total


def laplace_bits(x: Tensor, scale: Tensor) -> Tensor:
    """Ideal code length, float32 [n, K], of the quantised x [n, K] (in steps) under discretised Laplace densities of standard deviation scale [K].

    As `codec.rate.laplace_probabilities`: zero covers |x| < 1 - ROUNDING, n covers n - ROUNDING <= |x| < n + 1 - ROUNDING.
    """
    rate = math.sqrt(2) / scale
    size = quantise(x).abs().float()
    zero = -torch.log2(-torch.expm1(-(1 - ROUNDING) * rate))
    more = 1 + (size - ROUNDING) * rate * math.log2(math.e) - torch.log2(-torch.expm1(-rate))
    return torch.where(size > 0, more, zero)
