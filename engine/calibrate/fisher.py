"""The calibration's second look at the text: gradients at the cache, for the codec's weights and for each token's own sensitivity.

A codec that spends the same step on every token wastes bits on tokens that nothing later attends to. How much a token will matter shows in the
draft's hidden states: the logarithm of its gradient's energy is regressed on the same features that predict its KV, so no attention statistics need
to be kept or sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codec.predictor.fit import Moments
from codec.spec import NUM_SINKS
from engine.calibrate.gradients import Sensitivity, cache_gradients
from engine.calibrate.stream import PairStream
from engine.errors import InvalidOption

SPLITS = (0.25, 0.5, 0.75)
"""Where texts are cut into cache and continuation, as a fraction of the context: a token is met soon and late."""

FOLLOWING = 0.25
"""Length of the continuation, as a fraction of the context."""

RIDGES = (0.01, 0.1, 1.0)
BATCH = 4


@dataclass
class FisherSample:
    """gradients bfloat16 [n, D] and raw features bfloat16 [n, F] of the same cached tokens; blocks: the running Fisher information."""

    gradients: Tensor
    features: Tensor
    blocks: Sensitivity


def measure(stream: PairStream, documents: Sequence[Sequence[int]], *, context: int, tokens: int, seed: int = 0) -> FisherSample:
    """Gradients and features of about `tokens` cached tokens, from the documents that fill the context (where most do not: the longer half).

    Raises InvalidOption when the documents are too short to be cut in two.
    """
    generator = torch.Generator(stream.target.device).manual_seed(seed)
    context = min(context, sorted(map(len, documents))[len(documents) // 2])
    if context < 4 * NUM_SINKS:
        raise InvalidOption(
            f"half of the documents have fewer than {context + 1} tokens", "calibrate on longer texts, or with attention weights"
        )
    follow = max(1, int(FOLLOWING * context))
    full = [list(d) for d in documents if len(d) >= context]
    gradients, features, blocks, done = [], [], Sensitivity(stream.layout), 0
    for turn, at in enumerate(range(0, len(full), BATCH)):
        split = max(NUM_SINKS + 1, int(SPLITS[turn % len(SPLITS)] * context))
        group = [d[: split + follow] for d in full[at : at + BATCH]]
        ids = torch.tensor(group, device=stream.target.device)
        grad = cache_gradients(stream.target, ids, split, stream.layout, generator)
        blocks.add(grad)
        gradients.append(grad.flatten(0, 1).bfloat16())
        features.append(stream.run([d[:split] for d in group]).features.bfloat16())
        done += len(gradients[-1])
        if done >= tokens:
            break
    return FisherSample(torch.cat(gradients), torch.cat(features), blocks)


def fit_token_sensitivity(sample: FisherSample, m: Moments, energy: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
    """Weights float32 [F], for standardised features, of log2 of a token's sensitivity less its mean; and their held-out correlation.

    Args:
        m: the calibration's moments, whose feature covariance the regression shares.
        energy: gradients float32 [n, D] -> float32 [n], the squared length of what they say about coded components.
    """
    target = torch.cat([energy(part.float()) for part in sample.gradients.split(2048)]).clamp_min(1e-20).log2()
    target = target - target.mean()
    cut = 7 * len(target) // 8
    cross = torch.zeros(sample.features.shape[1], dtype=torch.float32, device=target.device)
    for part, value in zip(sample.features[:cut].split(2048), target[:cut].split(2048), strict=True):
        cross += ((part.float() - m.f_mean) / m.f_scale).T @ value
    best: tuple[float, Tensor] | None = None
    for ridge in RIDGES:
        system = m.ff.clone()
        system.diagonal().add_(ridge * m.ff.diagonal().mean())
        weights = torch.cholesky_solve((cross / cut)[:, None], torch.linalg.cholesky(system))[:, 0]
        del system
        predicted = torch.cat([((part.float() - m.f_mean) / m.f_scale) @ weights for part in sample.features[cut:].split(2048)])
        correlation = float(torch.corrcoef(torch.stack([predicted, target[cut:]]))[0, 1])
        if best is None or correlation > best[0]:
            best = correlation, weights
    assert best is not None
    return best[1], best[0]
