"""What restoring a token from coded spans costs in arithmetic, and what the target's own pass over it costs.

Counted are the products with weights, two operations a multiply-add. Attention is left out: it grows with the context, and faster in the target, so
that a restore's share falls with length.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from codec.predictor.features import FeatureSpec
from engine.model.config import DecoderConfig

DEFAULT_BUDGET = 0.25
"""Share of the target's prefill that the passes and the predictor of a restore may take."""


def layer_flops(config: DecoderConfig) -> int:
    """Operations a token in one layer's products."""
    width = config.num_heads * config.head_dim
    attention = config.hidden_size * (2 * width + config.kv_width)
    return 2 * (attention + 3 * config.hidden_size * config.intermediate_size)


def draft_layers_run(taps: tuple[int, ...], num_layers: int) -> int:
    """Layers of a separate draft that a restore runs for a predictor with these taps: those up to the deepest tap where they are at most half of the
    draft, whose cache then catches up when it is first asked for drafts; else all, and the draft's cache is ready."""
    deepest = max(taps, default=0)
    return deepest if 2 * deepest <= num_layers else num_layers


@dataclass(frozen=True)
class PassTimes:
    """Seconds of one operation a token, measured over a document of `tokens` tokens: in the target's whole pass (products at a restore are counted with
    it), in its first layers, and in the draft's layers (None: no separate draft)."""

    tokens: int
    prefill_s: float
    target_s: float
    draft_s: float | None


@dataclass(frozen=True)
class RestoreCost:
    """Operations a token: of the draft's and the target's layers, of the predictor's and the transform's products (at `balanced`), and of the target's
    prefill, all layers and no head."""

    draft_flops: int
    target_flops: int
    predictor_flops: int
    transform_flops: int
    prefill_flops: int

    @property
    def restore_flops(self) -> int:
        """All of a restore."""
        return self.draft_flops + self.target_flops + self.predictor_flops + self.transform_flops

    @property
    def budget_share(self) -> float:
        """Passes and predictor over the target's prefill: what a restore budget bounds. The transform's product comes on top."""
        return (self.restore_flops - self.transform_flops) / self.prefill_flops

    def time_share(self, times: PassTimes) -> float:
        """The same in seconds of this machine."""
        passes = self.draft_flops * (times.draft_s or times.target_s) + self.target_flops * times.target_s
        return (passes + self.predictor_flops * times.prefill_s) / (self.prefill_flops * times.prefill_s)

    def as_info(self) -> dict[str, Any]:
        """For a pack's figures."""
        return asdict(self) | {"restore_flops": self.restore_flops, "share_of_prefill": round(self.restore_flops / self.prefill_flops, 4)}


def restore_cost(
    target: DecoderConfig,
    spec: FeatureSpec,
    exit_layer: int,
    *,
    draft: DecoderConfig | None = None,
    head: DecoderConfig | None = None,
    predictor_multiplies: int,
    components: int = 0,
) -> RestoreCost:
    """The cost of a predictor for a target.

    Args:
        spec: its features. exit_layer: the target's layers that are recomputed.
        draft: a separate draft model. head: the layers of a draft head, which run only where the predictor looks at their states.
        predictor_multiplies: multiply-adds a token. components: of the transform, each of which reaches every coded element.
    """
    draft_flops = 0 if draft is None else draft_layers_run(spec.taps, draft.num_layers) * layer_flops(draft)
    if head is not None and max(spec.taps, default=0) > exit_layer:
        draft_flops += head.num_layers * layer_flops(head)
    coded = (target.num_layers - exit_layer) * target.kv_width
    return RestoreCost(
        draft_flops,
        max(exit_layer, spec.recomputed_layers) * layer_flops(target),
        2 * predictor_multiplies,
        2 * components * coded,
        target.num_layers * layer_flops(target),
    )


def predictor_multiplies(num_features: int, dim: int, rank: int | None) -> int:
    """Multiply-adds a token: of one product [F, D], or of a product of rank r as its two factors run."""
    return num_features * dim if rank is None else rank * (num_features + dim)
