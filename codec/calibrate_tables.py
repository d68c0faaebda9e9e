"""Entropy tables from held-out components: one histogram per scale class, mixed with the Laplace density by its weight of evidence."""

from __future__ import annotations

import numpy as np
import torch

from codec.choice import RateChoice, final_classes
from codec.quantize import quantise
from codec.rate import NUM_CLASSES, NUM_GAINS, EntropyModel, class_of, class_scale, laplace_probabilities
from codec.spec import KEEP_FACTOR, QUALITIES

PRIOR_COUNT = 256.0
"""How many observations the prior of a class counts for."""

CENTROID_COUNT = 30.0
"""Observations at the integer itself that a reconstruction point starts from."""

SWEEP = tuple(2.0 ** (n / 2) for n in range(-3, 5))
"""Steps, relative to balanced, at which tables are counted: classes between those that a named quality meets are filled too."""


def fit_entropy_model(components: torch.Tensor, variance: torch.Tensor, rounds: int = 3, max_tokens: int = 2048) -> EntropyModel:
    """Tables for components float32 [n, K] of held-out tokens, whose variances are variance float32 [K].

    Gains and histograms depend on each other, so they are found in turns. Classes without data keep the Laplace density, narrowed
    or widened as little as the neighbouring classes tell.
    """
    stride = max(1, len(components) // max_tokens)
    components, sigma = components[::stride].float(), variance.clamp_min(1e-12).sqrt().cpu()
    device = components.device
    level = torch.zeros(len(components), dtype=torch.int32, device=device)
    steps = sorted(set(QUALITIES.values()) | {QUALITIES["balanced"] * s for s in SWEEP})
    kept = [(step, k) for step in steps if (k := int((sigma > KEEP_FACTOR * step).sum()))]
    model = EntropyModel.laplace()
    for turn in range(rounds):
        choice = RateChoice(model, device)
        counts, gain_counts = np.zeros(choice.num_entries), np.full(NUM_GAINS, 0.25)
        sums, sizes = np.zeros(3 * NUM_CLASSES), np.zeros(3 * NUM_CLASSES)
        for step, k in kept:
            x, base = components[:, :k] / step, torch.from_numpy(class_of(sigma[:k].numpy(), step)).to(device)
            q = quantise(x)
            gains = choice.choose_gains(q, base, level)
            # the first turn's Laplace tables are too far off to choose by
            q = q if turn == 0 else choice.refine(x, q, base, level, gains)
            classes = final_classes(base, level, gains)
            counts += _counted(choice.symbols(q, classes), len(counts))
            gain_counts += _counted(gains, NUM_GAINS)
            at = q.nonzero(as_tuple=True)
            magnitude = q[at].abs()
            cell = 3 * classes[at] + magnitude.clamp(max=3) - 1
            sums += _counted(cell, len(sums), x[at].abs() - magnitude)
            sizes += _counted(cell, len(sums))
        centroids = np.clip(sums / (sizes + CENTROID_COUNT), -0.5, 0.5).reshape(-1, 3).astype(np.float32)
        model = _mix(model, counts, gain_counts, centroids)
    return model


def _counted(index: torch.Tensor, size: int, weights: torch.Tensor | None = None) -> np.ndarray:
    """How often, or with what sum of weights, each of `size` indices occurs: float64 [size]. Weights count in whole 2^-24, so that their sum does
    not depend on its order."""
    units = None if weights is None else torch.round(weights.double() * (1 << 24))
    counts = torch.bincount(index.reshape(-1), units, size).double().cpu().numpy()
    return counts if weights is None else counts / (1 << 24)


def _mix(model: EntropyModel, counts: np.ndarray, gain_counts: np.ndarray, centroids: np.ndarray) -> EntropyModel:
    """Posterior mean of each class's table under its Laplace prior; both sides of zero share their counts."""
    probs = []
    for c in range(NUM_CLASSES):
        limit = int(model.limit[c])
        prior = laplace_probabilities(float(class_scale(c)), limit)
        seen = counts[model.offset[c] : model.offset[c + 1]].copy()
        seen[:-1] = 0.5 * (seen[:-1] + seen[:-1][::-1])
        probs.append((seen + PRIOR_COUNT * prior) / (seen.sum() + PRIOR_COUNT))
    return EntropyModel.from_probs(probs, gain_counts / gain_counts.sum(), centroids)
