"""Measuring what distortion of a cache does to the target: the first three quarters of each document's cache are replaced by coded ones, and the
continuations' output is compared with that over the untouched cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch

from codec.codec import KvCodec
from codec.divergence import DivergenceCurve
from codec.errors import BadInput
from codec.fidelity import plan_spans, token_importance
from codec.pack import CodecPack
from codec.predictor.dense import load_predictor
from codec.quantize import levels_of
from codec.spec import NUM_SINKS, SPAN_TOKENS
from engine.calibrate.stream import PairStream

DISTORTIONS = (0.001, 0.0025, 0.006, 0.015, 0.035, 0.1, 0.3)
"""Asked of the codec's plan, in units of the weighted KV's mean variance: from half of what near-lossless asks of a text that is easily upset to what
upsets a model of random weights. The first ones tell qualities of trained models apart."""

_IDENTITY = DivergenceCurve((1e-9, 1.0), (1e-9, 1.0))
_SHORTEST = 8 * NUM_SINKS
_OTHER_PASS_TOKENS = 100  # no multiple of a tile: the same text computed with other sums
_NORMAL_QUANTILE = 1.2815515655446004  # of .9: of ten kinds of text nine diverge less than the curve says
_KIND_SPREAD, _KIND_SPREAD_WEIGHT = 0.25, 4
"""Standard deviation of what kinds of text diverge by at the same distortion, as a share of its mean (SmolLM2: .21 of CSS, PHP, HTML, CUDA, Cython and
shell, what their documents' own scatter causes taken off), and as how many kinds it counts beside those that are measured: a few say little."""


class DocumentDivergence(NamedTuple):
    """Of one document: (distortion, divergence) of its cache at each of DISTORTIONS, and the divergence that rounding alone causes."""

    points: list[tuple[float, float]]
    rounding: float


def measure_divergence(
    stream: PairStream, pack: CodecPack, kinds: Sequence[Sequence[Sequence[int]]], num_tokens: int
) -> DivergenceCurve | None:
    """The curve of a pack over about `num_tokens` tokens of documents, of each kind of text in turn; None where they are too short or show no effect.
    Of ten other kinds nine are expected to diverge less than it says (`curve_of`), in the arithmetic of `stream.target`'s dtype."""
    found: list[list[DocumentDivergence]] = [[] for _ in kinds]
    done = 0
    for turn in zip_longest(*kinds):
        for own, document in zip(found, turn, strict=True):
            if document is None or len(document) < _SHORTEST:
                continue
            if done >= num_tokens:
                break
            own.append(document_divergence(stream, pack, document))
            done += len(document)
    return curve_of([own for own in found if own])


def curve_of(kinds: Sequence[Sequence[DocumentDivergence]]) -> DivergenceCurve | None:
    """A bound on the mean divergence of a kind of text that is not among these, which nine of ten keep; None of no kinds, or where nothing shows.

    Student's prediction bound for one more of normally distributed values: mean + t * sqrt(spread^2 * (1 + 1/n) + noise^2 / n), n the kinds,
    spread that between kinds, pooled with _KIND_SPREAD, and noise what the scatter of a kind's own documents adds to its mean. A quantile of the
    kinds themselves promises too much: that of .9 of four kinds is passed by every fifth new one, of eight by every seventh. Few kinds, kinds
    unlike each other and few documents let the curve promise less.
    """
    if not kinds:
        return None
    points = [torch.tensor([one.points for one in own], dtype=torch.float64) for own in kinds]  # [documents, points, 2] of each kind
    rounding = torch.tensor([sum(one.rounding for one in own) / len(own) for own in kinds], dtype=torch.float64).clamp_min(0)
    distortion = torch.stack([own[..., 0].mean(0) for own in points])  # [kinds, points]
    mean = distortion.mean(0)
    at_mean = mean / distortion.clamp_min(1e-12)  # kinds are compared at the same distortion
    found = torch.stack([own[..., 1].mean(0) for own in points]) - rounding[:, None]
    of_code = _prediction_bound(found * at_mean, _noise(points) * at_mean.square())
    added = float(rounding.mean())
    try:
        return DivergenceCurve.fitted([(x, y + added) for x, y in zip(mean.tolist(), of_code.tolist(), strict=True)], added)
    except BadInput:
        return None


def _noise(kinds: Sequence[torch.Tensor]) -> torch.Tensor:
    """Variance of each kind's mean divergence that the scatter of its documents causes, float64 [kinds, points]: in proportion to the mean's square, by
    a share that all kinds have in common; zeros where no kind has several documents. kinds: [documents, points, 2] of each."""
    several = [own[..., 1] for own in kinds if len(own) > 1]
    means = torch.stack([own[..., 1].mean(0) for own in kinds]).square()
    if not several:
        return torch.zeros_like(means)
    scatter = torch.stack([own.var(0) for own in several]).mean(0) / torch.stack([own.mean(0).square() for own in several]).mean(0)
    return means * scatter.nan_to_num() / torch.tensor([len(own) for own in kinds])[:, None]


def _prediction_bound(found: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Float64 [points]; found: each kind's divergence [kinds, points], noise: the variance that its documents' scatter causes [kinds, points]."""
    count, mean, noise_of_kind = len(found), found.mean(0), noise.mean(0)
    variance = found.var(0) if count > 1 else torch.zeros_like(mean)
    between = (variance - noise_of_kind).clamp_min(0) * (count - 1) + _KIND_SPREAD_WEIGHT * (_KIND_SPREAD * mean).square()
    freedom = count - 1 + _KIND_SPREAD_WEIGHT
    return mean + student_quantile(freedom) * (between / freedom * (1 + 1 / count) + noise_of_kind / count).sqrt()


def student_quantile(freedom: int) -> float:
    """The .9 quantile of Student's distribution with at least 4 degrees of freedom, to .1%: the expansion in their inverse (Abramowitz and Stegun,
    26.7.5)."""
    z = _NORMAL_QUANTILE
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / freedom**n for n, term in enumerate(terms, 1))


@torch.inference_mode()
def document_divergence(stream: PairStream, pack: CodecPack, document: Sequence[int]) -> DocumentDivergence:
    """What coding the first three quarters of a document's cache, as a session is coded, does to the output behind them."""
    target, codec = stream.target, KvCodec(pack, stream.target.device)
    predictor = load_predictor(pack.predictor, pack.predictor_settings, target.device)
    split = 3 * len(document) // 4
    batch = stream.run([document[:split]])
    octaves = predictor.octaves_of_features(batch.features)
    sizes = [min(SPAN_TOKENS, len(batch.y) - at) for at in range(0, len(batch.y), SPAN_TOKENS)]
    none: list[torch.Tensor | None] = [None] * len(sizes)
    levels = none if octaves is None else list(levels_of(octaves).split(sizes))
    importance = token_importance(octaves)
    factors = none if importance is None else list(importance.split(sizes))
    prediction = torch.cat([predictor.predict_features(part) for part in batch.features.split(2048)])
    pairs = list(zip(batch.y.split(sizes), prediction.split(sizes), strict=True))
    ids = torch.tensor(document, device=target.device)
    sequence = target.new_pool(-(-len(document) // 64)).new_sequence(len(document))
    target.forward(ids[:split], [sequence], [split], logits="none")
    sequence.advance(split)
    following = len(document) - split

    def log_p(sequence=sequence) -> torch.Tensor:
        logits = target.forward(ids[split:], [sequence], [following]).logits
        assert logits is not None
        return logits.log_softmax(-1)

    untouched = log_p()

    def divergence(log_p=log_p) -> float:
        return float((untouched.exp() * (untouched - log_p())).sum(dtype=torch.float64)) / following

    points = []
    for distortion in DISTORTIONS:
        plan = plan_spans(codec, _IDENTITY, f"kl{distortion}", pairs, levels, factors)
        rows = torch.cat(codec.requantised(pairs, plan.settings, plan.levels))
        target.write_kv(sequence, NUM_SINKS, rows, first_layer=stream.layout.first_layer)
        measured = sum(own * size for own, size in zip(plan.divergence, sizes, strict=True)) / len(batch.y)
        points.append((measured, divergence()))
    sequence.free()
    sequence = target.new_pool(-(-len(document) // 64)).new_sequence(len(document))
    for part in ids[:split].split(_OTHER_PASS_TOKENS):
        target.forward(part, [sequence], [len(part)], logits="none")
        sequence.advance(len(part))
    rounding = divergence(partial(log_p, sequence))
    sequence.free()
    return DocumentDivergence(points, rounding)
