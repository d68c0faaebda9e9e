"""From text to a codec pack: predictor, weights, transform and entropy tables of one (target, draft) pair.

Two recipes of the same steps. `calibrate` makes the full pack in one streaming pass over any amount of text (memory does not grow with it).
`quick_pack` makes do with a few thousand tokens of the interpreter's own library: dual ridge cross-validated by document, a transform per layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codec.calibrate_tables import fit_entropy_model
from codec.codec import KvCodec
from codec.pack import CodecPack
from codec.rate import EntropyModel
from codec.spec import KEEP_FACTOR, QUALITIES, SPAN_TOKENS, KvLayout
from codec.transform import Transform, fit_global, fit_per_layer
from codec.weighting import Weighting, apply_blocks, both_sides
from draft.features import FeatureSpec
from draft.fit import LinearFit, RidgeMoments, explained, fit_dual
from draft.predictor import Predictor
from engine.calibration_stream import PairStream, QueryStatistics, block_covariances, diagonal_blocks, unit_weights
from engine.calibration_text import documents, library_texts
from engine.decoder import Decoder
from engine.errors import InvalidOption

Log = Callable[[str], None]
FINEST_STEP = min(QUALITIES.values())
PACK_BUDGET = 0.08
"""A pack may take this fraction of the target's bytes."""

FIXED_BYTES = 500_000
"""Entropy tables, scales and header of a pack."""

MAX_RANK = 4096
"""More rank saves next to nothing."""


@dataclass(frozen=True)
class CalibrationOptions:
    """Choices of a full calibration.

    taps: draft layers used as features (None: every layer of a separate draft; of a trunk, every second layer up to its last). rank: of the
    predictor (None: chosen from the budget). weighting: "attention" or "unit". transform: "global" or "per_layer". context: tokens a document.
    held_out_tokens: kept apart for tables and reported figures. budget: fraction of the target's bytes the pack may take.
    """

    taps: tuple[int, ...] | None = None
    rank: int | None = None
    weighting: str = "attention"
    transform: str = "global"
    context: int = 1024
    tokens_per_batch: int = 8192
    held_out_tokens: int = 6144
    budget: float = PACK_BUDGET


def feature_spec(draft: Decoder | None, trunk_layers: int, taps: tuple[int, ...] | None = None) -> FeatureSpec:
    """Default features: all hidden states of a separate draft but its embeddings' and last; of a trunk, every second layer up to its last."""
    if taps is not None:
        return FeatureSpec(taps)
    if draft is not None:
        return FeatureSpec(tuple(range(draft.config.num_layers)))
    return FeatureSpec(tuple(range(trunk_layers, 0, -2))[::-1])


def calibrate(target: Decoder, draft: Decoder | None, docs: Sequence[Sequence[int]], *, trunk_layers: int = 0,
              options: CalibrationOptions | None = None, fingerprints: dict[str, str] | None = None, log: Log = print) -> CodecPack:  # fmt: skip
    """A codec pack from token documents, in one pass.

    Args:
        target, draft: the pair; draft None means that the target's first `trunk_layers` layers predict the others.
        docs: token documents (`engine.calibration_text.documents`); every eighth is held out until there are enough.
        fingerprints: role -> digest, stored in the pack.
        log: told about progress.
    """
    options = options or CalibrationOptions()
    if options.weighting not in ("attention", "unit") or options.transform not in ("global", "per_layer"):
        raise InvalidOption(f"calibration with {options.weighting} weights and a {options.transform} transform", "see CalibrationOptions")
    torch.backends.cuda.matmul.allow_tf32 = False
    stream = PairStream(target, draft, feature_spec(draft, trunk_layers, options.taps), trunk_layers)
    layout, device = stream.layout, target.device
    held, rest = _hold_out(docs, options.held_out_tokens)
    moments, queries = RidgeMoments(stream.num_features, layout.dim, device), QueryStatistics()
    started, done, total = time.monotonic(), 0, sum(map(len, rest))
    for group in stream.batches(rest, options.tokens_per_batch):
        batch = stream.run(group, None if queries.complete else queries)
        moments.add(batch.features, batch.y)
        done += sum(map(len, group))
        log(f"calibration: {done:,} of {total:,} tokens, {time.monotonic() - started:.0f} s")
    kept = [stream.run(group) for group in stream.batches(held, options.tokens_per_batch)]
    features, y = torch.cat([b.features for b in kept]), torch.cat([b.y for b in kept])
    m = moments.finish()
    blocks = diagonal_blocks(m.yy, layout.head_dim)
    weighting = queries.weighting(target, layout, blocks) if options.weighting == "attention" else unit_weights(layout, blocks)
    budget_bytes = options.budget * bf16_bytes(target)
    rank = options.rank or default_rank(stream.num_features, layout, budget_bytes)
    ridge = m.choose_ridge(features, y)
    fit = m.fit(ridge, rank, lambda x: apply_blocks(x, weighting.root), lambda x: apply_blocks(x, weighting.inverse))
    log(f"calibration: predictor fitted, ridge {ridge:g}, rank {len(fit.up)}, {time.monotonic() - started:.0f} s")
    residual = m.residual_covariance(fit)
    limit = max_components(layout, fit, options.transform, budget_bytes)
    threshold = KEEP_FACTOR * FINEST_STEP
    if options.transform == "global":
        transform = fit_global(both_sides(residual, weighting.root), threshold, limit)
    else:
        sizes = both_sides(residual, weighting.root)
        transform = fit_per_layer(list(diagonal_blocks(sizes, layout.layer_dim)), threshold, limit)
    del m, moments, residual
    log(f"calibration: {transform.num_components} components, {time.monotonic() - started:.0f} s")
    pack = assemble(stream, weighting, transform, fit, features, y, tokens=done, fingerprints=fingerprints or {},
                    budget_bytes=budget_bytes)  # fmt: skip
    log(f"calibration: done, {time.monotonic() - started:.0f} s")
    return pack


def bf16_bytes(target: Decoder) -> int:
    """Size of the target's weights in 16 bits, whatever they are loaded in: a pack's size must not depend on that."""
    return 2 * target.weight_bytes // target.dtype.itemsize


def _hold_out(docs: Sequence[Sequence[int]], tokens: int) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    held: list[Sequence[int]] = []
    rest: list[Sequence[int]] = []
    for n, document in enumerate(docs):
        (held if n % 8 == 3 and sum(map(len, held)) < tokens else rest).append(document)
    if not held:
        held, rest = list(docs[-1:]), list(docs[:-1])
    return held, rest


def default_rank(num_features: int, layout: KvLayout, budget_bytes: float) -> int:
    """The rank whose two 8-bit factors fit beside a transform of D / 4 rows, two thirds of a byte a number, and the weights."""
    dim = layout.dim
    room = budget_bytes - dim * dim / 6 - 2 * dim * layout.head_dim - FIXED_BYTES
    return int(max(16, min(num_features, dim, MAX_RANK, room / (num_features + dim))))


def max_components(layout: KvLayout, fit: LinearFit, transform: str, budget_bytes: float) -> int:
    """Most transform rows that fit the budget beside the predictor and the weights, if all but the first third take 4 bits."""
    width = layout.dim if transform == "global" else layout.layer_dim
    spent = fit.down.numel() + fit.up.numel() + 8 * (fit.down.shape[0] + layout.dim) + 2 * layout.dim * layout.head_dim + FIXED_BYTES
    return max(8, min(int((budget_bytes - spent) / (width * 2 / 3)), layout.dim * 3 // 5))


def assemble(stream: PairStream, weighting: Weighting, transform: Transform, fit: LinearFit, features: Tensor, y: Tensor, *,
             tokens: int, fingerprints: dict[str, str], budget_bytes: float, residual: Tensor | None = None) -> CodecPack:  # fmt: skip
    """Rounds the parts, measures them on held-out tokens and makes the pack.

    Args:
        features, y: held-out features [n, F] and KV [n, D].
        residual: y minus cross-validated predictions [n, D], where the held-out tokens took part in the fit (dual form); None otherwise.
    """
    layout, spec = stream.layout, stream.spec
    tensors, settings = Predictor.pack(spec, stream.draft_size, fit.down, fit.offset, fit.up, fit.mu)
    if residual is None:
        rounded = Predictor.from_pack(tensors, settings, y.device)
        residual = y - (rounded.mu + (features @ rounded.down + rounded.offset) @ rounded.up)
    c = transform.project(apply_blocks(residual, weighting.root), transform.num_components)
    order = torch.argsort(c.pow(2).mean(0), descending=True)
    variance = c.pow(2).mean(0)[order]
    layer = None if transform.layer is None else transform.layer[order]
    transform = Transform(transform.kind, transform.basis[order].contiguous(), layer, variance)
    spent = sum(t.numel() * t.element_size() for t in tensors.values()) + 2 * weighting.root.numel() + FIXED_BYTES
    coarse = coarse_rows(transform, budget_bytes - spent)
    pack = CodecPack.build(layout, weighting, transform, EntropyModel.laplace(), predictor=tensors, predictor_settings=settings,
                           fingerprints=fingerprints, coarse_from=coarse)  # fmt: skip
    zero = torch.zeros_like(residual)
    c = KvCodec(pack, y.device).components(residual, zero, pack.transform.num_components)
    cut = 3 * len(c) // 4
    pack = pack.with_model(fit_entropy_model(c[:cut], c[:cut].pow(2).mean(0)))
    r2 = explained(y, y - residual, fit.mu.to(y.device)).reshape(layout.coded_layers, 2, -1)
    codec = KvCodec(pack, y.device)
    spans = [(r, torch.zeros_like(r)) for r in residual[cut:].split(SPAN_TOKENS)]
    info: dict[str, Any] = {
        "cpu_seconds": round(time.process_time(), 1), "tokens": tokens, "held_out_tokens": len(y), "rank": len(fit.up), "ridge": fit.ridge, "features": len(fit.down),
        "components": pack.transform.num_components, "coarse_from": coarse, "r2_k": float(r2[:, 0].mean()), "r2_v": float(r2[:, 1].mean()),
        "r2_k_by_layer": [round(float(x), 4) for x in r2[:, 0].mean(-1)], "r2_v_by_layer": [round(float(x), 4) for x in r2[:, 1].mean(-1)],
        "ideal_bits_per_element": {q: codec.ideal_bits(spans, q) / (len(residual) - cut) / layout.full_dim for q in QUALITIES},
        "components_by_quality": {q: codec.num_components(s) for q, s in QUALITIES.items()},
    }  # fmt: skip
    return CodecPack(pack.layout, pack.kind, pack.stored, pack.predictor, pack.predictor_settings, pack.fingerprints, info)


def coarse_rows(transform: Transform, room_bytes: float) -> int:
    """First transform row to be stored in 4 bits instead of 8: as late as the room allows, never before the first third."""
    count, width = transform.basis.shape
    fine = int((room_bytes - count * width / 2) / (width / 2))
    return max(count // 3, min(count, fine))


def quick_pack(target: Decoder, draft: Decoder | None, tokenizer: Any, *, trunk_layers: int = 0, fingerprints: dict[str, str] | None = None,
               num_tokens: int = 2048, context: int = 256, rank: int = 768, forward_seconds: float = 60.0, log: Log = print) -> CodecPack:  # fmt: skip
    """A pack from a few thousand tokens of the interpreter's own library, fitted in at most about two minutes on two cores.

    Args:
        num_tokens: tokens to use; fewer when `forward_seconds` of forward passes are spent before (never fewer than 4 documents).
        rank: of the predictor.
        log: told about progress and the held-out R2 (documents left out one at a time).
    """
    started = time.monotonic()
    # a few layers spread over the draft say nearly as much as all, with far fewer weights to learn
    depth = draft.config.num_layers if draft is not None else trunk_layers
    parts_of_depth = (1 / 6, 1 / 2, 5 / 6) if draft is not None else (1 / 2, 1.0)
    taps = tuple(sorted({max(1, round(depth * part)) for part in parts_of_depth})) if depth else ()
    stream = PairStream(target, draft, FeatureSpec(taps), trunk_layers)
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
    fitted = fit_dual(features, y, lengths, rank, lambda x: apply_blocks(x, weighting.root), lambda x: apply_blocks(x, weighting.inverse))
    residual = y - fitted.cross_validated
    weighted = apply_blocks(residual, weighting.root)
    covariances = list(block_covariances(weighted, layout.layer_dim))
    limit = layout.dim
    transform = fit_per_layer(covariances, KEEP_FACTOR * FINEST_STEP, limit, num_tokens=len(y))
    pack = assemble(stream, weighting, transform, fitted.fit, features, y, tokens=done, residual=residual,
                    fingerprints=(fingerprints or {}) | {"text": text}, budget_bytes=PACK_BUDGET * bf16_bytes(target))  # fmt: skip
    info = pack.info
    log(f"quick pack: {done} tokens, {time.monotonic() - started:.0f} s, {pack.nbytes / 1e6:.1f} MB, "
        f"held-out R2 of keys {info['r2_k']:.2f}, of values {info['r2_v']:.2f}")  # fmt: skip
    return pack


__all__ = ["CalibrationOptions", "assemble", "calibrate", "coarse_rows", "feature_spec", "quick_pack"]
