"""Measuring what distortion of a cache does to the target: the first three quarters of each document's cache are replaced by coded ones, and the
continuations' output is compared with that over the untouched cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from codec.codec import KvCodec, SpanSetting
from codec.divergence import DivergenceCurve
from codec.errors import BadInput
from codec.fidelity import Distortion, token_importance
from codec.pack import CodecPack
from codec.predictor.dense import load_predictor
from codec.quantize import levels_of
from codec.spec import NUM_SINKS, SPAN_TOKENS
from engine.calibrate.stream import PairStream

STEPS = (0.125, 0.25, 0.5, 1.0, 2.0)
_SHORTEST = 8 * NUM_SINKS
_OTHER_PASS_TOKENS = 100  # no multiple of a tile: the same text computed with other sums
_QUANTILE = 0.85
"""Texts differ in what the same distortion does to them: SmolLM2 in float32 diverges .6 to 1.8 times as much as a curve through the mean says, code the
most. Such a curve would promise too much for half of them."""


class DocumentDivergence(NamedTuple):
    """Of one document: (distortion, divergence) of its cache at each of STEPS, and the divergence that rounding alone causes."""

    points: list[tuple[float, float]]
    rounding: float


def measure_divergence(stream: PairStream, pack: CodecPack, documents: Sequence[Sequence[int]], num_tokens: int) -> DivergenceCurve | None:
    """The curve of a pack over about `num_tokens` tokens of documents; None where they are too short or show no effect. Of twenty
    documents seventeen diverge less than it says, in the arithmetic of `stream.target`'s dtype."""
    found, done = [], 0
    for document, measured in document_divergences(stream, pack, documents):
        found.append(measured)
        done += len(document)
        if done >= num_tokens:
            break
    return curve_of(found)


def curve_of(measured: Sequence[DocumentDivergence]) -> DivergenceCurve | None:
    """The curve below which a share of _QUANTILE of the documents stays; None of none, or of such as show no effect."""
    if not measured:
        return None
    points = []
    for n in range(len(STEPS)):
        distortions, divergences = torch.tensor([one.points[n] for one in measured], dtype=torch.float64).T
        mean = distortions.mean()
        points.append((float(mean), float((divergences * mean / distortions.clamp_min(1e-12)).quantile(_QUANTILE))))
    try:
        return DivergenceCurve.fitted(points, max(0.0, sum(one.rounding for one in measured) / len(measured)))
    except BadInput:
        return None


@torch.inference_mode()
def document_divergences(
    stream: PairStream, pack: CodecPack, documents: Iterable[Sequence[int]]
) -> Iterator[tuple[Sequence[int], DocumentDivergence]]:
    """Each document that is long enough, and what coding its first three quarters does to the output behind them."""
    target, codec = stream.target, KvCodec(pack, stream.target.device)
    predictor = load_predictor(pack.predictor, pack.predictor_settings, target.device)
    for document in documents:
        if len(document) < _SHORTEST:
            continue
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
        distortion = Distortion(codec, pairs, levels, factors)
        ids = torch.tensor(document, device=target.device)
        sequence = target.new_pool(-(-len(document) // 64)).new_sequence(len(document))
        target.forward(ids[:split], [sequence], [split], logits="none")
        sequence.advance(split)
        following = [len(document) - split]

        def log_p(ids: torch.Tensor = ids[split:], sequence=sequence, following: list[int] = following) -> torch.Tensor:
            logits = target.forward(ids, [sequence], following).logits
            assert logits is not None
            return logits.log_softmax(-1)

        untouched = log_p()

        def divergence(untouched: torch.Tensor = untouched, log_p=log_p, following: list[int] = following) -> float:
            return float((untouched.exp() * (untouched - log_p())).sum(dtype=torch.float64)) / following[0]

        complete = codec.transform.fallback is not None
        points = []
        for step in STEPS:
            ones = torch.ones_like(distortion.sizes)
            kept = codec.num_components(step, fallback=complete)
            measured = distortion.measure(ones.float() * step, (0 * ones).to(torch.int32), ones * kept, complete)
            rows = torch.cat(codec.requantised(pairs, [SpanSetting(step, complete)] * len(pairs), levels))
            target.write_kv(sequence, NUM_SINKS, rows, first_layer=stream.layout.first_layer)
            points.append((float((measured * distortion.sizes).sum()) / len(batch.y), divergence()))
        sequence.free()
        sequence = target.new_pool(-(-len(document) // 64)).new_sequence(len(document))
        for part in ids[:split].split(_OTHER_PASS_TOKENS):
            target.forward(part, [sequence], [len(part)], logits="none")
            sequence.advance(len(part))
        rounding = divergence(log_p=partial(log_p, sequence=sequence))
        sequence.free()
        yield document, DocumentDivergence(points, rounding)
