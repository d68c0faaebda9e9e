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
_QUANTILE = 0.9
"""Kinds of text differ in what the same distortion does to them: SmolLM2 diverges .54 (chat) to 2.1 (Tcl) times as much as its distortion, the median
kind 1.17 times. A curve through the mean would promise too much for half of them; one through single documents follows their noise, at twice the
bits."""


class DocumentDivergence(NamedTuple):
    """Of one document: (distortion, divergence) of its cache at each of DISTORTIONS, and the divergence that rounding alone causes."""

    points: list[tuple[float, float]]
    rounding: float


def measure_divergence(
    stream: PairStream, pack: CodecPack, kinds: Sequence[Sequence[Sequence[int]]], num_tokens: int
) -> DivergenceCurve | None:
    """The curve of a pack over about `num_tokens` tokens of documents, of each kind of text in turn; None where they are too short or show no effect.
    Of ten kinds nine diverge less than it says, on the mean of their documents, in the arithmetic of `stream.target`'s dtype."""
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
    """The curve below which a share of _QUANTILE of the kinds stays, each with the mean of its documents; None of none, or where nothing shows."""
    if not kinds:
        return None
    means = torch.stack([torch.tensor([one.points for one in own], dtype=torch.float64).mean(0) for own in kinds])  # [kinds, points, 2]
    rounding = torch.tensor([sum(one.rounding for one in own) / len(own) for own in kinds], dtype=torch.float64).clamp_min(0)
    distortions, own = means[..., 0], means[..., 1] - rounding[:, None]
    mean = distortions.mean(0)
    of_code = (own * mean / distortions.clamp_min(1e-12)).quantile(_QUANTILE, dim=0)
    added = float(rounding.mean())
    try:
        return DivergenceCurve.fitted([(x, y + added) for x, y in zip(mean.tolist(), of_code.tolist(), strict=True)], added)
    except BadInput:
        return None


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
