"""Running text through target and draft for calibration: features, true KV and query statistics of the same tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from codec.predictor.features import FeatureSpec, join_features
from codec.spec import NUM_SINKS, KvLayout
from codec.weighting import Weighting, attention_weighting, normalised, unit_weighting
from engine.calibrate.restore_cost import RestoreCost, predictor_multiplies, restore_cost
from engine.model.decoder import Decoder
from engine.model.layers import DecoderLayer


@dataclass
class CalibrationBatch:
    """features float32 [n, F] (rms-normalised), y float32 [n, D]; lengths: tokens of each document among the n."""

    features: Tensor
    y: Tensor
    lengths: list[int]


class PairStream:
    """A target with its predictor's source: a separate draft model, or the target's own first layers.

    Args:
        target: the target.
        draft: the draft model, or None for an early exit.
        spec: features; for an early exit the taps are the target's own layers up to `recomputed_layers`, and beyond it the draft head's.
        recomputed_layers: m, first layers of the target, which a resume recomputes and which are not coded: those of an early exit, or of
            `spec.target_taps`.
        head_layers: the layers of a draft head, which go on from its states.
    """

    def __init__(
        self, target: Decoder, draft: Decoder | None, spec: FeatureSpec, recomputed_layers: int = 0, head_layers: Decoder | None = None
    ) -> None:
        self.target, self.draft, self.spec, self.head_layers = target, draft, spec, head_layers
        c = target.config
        self.layout = KvLayout(c.num_layers, c.num_kv_heads, c.head_dim, recomputed_layers)
        self.draft_size = (draft or target).config.hidden_size
        self.num_features = spec.num_features(self.draft_size, c.hidden_size)

    def restore_cost(self, rank: int | None, components: int = 0) -> RestoreCost:
        """Of these features with a predictor of that rank (None: dense) and so many components of the transform."""
        return restore_cost(
            self.target.config,
            self.spec,
            self.layout.first_layer,
            draft=None if self.draft is None else self.draft.config,
            head=None if self.head_layers is None else self.head_layers.config,
            predictor_multiplies=predictor_multiplies(self.num_features, self.layout.dim, rank),
            components=components,
        )

    @torch.no_grad()
    def run(self, documents: Sequence[Sequence[int]], queries: QueryStatistics | None = None) -> CalibrationBatch:
        """One batch of documents; each one's first NUM_SINKS tokens are left out of what is returned."""
        target, lens = self.target, [len(d) for d in documents]
        ids = torch.tensor([t for d in documents for t in d], device=target.device)
        kept = torch.cat([torch.arange(n) >= NUM_SINKS for n in lens]).to(target.device)
        spec = self.spec
        recomputed = self.layout.first_layer
        own_taps = tuple(tap - recomputed for tap in spec.taps if tap > recomputed) if self.head_layers is not None else ()
        taps = tuple(
            sorted({*spec.target_taps, *(min(tap, recomputed) if own_taps else tap for tap in (spec.taps if self.draft is None else ()))})
        )
        pages = sum(-(-n // 64) for n in lens)
        pool = target.new_pool(pages)
        sequences = [pool.new_sequence(n) for n in lens]
        observe = None if queries is None else queries.observer(target, kept, max(lens))
        out = target.forward(ids, sequences, lens, taps=taps, logits="none", observe=observe)
        first = self.layout.first_layer
        y = torch.cat([target.read_kv(s, NUM_SINKS, n, first_layer=first) for s, n in zip(sequences, lens, strict=True)])
        del pool, sequences
        target_rows = torch.stack([out.taps[i][kept] for i in spec.target_taps], 1) if spec.target_taps else None
        if self.draft is not None and spec.taps:
            pool = self.draft.new_pool(pages)
            clipped = ids.clamp_max(self.draft.config.vocab_size - 1)
            out = self.draft.forward(
                clipped, [pool.new_sequence(n) for n in lens], lens, taps=spec.taps, logits="none", last_layer=max(1, *spec.taps)
            )
        states = dict(out.taps)
        if own_taps and self.head_layers is not None:
            pool = self.head_layers.new_pool(pages)
            more = self.head_layers.forward(
                None, [pool.new_sequence(n) for n in lens], lens, hidden=out.taps[recomputed], taps=own_taps, logits="none"
            ).taps
            states |= {recomputed + i: rows for i, rows in more.items()}
        rows = torch.stack([states[i][kept] for i in spec.taps], 1) if spec.taps else None
        return CalibrationBatch(join_features(rows, target_rows), y, [n - NUM_SINKS for n in lens])

    def batches(self, documents: Sequence[Sequence[int]], tokens_per_batch: int) -> Iterator[list[Sequence[int]]]:
        """Documents long enough to keep a token, grouped into batches of about the given size."""
        group: list[Sequence[int]] = []
        for document in documents:
            if len(document) <= NUM_SINKS:
                continue
            group.append(document)
            if sum(map(len, group)) >= tokens_per_batch:
                yield group
                group = []
        if group:
            yield group


@dataclass
class QueryStatistics:
    """E[q q^T] of queries turned into the frame of a key stored without RoPE, and the residual stream's energy, per layer.

    A key at position j meets a query at position i as (R_(i-j) q) . k, so queries are turned on by a distance, drawn log-uniformly up to the
    context: a key meets queries at many distances.
    """

    tokens_wanted: int = 16_384
    stride: int = 4
    moments: dict[int, Tensor] = field(default_factory=dict)  # layer -> sum [H, d, d]
    energies: dict[int, Tensor] = field(default_factory=dict)  # layer -> sum of squares
    counts: dict[int, int] = field(default_factory=dict)
    tokens: int = 0

    @property
    def complete(self) -> bool:
        return self.tokens >= self.tokens_wanted

    def observer(self, target: Decoder, kept: Tensor, context: int):
        """An `observe` callback for one forward whose rows `kept` bool [N] count."""
        chosen = kept.nonzero()[:, 0][:: self.stride]
        generator = torch.Generator().manual_seed(self.tokens)
        drawn = torch.rand(len(chosen), generator=generator)
        angles: dict[tuple[bool, int | None], tuple[Tensor, Tensor]] = {}
        for shape in target.layer_shapes:
            if (shape.local_rope, shape.window) not in angles:
                farthest = context if shape.window is None else min(context, shape.window)
                distance = torch.exp(drawn * math.log(max(farthest, 2))).long().to(target.device)
                table = target.rope_table(local=shape.local_rope)
                cos, sin = table.slice(0, context + 1)
                angles[shape.local_rope, shape.window] = cos[distance] * table.attention_factor, sin[distance] * table.attention_factor
        self.tokens += int(kept.sum())

        def observe(layer: int, q: Tensor, stream: Tensor) -> None:
            shape = target.layer_shapes[layer]
            turned = rotate_heads(q[chosen].float(), *angles[shape.local_rope, shape.window]).transpose(0, 1)  # [H, n, d]
            moment = turned.transpose(1, 2) @ turned
            energy = stream[chosen].float().pow(2).sum()
            self.moments[layer] = self.moments[layer] + moment if layer in self.moments else moment
            self.energies[layer] = self.energies[layer] + energy if layer in self.energies else energy
            self.counts[layer] = self.counts.get(layer, 0) + len(chosen)

        return observe

    def weighting(self, target: Decoder, layout: KvLayout, block_covariance: Tensor) -> Weighting:
        """Attention weights of the coded layers, scaled to a weighted KV of unit mean variance.

        block_covariance: float32 [blocks, d, d], the diagonal blocks of the KV's covariance.
        """
        layers = range(layout.first_layer, layout.num_layers)
        moments = torch.stack([self.moments[i] / self.counts[i] for i in layers])
        energy = torch.stack([self.energies[i] / self.counts[i] for i in layers])
        per_layer = block_covariance.reshape(layout.coded_layers, 2, layout.num_kv_heads, layout.head_dim, layout.head_dim)
        outputs = [cast(DecoderLayer, target.layers[i]).o_proj.weight for i in layers]
        return normalised(attention_weighting(layout, outputs, moments, per_layer[:, 1], energy), block_covariance)


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [n, H, d] float32 turned by the angles of cos, sin [n, d/2]."""
    a, b = x.chunk(2, -1)
    c, s = cos[:, None], sin[:, None]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def unit_weights(layout: KvLayout, block_covariance: Tensor) -> Weighting:
    """Per-channel-group scale instead of the attention metric."""
    variance = block_covariance.diagonal(dim1=-2, dim2=-1).reshape(-1)
    return normalised(unit_weighting(layout, variance), block_covariance)


def diagonal_blocks(covariance: Tensor, size: int) -> Tensor:
    """[D / size, size, size] diagonal blocks of covariance [D, D]."""
    n = len(covariance) // size
    return torch.stack([covariance[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(n)])


def block_covariances(rows: Tensor, size: int) -> Tensor:
    """Covariance of each run of `size` columns of rows [n, D], float32 [D / size, size, size]."""
    x = (rows - rows.mean(0)).reshape(len(rows), -1, size).transpose(0, 1)
    return x.transpose(1, 2) @ x / len(rows)
