"""What is coded: the layout of a token's KV vector, the qualities, and the constants both sides of the format share.

Axes: T tokens, L layers, G KV heads, d head size, D = coded layers * 2 * G * d, K kept components, r rank of the predictor.
A token's KV vector holds pre-RoPE keys and values in (layer, K|V, KV head, channel) order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from codec.errors import BadInput, UnknownQuality

QUALITIES: dict[str, float] = {"near-lossless": 0.6, "balanced": 1.0, "compact": 1.4, "tiny": 2.0}
"""Quantiser step of each quality, in units of the weighted KV's root mean variance (steps of different pairs are comparable)."""

QUALITY_DIVERGENCE: dict[str, float] = {"near-lossless": 0.005, "balanced": 0.01, "compact": 0.015, "tiny": 0.025}
"""What each quality promises where a pack states its divergence curve: mean KL of the target's output, nats a position. The steps above are then only
where the search for each span's own begins."""

NUM_SINKS = 4
"""The first tokens of a sequence are attention sinks: left out of the fit, never coded with loss."""

SPAN_TOKENS = 64
"""A session is coded in spans of at most this many tokens."""

KEEP_FACTOR = 0.25
"""A component is kept while its standard deviation is above KEEP_FACTOR * step."""

MAX_SPAN_TOKENS = 4096


_BY_DIVERGENCE = "kl"


def step_of(quality: str) -> float:
    """Quantiser step of a named quality, or about that of a promise of "klX"; UnknownQuality lists the names."""
    if quality in QUALITIES:
        return QUALITIES[quality]
    if (promise := divergence_of(quality)) is not None:
        return QUALITIES["near-lossless"] * min(1.0, (promise / QUALITY_DIVERGENCE["near-lossless"]) ** 0.5)
    raise UnknownQuality(f"unknown quality {quality!r}", f"choose one of {', '.join(QUALITIES)}")


def divergence_of(quality: str | float) -> float | None:
    """What a quality promises, in nats a position: of a name, or X of "klX"; None of a step, and of what is neither."""
    if not isinstance(quality, str) or quality in QUALITY_DIVERGENCE:
        return QUALITY_DIVERGENCE.get(quality) if isinstance(quality, str) else None
    try:
        promise = float(quality.removeprefix(_BY_DIVERGENCE)) if quality.startswith(_BY_DIVERGENCE) else 0.0
    except ValueError:
        return None
    return promise if 0 < promise < math.inf else None


@dataclass(frozen=True)
class KvLayout:
    """Shape of the KV cache of one target, and which of its layers are coded.

    Args:
        num_layers: L, all layers of the target.
        num_kv_heads: G.
        head_dim: d.
        first_layer: layers below it are not coded (an early exit recomputes them exactly).
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    first_layer: int = 0

    def __post_init__(self) -> None:
        if min(self.num_layers, self.num_kv_heads, self.head_dim) < 1 or not 0 <= self.first_layer < self.num_layers:
            raise BadInput(f"impossible KV layout {self}", "take it from the target's configuration")

    @property
    def coded_layers(self) -> int:
        return self.num_layers - self.first_layer

    @property
    def layer_dim(self) -> int:
        """Elements of one layer: 2 * G * d."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def dim(self) -> int:
        """D: coded elements of a token."""
        return self.coded_layers * self.layer_dim

    @property
    def full_dim(self) -> int:
        """D_all: all elements of a token, the denominator of bits per element."""
        return self.num_layers * self.layer_dim

    @property
    def num_blocks(self) -> int:
        """Blocks of d channels in D, in (layer, K|V, head) order."""
        return self.dim // self.head_dim

    def as_dict(self) -> dict[str, int]:
        return {
            "num_layers": self.num_layers,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "first_layer": self.first_layer,
        }
