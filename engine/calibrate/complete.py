"""Giving a pack that has none a fallback basis and a divergence curve, its predictor, rows and entropy tables left as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from codec.pack import CodecPack
from codec.predictor.dense import load_predictor
from codec.transform import fit_fallback
from engine.calibrate.recipe import predict_raw, with_curve
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
    curve_docs: Sequence[Sequence[int]] | None = None,
    curve_tokens: int = 4096,
    tokens_per_batch: int = 2048,
    log: Callable[[str], None] = print,
) -> CodecPack:
    """The pack with what `codec.fidelity` needs to keep a quality's promise.

    Args:
        docs: token documents that the fallback basis is fitted to; a few thousand tokens suffice, better of kinds the pack was not made for.
        curve_docs: documents of which about curve_tokens are measured for the curve (None: docs).

    Raises:
        InvalidOption: the pack has a fallback basis already, or the texts are too short to measure a curve on.
    """
    if pack.transform.fallback is not None:
        raise InvalidOption("the pack has a fallback basis already", "calibrate a new one instead")
    predictor = load_predictor(pack.predictor, pack.predictor_settings, target.device)
    stream = PairStream(target, draft, predictor.spec, pack.layout.first_layer, head_layers)
    batches = [stream.run(group) for group in stream.batches(docs, tokens_per_batch)]
    features = torch.cat([batch.features for batch in batches])
    residual = torch.cat([batch.y for batch in batches]) - predict_raw(predictor, features)
    del batches
    log(f"completing: {len(residual):,} tokens")
    rows = pack.transform.to(target.device)
    z = pack.weighting.to(target.device).whiten(residual)
    fallback, variance = fit_fallback(z - rows.expand(rows.project(z, rows.num_rows), z.shape[1]), pack.layout.layer_dim)
    del z
    made = pack.with_fallback(fallback, torch.cat([rows.variance, variance]), pack.model)
    made = made.with_info({"fallback_components": pack.layout.dim, "divergence": None})  # a curve of before would be of the rows alone
    log("completing: fallback basis fitted")
    made = with_curve(stream, made, docs if curve_docs is None else curve_docs, features, residual, curve_tokens)
    if made.curve is None:
        raise InvalidOption("no divergence curve can be measured on these texts", "give more and longer --curve-text")
    return made.with_info({"restore": stream.restore_cost(predictor.rank if "up" in pack.predictor else None, rows.num_rows).as_info()})
