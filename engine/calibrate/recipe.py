"""From text to a codec pack: predictor, weights, transform and entropy tables of one (target, draft) pair.

Two recipes of the same steps. `calibrate` makes the full pack in one streaming pass over any amount of text (memory does not grow with it).
`quick_pack` makes do with a few thousand tokens of the interpreter's own library: dual ridge cross-validated by document, a transform per layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from codec.calibrate_tables import fit_entropy_model
from codec.codec import KvCodec
from codec.fidelity import plan_spans, token_importance
from codec.pack import CodecPack
from codec.predictor.dense import AnyPredictor, DensePredictor, load_predictor
from codec.predictor.features import FeatureSpec
from codec.predictor.fit import Moments, RidgeMoments, explained, fit_dual
from codec.predictor.gptq import round_weights
from codec.predictor.low_rank import Predictor
from codec.quantize import levels_of
from codec.rate import EntropyModel
from codec.rows import ROW_BITS, allocate_bits
from codec.spans import curve_in
from codec.spec import KEEP_FACTOR, QUALITIES, SPAN_TOKENS, KvLayout
from codec.transform import Transform, fit_fallback, fit_global, fit_per_layer
from codec.weighting import Weighting, blended, normalised
from engine.calibrate import search
from engine.calibrate.budget import (
    DENSE_SHARE,
    FALLBACK_SHARE,
    PACK_BUDGET,
    bf16_bytes,
    default_rank,
    dense_bytes,
    fallback_bytes,
    max_components,
    transform_bytes,
)
from engine.calibrate.corpus import documents, library_texts
from engine.calibrate.divergence import measure_divergence
from engine.calibrate.fisher import FisherSample, fit_token_sensitivity, measure
from engine.calibrate.pass_times import measure_pass_times
from engine.calibrate.stream import PairStream, QueryStatistics, block_covariances, diagonal_blocks, unit_weights
from engine.errors import InvalidOption
from engine.model.decoder import Decoder

Log = Callable[[str], None]
FINEST_STEP = min(QUALITIES.values())
_PROMISE_TOKENS = 512  # whose bits are stated
CURVE_TOKENS = 40_960
_QUICK_CURVE_TOKENS = 1536
ENOUGH_GRADIENTS = 50_000
"""Cached tokens whose gradients make better weights than any blend with attention statistics does."""


@dataclass(frozen=True)
class CalibrationOptions:
    """Choices of a full calibration.

    taps: draft layers used as features (None: every layer of a separate draft; of an early exit, every second layer up to it).
    predictor: "dense" (all directions, 4 bits), "low_rank" (few directions, 8 bits) or "auto" (dense where it fits the budget).
    rank: of a low-rank predictor (None: from the budget).
    weighting: "fisher", "attention", "blend" (of both), "unit" or "auto" (fisher where gradients abound, else blend).
    transform: "global" or "per_layer".
    context: tokens a document. held_out_tokens: kept apart for tables and reported figures.
    fisher_tokens: cached tokens whose gradients are taken. level_strength: how far a token's step follows its sensitivity, 0 not at all, 1 as far
    as equal marginal returns would say. budget: fraction of the target's bytes the pack may take. restore_budget: share of the target's prefill that a
    restore's passes and predictor may take: features, recomputed layers and form of the predictor are then chosen (`engine.calibrate.search`). None:
    taps, predictor and rank say which. restore_by_time: that share is of its seconds on this machine, over a document of 8,192 tokens, not of its
    arithmetic.
    """

    taps: tuple[int, ...] | None = None
    predictor: str = "auto"
    rank: int | None = None
    weighting: str = "auto"
    transform: str = "global"
    context: int = 1024
    tokens_per_batch: int = 8192
    held_out_tokens: int = 6144
    fisher_tokens: int = 65_536
    level_strength: float = 0.5
    budget: float = PACK_BUDGET
    restore_budget: float | None = None
    restore_by_time: bool = False

    def check(self) -> None:
        """Raises InvalidOption for a name that is none of the choices."""
        choices = {
            "predictor": ("auto", "dense", "low_rank"),
            "weighting": ("auto", "blend", "fisher", "attention", "unit"),
            "transform": ("global", "per_layer"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InvalidOption(f"calibration with {name} {getattr(self, name)!r}", f"choose one of {', '.join(allowed)}")
        if self.restore_budget is None:
            return
        if not 0 < self.restore_budget < math.inf:
            raise InvalidOption(f"a restore budget of {self.restore_budget}", "give a share of the target's prefill, such as 0.25")
        if self.taps is not None or self.rank is not None or self.predictor != "auto":
            raise InvalidOption("a restore budget chooses taps, predictor and rank", "give either the budget, or these")


def feature_spec(
    draft: Decoder | None, recomputed_layers: int, taps: tuple[int, ...] | None = None, head_layers: Decoder | None = None
) -> FeatureSpec:
    """Default features: all hidden states of a separate draft but its last, and the target's own after half and after all of the layers that are run
    again; of an early exit, every second layer up to it, and the last of its draft head."""
    if draft is None:
        own = () if head_layers is None else (recomputed_layers + head_layers.config.num_layers,)
        return FeatureSpec((*range(recomputed_layers, 0, -2),)[::-1] + own if taps is None else taps)
    again = tuple(sorted({0, recomputed_layers // 2, recomputed_layers}))
    return FeatureSpec(tuple(range(draft.config.num_layers)) if taps is None else taps, again)


def default_recomputed_layers(num_layers: int) -> int:
    """First layers of a target that a resume runs again beside a separate draft: a seventh. Their KV takes no bytes and their states predict the
    other layers' better than the draft's alone do, for a seventh of a prefill."""
    return num_layers // 7


def calibrate(
    target: Decoder,
    draft: Decoder | None,
    docs: Sequence[Sequence[int]],
    *,
    recomputed_layers: int = 0,
    head_layers: Decoder | None = None,
    options: CalibrationOptions | None = None,
    curve_kinds: Sequence[Sequence[Sequence[int]]] | None = None,
    curve_tokens: int = CURVE_TOKENS,
    fingerprints: dict[str, str] | None = None,
    log: Log = print,
) -> CodecPack:
    """A codec pack from token documents, in one pass.

    Args:
        target, draft: the pair; draft None means that the target's first layers alone predict the others.
        recomputed_layers: those first layers, or those that are run again beside a separate draft.
        head_layers: the layers of a draft head, which add their states to its own.
        docs: token documents (`engine.calibrate.corpus.documents`); every eighth is held out until there are enough.
        curve_kinds: documents, of each kind of text apart, that the divergence curve is measured on (None: held-out ones of docs, as of one kind).
            What is not of the calibration's kinds has tokens whose importance is predicted less well: a promise for such text needs a curve from
            such text.
        curve_tokens: about as many of them are measured.
        fingerprints: role -> digest, stored in the pack.
        log: told about progress.
    """
    options = options or CalibrationOptions()
    options.check()
    torch.backends.cuda.matmul.allow_tf32 = False
    budget_bytes = options.budget * bf16_bytes(target)
    candidates: list[search.Candidate] = []
    times = None
    if options.restore_budget is None:
        stream = PairStream(
            target, draft, feature_spec(draft, recomputed_layers, options.taps, head_layers), recomputed_layers, head_layers
        )
    else:
        shapes = None if draft is None else draft.config, recomputed_layers, None if head_layers is None else head_layers.config
        room = search.predictor_bytes_of(budget_bytes)
        times = measure_pass_times(target, draft) if options.restore_by_time else None
        candidates = search.affordable(target.config, *shapes, restore_budget=options.restore_budget, predictor_bytes=room, times=times)
        stream = PairStream(target, draft, *search.wide_spec(candidates), head_layers)
    device = target.device
    held, rest = _hold_out(docs, options.held_out_tokens)
    moments, queries = RidgeMoments(stream.num_features, stream.layout.dim, device), QueryStatistics()
    started, done, total = time.monotonic(), 0, sum(map(len, rest))
    for group in stream.batches(rest, options.tokens_per_batch):
        batch = stream.run(group, None if queries.complete else queries)
        moments.add(batch.features, batch.y)
        done += sum(map(len, group))
        log(f"calibration: {done:,} of {total:,} tokens, {time.monotonic() - started:.0f} s")
    apart = [stream.run(group) for group in stream.batches(held, options.tokens_per_batch)]
    features, y = torch.cat([b.features for b in apart]), torch.cat([b.y for b in apart])
    m = moments.finish()
    facts: dict[str, Any] = {"tokens": done}
    if times is not None:
        facts["pass_times"] = asdict(times)
    if candidates:
        blocks = diagonal_blocks(m.yy, stream.layout.head_dim)
        weighting = unit_weights(stream.layout, blocks) if options.weighting == "unit" else queries.weighting(target, stream.layout, blocks)
        sizes, layout = (stream.draft_size, target.config.hidden_size), stream.layout
        whole = search.Whole(
            stream.spec.taps, stream.spec.target_taps, sizes, m, features, y, weighting, layout.layer_dim, layout.first_layer
        )
        chosen, facts["search"] = search.choose(whole, candidates, QUALITIES["balanced"], layout.full_dim)
        options = replace(options, restore_budget=None, predictor="dense" if chosen.rank is None else "low_rank", rank=chosen.rank)
        stream = PairStream(target, draft, chosen.features.spec, chosen.features.first_layer, head_layers)
        m, features, y, _ = whole.part(chosen.features)
        del whole, weighting
        log(
            f"calibration: of {len(candidates)} predictors within the restore budget {chosen.features.name}, rank {chosen.rank or 'full'} at "
            f"{chosen.cost.budget_share:.0%} of the prefill, {time.monotonic() - started:.0f} s"
        )
    layout = stream.layout
    blocks = diagonal_blocks(m.yy, layout.head_dim)
    sample = None
    if options.weighting in ("auto", "fisher", "blend") or options.level_strength > 0:
        sample = measure(stream, rest, context=options.context, tokens=options.fisher_tokens)
        log(f"calibration: gradients at {sample.blocks.count:,} cached tokens, {time.monotonic() - started:.0f} s")
    weighting = choose_weighting(options.weighting, target, layout, blocks, queries, sample)
    ridge = m.choose_ridge(features, y)
    tensors, settings, residual = fit_predictor(stream, m, ridge, weighting, options, budget_bytes)
    log(f"calibration: {settings['kind']} predictor fitted, ridge {ridge:g}, {time.monotonic() - started:.0f} s")
    limit = max_components(layout, options.transform, transform_bytes(layout, tensors, budget_bytes, options.transform))
    threshold = KEEP_FACTOR * FINEST_STEP
    weighted = weighting.whiten_covariance(residual)
    if options.transform == "global":
        transform = fit_global(weighted, threshold, limit)
    else:
        transform = fit_per_layer(list(diagonal_blocks(weighted, layout.layer_dim)), threshold, limit)
    log(f"calibration: {transform.num_components} components, {time.monotonic() - started:.0f} s")
    facts["ridge"] = ridge
    if sample is not None and settings["kind"] == "dense" and options.level_strength > 0:
        kept = transform.kept(KEEP_FACTOR * QUALITIES["balanced"])
        attention, facts["sensitivity_correlation"] = fit_token_sensitivity(
            sample, m, lambda g: transform.project(weighting.unwhiten(g), kept).pow(2).sum(1)
        )
        tensors["attention"], settings["level_strength"] = attention.float(), options.level_strength
        log(
            f"calibration: token sensitivity predicted with correlation {facts['sensitivity_correlation']:.2f}, {time.monotonic() - started:.0f} s"
        )
    del m, moments, residual, weighted, sample
    predictor = load_predictor(tensors, settings, y.device)
    pack = assemble(
        stream,
        weighting,
        transform,
        tensors,
        settings,
        y - predict_raw(predictor, features),
        y,
        facts=facts,
        fingerprints=fingerprints or {},
        budget_bytes=budget_bytes,
    )
    log(f"calibration: packed, {time.monotonic() - started:.0f} s")
    kinds = [held] if curve_kinds is None else curve_kinds
    pack = pack.with_info(curve_figures(stream, pack, kinds, features, y - predict_raw(predictor, features), curve_tokens))
    log(f"calibration: done, {time.monotonic() - started:.0f} s")
    return pack


def _hold_out(docs: Sequence[Sequence[int]], tokens: int) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    held: list[Sequence[int]] = []
    rest: list[Sequence[int]] = []
    for n, document in enumerate(docs):
        (held if n % 8 == 3 and sum(map(len, held)) < tokens else rest).append(document)
    if not held:
        held, rest = list(docs[-1:]), list(docs[:-1])
    return held, rest


def choose_weighting(
    name: str, target: Decoder, layout: KvLayout, blocks: Tensor, queries: QueryStatistics, sample: FisherSample | None
) -> Weighting:
    """The weights of `CalibrationOptions.weighting`, normalised. blocks: float32 [blocks, d, d], of the KV's covariance."""
    if name == "unit":
        return unit_weights(layout, blocks)
    attention = queries.weighting(target, layout, blocks)
    if name == "attention":
        return attention
    assert sample is not None, "gradients were measured for these weights"
    fisher = normalised(sample.blocks.weighting(), blocks)
    if name == "auto":
        name = "fisher" if sample.blocks.count >= ENOUGH_GRADIENTS else "blend"
    return fisher if name == "fisher" else blended(fisher, attention, blocks)


def fit_predictor(
    stream: PairStream, m: Moments, ridge: float, weighting: Weighting, options: CalibrationOptions, budget_bytes: float
) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """The predictor's tensors and settings as stored, and the covariance float32 [D, D] of what it leaves over."""
    layout, spec = stream.layout, stream.spec
    num_features = len(m.ff)
    fits = num_features > 0 and dense_bytes(num_features, layout.dim) < DENSE_SHARE * budget_bytes
    if options.predictor == "dense" or (options.predictor == "auto" and options.rank is None and fits):
        weights = round_weights(m.ridge(ridge), m.ff)
        tensors, settings = DensePredictor.pack(spec, stream.draft_size, weights, m.f_mean, m.f_scale, m.mu)
        return tensors, settings | {"kind": "dense"}, m.residual_of(weights.dense())
    rank = options.rank or default_rank(num_features, layout, budget_bytes)
    fit = m.fit(ridge, rank, weighting.whiten, weighting.unwhiten)
    tensors, settings = Predictor.pack(spec, stream.draft_size, fit.down, fit.offset, fit.up, fit.mu)
    return tensors, settings | {"kind": "low_rank"}, m.residual_covariance(fit)


def _rank_of(tensors: dict[str, Tensor], settings: dict[str, Any]) -> int | None:
    """Of a low-rank predictor's product; None where it is dense."""
    return None if settings["kind"] == "dense" else tensors["up"].shape[0]


def predict_raw(predictor: AnyPredictor, features: Tensor) -> Tensor:
    """Predictions float32 [n, D] from raw features [n, F], a few at a time."""
    return torch.cat([predictor.predict_features(part) for part in features.split(2048)])


def assemble(
    stream: PairStream,
    weighting: Weighting,
    transform: Transform,
    tensors: dict[str, Tensor],
    settings: dict[str, Any],
    residual: Tensor,
    y: Tensor,
    *,
    facts: dict[str, Any],
    fingerprints: dict[str, str],
    budget_bytes: float,
) -> CodecPack:
    """Rounds the parts, measures them on held-out tokens and makes the pack.

    Args:
        tensors, settings: the predictor's, as stored.
        y: held-out KV [n, D]; residual: y minus predictions [n, D] by a predictor that has not seen these tokens.
        facts: of the calibration, for the pack's info.
    """
    layout = stream.layout
    c = transform.project(weighting.whiten(residual), transform.num_components)
    order = torch.argsort(c.pow(2).mean(0), descending=True)
    variance = c.pow(2).mean(0)[order]
    layer = None if transform.layer is None else transform.layer[order]
    transform = Transform(transform.kind, transform.basis[order].contiguous(), layer, variance)
    room_bytes = transform_bytes(layout, tensors, budget_bytes, transform.kind)
    completed = fallback_bytes(layout) <= FALLBACK_SHARE * room_bytes
    if completed:
        room_bytes -= fallback_bytes(layout)
    row_bits = allocate_bits(variance.tolist(), transform.basis.shape[1], room_bytes, FINEST_STEP)
    transform = transform.first(len(row_bits))
    pack = CodecPack.build(
        layout,
        weighting,
        transform,
        EntropyModel.laplace(),
        predictor=tensors,
        predictor_settings=settings,
        fingerprints=fingerprints,
        row_bits=row_bits,
    )
    zero, cut = torch.zeros_like(residual), 3 * len(residual) // 4
    if completed:
        z = weighting.whiten(residual)[:cut]
        rows = pack.transform.to(z.device)
        fallback, rest = fit_fallback(z - rows.expand(rows.project(z, rows.num_rows), layout.dim), layout.layer_dim)
        pack = pack.with_fallback(fallback, torch.cat([rows.variance, rest]), EntropyModel.laplace())
    c = KvCodec(pack, y.device).components(residual, zero, pack.transform.num_components)[:cut]
    variance = torch.cat([c[:, : pack.transform.num_rows].pow(2).mean(0), pack.transform.variance[pack.transform.num_rows :].to(c.device)])
    order = torch.argsort(variance, descending=True)
    pack = pack.with_model(fit_entropy_model(c[:, order], variance[order]))
    del c
    r2 = explained(y, y - residual, tensors["mu"].to(y.device)).reshape(layout.coded_layers, 2, -1)
    codec = KvCodec(pack, y.device)
    spans = [(r, torch.zeros_like(r)) for r in residual[cut:].split(SPAN_TOKENS)]
    info: dict[str, Any] = facts | {
        "cpu_seconds": round(time.process_time(), 1),
        "held_out_tokens": len(y),
        "predictor": settings["kind"],
        "components": pack.transform.num_rows,
        "fallback_components": pack.transform.num_components - pack.transform.num_rows,
        "rows_by_bits": {b: row_bits.count(b) for b in ROW_BITS},
        "r2_k": float(r2[:, 0].mean()),
        "r2_v": float(r2[:, 1].mean()),
        "r2_k_by_layer": [round(float(x), 4) for x in r2[:, 0].mean(-1)],
        "r2_v_by_layer": [round(float(x), 4) for x in r2[:, 1].mean(-1)],
        "ideal_bits_per_element": {q: codec.ideal_bits(spans, q) / (len(residual) - cut) / layout.full_dim for q in QUALITIES},
        "components_by_quality": {q: codec.num_components(s) for q, s in QUALITIES.items()},
    }
    info["restore"] = stream.restore_cost(_rank_of(tensors, settings), codec.num_components(QUALITIES["balanced"])).as_info()
    return pack.with_info(info)


def curve_figures(
    stream: PairStream,
    pack: CodecPack,
    kinds: Sequence[Sequence[Sequence[int]]],
    features: Tensor,
    residual: Tensor,
    num_tokens: int,
) -> dict[str, Any]:
    """Figures for a pack: its divergence curve, and the bits that each quality's promise costs. Empty where no curve can be measured.

    Args:
        kinds: documents of each kind of text; about num_tokens of their tokens are measured.
        features, residual: raw features [n, F] and residuals [n, D] of held-out tokens.
    """
    curve = measure_divergence(stream, pack, kinds, num_tokens)
    if curve is None:
        return {}
    codec, predictor = KvCodec(pack, residual.device), load_predictor(pack.predictor, pack.predictor_settings, residual.device)
    features, residual = features[-_PROMISE_TOKENS:], residual[-_PROMISE_TOKENS:]
    octaves = predictor.octaves_of_features(features)
    pairs = [(r, torch.zeros_like(r)) for r in residual.split(SPAN_TOKENS)]
    importance, none = token_importance(octaves), [None] * len(pairs)
    factors = none if importance is None else importance.split(SPAN_TOKENS)
    levels = none if octaves is None else levels_of(octaves).split(SPAN_TOKENS)
    own, bits = curve_in(curve, stream.target.dtype), {}
    assert own is not None
    for quality in QUALITIES:
        plan = plan_spans(codec, own, quality, pairs, levels, factors)
        bits[quality] = codec.ideal_bits(pairs, plan.settings, plan.levels) / len(residual) / pack.layout.full_dim
    return {"divergence": curve.as_info(), "promised_bits_per_element": bits}


def quick_pack(
    target: Decoder,
    draft: Decoder | None,
    tokenizer: Any,
    *,
    recomputed_layers: int = 0,
    head_layers: Decoder | None = None,
    fingerprints: dict[str, str] | None = None,
    num_tokens: int = 2048,
    context: int = 256,
    rank: int = 768,
    forward_seconds: float = 60.0,
    log: Log = print,
) -> CodecPack:
    """A pack from a few thousand tokens of the interpreter's own library, fitted in at most about two minutes on two cores.

    Args:
        num_tokens: tokens to use; fewer when `forward_seconds` of forward passes are spent before (never fewer than 4 documents).
        rank: of the predictor.
        log: told about progress and the held-out R2 (documents left out one at a time).
    """
    started = time.monotonic()
    # a few layers spread over the draft say nearly as much as all, with far fewer weights to learn
    depth = draft.config.num_layers if draft is not None else recomputed_layers
    parts_of_depth = (1 / 6, 1 / 2, 5 / 6) if draft is not None else (1 / 2, 1.0)
    taps = tuple(sorted({max(1, round(depth * part)) for part in parts_of_depth})) if depth else ()
    if head_layers is not None:
        taps = (*taps, depth + head_layers.config.num_layers)
    again = (0,) if draft is None else tuple(sorted({0, recomputed_layers}))
    stream = PairStream(target, draft, FeatureSpec(taps, again), recomputed_layers, head_layers)
    layout = stream.layout
    docs, text = documents(library_texts(), tokenizer, num_tokens, context, per_text=1)
    queries, parts, done = QueryStatistics(), [], 0
    for group in stream.batches(docs, 2 * context):
        parts.append(stream.run(group, queries))
        done += sum(map(len, group))
        log(f"quick pack: {done} of {num_tokens} tokens, {time.monotonic() - started:.0f} s")
        if time.monotonic() - started > forward_seconds and len(parts) >= 2:
            break
    features, y = torch.cat([p.features for p in parts]), torch.cat([p.y for p in parts])
    lengths = [n for p in parts for n in p.lengths]
    weighting = queries.weighting(target, layout, block_covariances(y, layout.head_dim))
    fitted = fit_dual(features, y, lengths, rank, weighting.whiten, weighting.unwhiten)
    log(f"quick pack: predictor fitted, {time.monotonic() - started:.0f} s")
    residual = y - fitted.cross_validated
    weighted = weighting.whiten(residual)
    covariances = list(block_covariances(weighted, layout.layer_dim))
    limit = layout.dim
    transform = fit_per_layer(covariances, KEEP_FACTOR * FINEST_STEP, limit, num_tokens=len(y))
    log(f"quick pack: {transform.num_components} components, {time.monotonic() - started:.0f} s")
    fit = fitted.fit
    tensors, settings = Predictor.pack(stream.spec, stream.draft_size, fit.down, fit.offset, fit.up, fit.mu)
    pack = assemble(
        stream,
        weighting,
        transform,
        tensors,
        settings | {"kind": "low_rank"},
        residual,
        y,
        facts={"ridge": fit.ridge, "tokens": done, "rank": len(fit.up)},
        fingerprints=(fingerprints or {}) | {"text": text},
        budget_bytes=PACK_BUDGET * bf16_bytes(target),
    )
    log(f"quick pack: packed, its loss is measured, {time.monotonic() - started:.0f} s")
    pack = pack.with_info(curve_figures(stream, pack, [docs], features, residual, _QUICK_CURVE_TOKENS))
    info = pack.info
    log(
        f"quick pack: {done} tokens, {time.monotonic() - started:.0f} s, {pack.nbytes / 1e6:.1f} MB, "
        f"held-out R2 of keys {info['r2_k']:.2f}, of values {info['r2_v']:.2f}"
    )
    return pack


__all__ = ["CalibrationOptions", "assemble", "calibrate", "default_recomputed_layers", "feature_spec", "quick_pack"]
