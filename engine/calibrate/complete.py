"""Giving a pack a fallback basis, where it has none, and a divergence curve; its predictor, rows and entropy tables are left as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import torch

from codec.pack import CodecPack
from codec.predictor.dense import load_predictor
from codec.transform import fit_fallback
from engine.calibrate.recipe import curve_figures, predict_raw
from engine.calibrate.stream import PairStream
from engine.errors import InvalidOption
from engine.model.decoder import Decoder


@torch.inference_mode()
def complete(
    target: Decoder,
    draft: Decoder | None,
    pack: CodecPack,
    docs: Sequence[Sequence[int]],
    *,
    head_layers: Decoder | None = None,
    curve_kinds: Sequence[Sequence[Sequence[int]]] | None = None,
    curve_tokens: int = 4096,
    tokens_per_batch: int = 2048,
    log: Callable[[str], None] = print,
) -> CodecPack:
    """The pack with what `codec.fidelity` needs to keep a quality's promise. One that has a basis keeps its digest, and the files that it coded.

    Args:
        docs: token documents that the fallback basis is fitted to, and whose bits at each quality are stated; a few thousand tokens suffice, better of
            kinds the pack was not made for.
        curve_kinds: documents of each kind of text, of which about curve_tokens are measured for the curve (None: docs, as of one kind).

    Raises:
        InvalidOption: the texts are too short to measure a curve on.
    """
    predictor = load_predictor(pack.predictor, pack.predictor_settings, target.device)
    stream = PairStream(target, draft, predictor.spec, pack.layout.first_layer, head_layers)
    groups = stream.batches(docs, tokens_per_batch)
    batches = [stream.run(group) for group in (groups if pack.transform.fallback is None else islice(groups, 1))]
    features = torch.cat([batch.features for batch in batches])
    residual = torch.cat([batch.y for batch in batches]) - predict_raw(predictor, features)
    del batches
    log(f"completing: {len(residual):,} tokens")
    rows = pack.transform.to(target.device)
    made = pack
    if rows.fallback is None:
        z = pack.weighting.to(target.device).whiten(residual)
        fallback, variance = fit_fallback(z - rows.expand(rows.project(z, rows.num_rows), z.shape[1]), pack.layout.layer_dim)
        del z
        made = pack.with_fallback(fallback, torch.cat([rows.variance, variance]), pack.model)
        log("completing: fallback basis fitted")
    had_basis = made is pack
    if not had_basis:
        made = made.with_info({"fallback_components": pack.layout.dim, "divergence": None})  # a curve of before would be of the rows alone
    kinds = [docs] if curve_kinds is None else curve_kinds
    figures = curve_figures(stream, made, kinds, features, residual, curve_tokens)
    if not figures:
        raise InvalidOption("no divergence curve can be measured on these texts", "give more and longer --curve-text")
    figures["restore"] = stream.restore_cost(predictor.rank if "up" in pack.predictor else None, rows.num_rows).as_info()
    return made.with_later(figures) if had_basis else made.with_info(figures)
