"""Rotary position embedding: reading a model's RoPE options and making the table of angles.

Scalings: none, linear (kaiokendev, 2023), llama3 (Llama 3.1 release), YaRN (Peng et al., 2023, arXiv 2309.00071).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from engine.errors import ModelNotFound, UnsupportedArchitecture
from engine.inputs import Fields, shown

SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")
_THETA = (1.0 + 1e-6, 1e15)  # yarn divides by its logarithm
_FACTOR = (1e-3, 1e6)
_MAX_CONTEXT = 1 << 31
_BAD_OPTION = "correct config.json, or download the model again"


@dataclass(frozen=True)
class RopeConfig:
    """RoPE options of a model, as plain numbers; a field is used only by the kinds named beside it."""

    kind: str  # one of SUPPORTED_ROPE
    theta: float
    factor: float = 1.0  # linear, llama3, yarn: how much longer the context becomes
    original_context: int = 0  # llama3, yarn: context of the pretraining, tokens
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole channels
    attention_factor: float = 1.0  # yarn: factor of cos and sin

    @classmethod
    def from_hf(cls, config: Any, layer_type: str | None = None, theta: float = 10_000.0) -> RopeConfig:
        """Read a transformers config: `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before).

        layer_type: read the options that `rope_parameters` has for layers of this type. theta: the base where none is given.

        Raises:
            UnsupportedArchitecture: a kind outside SUPPORTED_ROPE, partial rotation, or an option of the kind is missing.
            ModelNotFound: an option of another type, or out of all bounds.
        """
        names = ("rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor", "max_position_embeddings")
        outer = Fields({name: getattr(config, name, None) for name in names}, "config.json", ModelNotFound, _BAD_OPTION)
        options = outer.mapping("rope_scaling") | outer.mapping("rope_parameters")
        if layer_type is not None:
            options = Fields(outer.mapping("rope_parameters"), "config.json's rope_parameters", ModelNotFound, _BAD_OPTION).mapping(
                layer_type
            )
        fields = Fields(options, "config.json's RoPE scaling", ModelNotFound, _BAD_OPTION)
        kind = options.get("rope_type") or options.get("type") or "default"
        if kind not in SUPPORTED_ROPE:
            raise UnsupportedArchitecture(f"RoPE scaling {shown(kind)} is not supported", f"supported: {', '.join(SUPPORTED_ROPE)}")
        nested = next((name for name, value in options.items() if isinstance(value, dict)), None)
        if nested is not None:
            raise UnsupportedArchitecture(f"RoPE options of their own for layers of type {shown(nested)} are not supported", "")
        partial = fields.number("partial_rotary_factor", 0.0, 1.0, outer.number("partial_rotary_factor", 0.0, 1.0, 1.0))
        if partial != 1.0:
            what = f"partial rotation (partial_rotary_factor {partial}) is not supported"
            raise UnsupportedArchitecture(what, "use a model that rotates all channels")
        theta = fields.number("rope_theta", *_THETA, theta if layer_type else outer.number("rope_theta", *_THETA, theta))
        if kind == "default":
            return cls(kind, theta)
        context = outer.integer("max_position_embeddings", 1, _MAX_CONTEXT)
        original = fields.integer("original_max_position_embeddings", 1, _MAX_CONTEXT, context)
        if options.get("factor") is None and kind != "yarn":
            raise UnsupportedArchitecture(f"RoPE scaling {kind!r} without its 'factor'", "complete rope_parameters in config.json")
        factor = fields.number("factor", *_FACTOR, max(context / original, _FACTOR[0]))
        common: dict[str, Any] = {"kind": kind, "theta": theta, "factor": factor, "original_context": original}
        if kind == "linear":
            return cls(**common)
        if kind == "llama3":
            missing = [name for name in ("low_freq_factor", "high_freq_factor") if options.get(name) is None]
            if missing:
                raise UnsupportedArchitecture(f"RoPE scaling 'llama3' without {missing[0]!r}", "complete rope_parameters in config.json")
            low, high = fields.number("low_freq_factor", *_FACTOR), fields.number("high_freq_factor", *_FACTOR)
            if low >= high:
                raise fields.refuse("high_freq_factor", f"it must be above low_freq_factor, {low:g}")
            return cls(**common, low_freq_factor=low, high_freq_factor=high)
        fast, slow = fields.number("beta_fast", *_FACTOR, 32.0), fields.number("beta_slow", *_FACTOR, 1.0)
        return cls(
            **common,
            beta_fast=fast,
            beta_slow=slow,
            truncate=fields.boolean("truncate", True),
            attention_factor=_yarn_attention_factor(fields, factor),
        )

    @staticmethod
    def check_types(outer: Fields) -> None:
        """ModelNotFound unless the config's RoPE options, where they are given, are numbers and objects within their bounds."""
        for name in ("rope_theta", "rope_local_base_freq"):
            outer.number(name, *_THETA, 10_000.0)
        found = {name: outer.mapping(name) for name in ("rope_scaling", "rope_parameters")}
        found |= {f"rope_parameters {key}": own for key, own in found["rope_parameters"].items() if isinstance(own, dict)}
        for name, options in found.items():
            fields = Fields(options, f"config.json's {name}", ModelNotFound, _BAD_OPTION)
            fields.text("rope_type", "")
            fields.text("type", "")
            fields.number("rope_theta", *_THETA, 10_000.0)
            for factor in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
                fields.number(factor, *_FACTOR, 1.0)
            fields.integer("original_max_position_embeddings", 1, _MAX_CONTEXT, 1)
            fields.boolean("truncate", True)


def _yarn_attention_factor(fields: Fields, factor: float) -> float:
    """The given factor, or 0.1 ln(factor) + 1 (YaRN, equation 22), or the ratio of two such terms (DeepSeek's mscale options)."""
    if fields.get("attention_factor") is not None:
        return fields.number("attention_factor", *_FACTOR)

    def temperature(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all = (fields.number(name, 0.0, _FACTOR[1], 0.0) for name in ("mscale", "mscale_all_dim"))
    if mscale and mscale_all:
        return temperature(mscale) / temperature(mscale_all)
    return temperature(1.0)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Angle per position of each channel pair, [d/2] float32."""
    plain = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    return _yarn(rope, plain, head_dim)


def _llama3(rope: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Slow channels are divided by the factor, fast ones kept, those between blended by their turns over the original context."""
    turns = rope.original_context * plain / (2 * math.pi)
    blend = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0.0, 1.0)
    return (1 - blend) * plain / rope.factor + blend * plain


def _yarn(rope: RopeConfig, plain: torch.Tensor, head_dim: int) -> torch.Tensor:
    """As llama3, but the blend is a linear ramp over the channel index between the channels of beta_fast and beta_slow turns."""

    def channel(turns: float) -> float:
        return head_dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001  # a step instead of a division by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return plain / rope.factor * ramp + plain * (1 - ramp)


class RopeTable:
    """Cosines and sines by position, grown as positions are asked for; the YaRN attention factor is part of both."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device) -> None:
        self.attention_factor = rope.attention_factor
        self._frequencies = inverse_frequencies(rope, head_dim).to(device)
        self._cos = torch.empty(0, head_dim // 2, dtype=torch.float32, device=device)
        self._sin = self._cos

    @torch.inference_mode(False)  # the table outlives the step that asked for it, and training differentiates through it
    def _grow(self, positions: int) -> None:
        if positions <= self._cos.shape[0]:
            return
        count = max(positions, 2 * self._cos.shape[0], 1024)
        angles = torch.arange(count, dtype=torch.float32, device=self._frequencies.device)[:, None] * self._frequencies
        self._cos = angles.cos() * self.attention_factor
        self._sin = angles.sin() * self.attention_factor

    def slice(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin of positions [start, end), each [end - start, d/2] float32."""
        self._grow(end)
        return self._cos[start:end], self._sin[start:end]

    def table(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin of positions 0, 1, ... as far as they are known, at least `positions` of them, each [*, d/2] float32."""
        self._grow(positions)
        return self._cos, self._sin

    def gather(self, ranges: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin of several ranges of positions, one after another, each [N, d/2] float32."""
        if len(ranges) == 1:
            return self.slice(*ranges[0])
        self._grow(max(end for _, end in ranges))
        return torch.cat([self._cos[a:b] for a, b in ranges]), torch.cat([self._sin[a:b] for a, b in ranges])

    def at(self, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin of these positions, each [N, d/2] float32."""
        self._grow(max(positions) + 1)
        index = torch.tensor(positions, device=self._cos.device)
        return self._cos[index], self._sin[index]

    def inverse(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin that undo `slice(start, end)`: turn back and divide by the attention factor."""
        cos, sin = self.slice(start, end)
        square = self.attention_factor**2
        return cos / square, -sin / square
