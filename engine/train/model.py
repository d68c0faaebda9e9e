"""The two models of a distillation: the frozen target run densely over whole documents, and the layers that learn from it.

Axes: B documents, T tokens, E hidden size, H query heads, G KV heads, d head size, I feed-forward width, V vocabulary, R reduced vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope
from kernels.silu_mul import silu_mul

Angles = Callable[[int], tuple[Tensor, Tensor]]  # T -> cos, sin [T, d/2] float32 of positions 0 .. T - 1


class LayerTensors(Protocol):
    """Tensors of one layer with fused projections; any of the biases, and qk_norm, may be None."""

    @property
    def input_norm(self) -> Tensor: ...  # [E]

    @property
    def qkv(self) -> Tensor: ...  # [(H + 2G) d, E]

    @property
    def qkv_bias(self) -> Tensor | None: ...

    @property
    def qk_norm(self) -> Tensor | None: ...  # [2, d]

    @property
    def o(self) -> Tensor: ...  # [E, H d]

    @property
    def o_bias(self) -> Tensor | None: ...

    @property
    def post_norm(self) -> Tensor: ...  # [E]

    @property
    def gate_up(self) -> Tensor: ...  # [2I, E]

    @property
    def down(self) -> Tensor: ...  # [E, I]


_FIELDS = ("input_norm", "qkv", "qkv_bias", "qk_norm", "o", "o_bias", "post_norm", "gate_up", "down")


class Shape(NamedTuple):
    """What the layers need to know besides their tensors."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float


@dataclass(frozen=True)
class Teacher:
    """The frozen target: `embed` [V, E], `layers`, `norm` [E], `head` [V, E], all in one dtype on one device."""

    embed: Tensor
    layers: Sequence[LayerTensors]
    norm: Tensor
    head: Tensor
    shape: Shape
    angles: Angles

    @torch.no_grad()
    def run(self, token_ids: Tensor, tap: int) -> tuple[Tensor, Tensor]:
        """token_ids [B, T] int64 -> the residual stream after `tap` layers, and the last one after the final norm, each [B, T, E]."""
        batch, length = token_ids.shape
        shape = self.shape
        cos, sin = (part.repeat(batch, 1) for part in self.angles(length))
        stream, update = F.embedding(token_ids.flatten(), self.embed), None
        taken = stream
        for number, w in enumerate(self.layers):
            normed, stream = rms_norm(stream, w.input_norm, shape.eps, update)
            if number == tap:
                taken = stream
            q, k, v = _heads(F.linear(normed, w.qkv, w.qkv_bias), shape)
            if w.qk_norm is not None:
                q, k = rms_norm(q, w.qk_norm[0], shape.eps)[0], rms_norm(k, w.qk_norm[1], shape.eps)[0]
            turned = (apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)
            attended = _attend(*(part.unflatten(0, (batch, length)) for part in turned))
            normed, stream = rms_norm(stream, w.post_norm, shape.eps, F.linear(attended.flatten(0, 1), w.o, w.o_bias))
            update = F.linear(silu_mul(F.linear(normed, w.gate_up)), w.down)
        normed, stream = rms_norm(stream, self.norm, shape.eps, update)
        if tap == len(self.layers):
            taken = stream
        return taken.unflatten(0, (batch, length)), normed.unflatten(0, (batch, length))


class Student(nn.Module):
    """Own layers, final norm and head of a trunk draft, float32, initialised from a teacher.

    Args:
        teacher: its last `num_layers` layers, its norm and its head's rows are copied.
        num_layers: n.
        token_ids: [R] int64, the reduced vocabulary.
        own_head: train the head's rows; otherwise they stay the target's.
    """

    def __init__(self, teacher: Teacher, num_layers: int, token_ids: Tensor, *, own_head: bool) -> None:
        super().__init__()
        self.shape, self.own_head = teacher.shape, own_head
        self.layers = nn.ModuleList(_OwnLayer(layer) for layer in teacher.layers[len(teacher.layers) - num_layers :])
        self.norm = nn.Parameter(_copy(teacher.norm))
        rows = _copy(teacher.head[token_ids.to(teacher.head.device)])
        self.head = nn.Parameter(rows, requires_grad=own_head)

    def forward(self, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """The target's residual stream after the trunk [B, T, E] -> what the head multiplies [B, T, E], in hidden's dtype."""
        x = hidden
        for layer in self.layers:
            x = layer(x, angles, self.shape)
        return _norm(x, self.norm, self.shape.eps)

    def tensors(self) -> dict[str, Tensor]:
        """Hugging Face name -> tensor of everything an adapter stores but the token ids."""
        named = {"model.norm.weight": self.norm.data}
        for number, layer in enumerate(self.layers):
            named |= {f"model.layers.{number}.{name}": part for name, part in layer.named(self.shape)}  # type: ignore[operator]
        return named | ({"lm_head.weight": self.head.data} if self.own_head else {})

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over values named as `tensors` names them, for example those that went through 8 bits."""
        for name, own in self.tensors().items():
            own.copy_(tensors[name].to(own))


class _OwnLayer(nn.Module):
    """One trained layer; its attributes are those of `LayerTensors`, float32."""

    input_norm: nn.Parameter
    qkv: nn.Parameter
    qkv_bias: nn.Parameter | None
    qk_norm: nn.Parameter | None
    o: nn.Parameter
    o_bias: nn.Parameter | None
    post_norm: nn.Parameter
    gate_up: nn.Parameter
    down: nn.Parameter

    def __init__(self, source: LayerTensors) -> None:
        super().__init__()
        for name in _FIELDS:
            tensor = getattr(source, name)
            self.register_parameter(name, None if tensor is None else nn.Parameter(_copy(tensor)))

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], shape: Shape) -> Tensor:
        """Plain operations that autograd follows; the products run in x's dtype on weights rounded to it."""
        dtype = x.dtype
        w: dict[str, Any] = {name: None if getattr(self, name) is None else getattr(self, name).to(dtype) for name in _FIELDS}
        q, k, v = _heads(F.linear(_norm(x, self.input_norm, shape.eps), w["qkv"], w["qkv_bias"]), shape)
        if self.qk_norm is not None:
            q, k = _norm(q, self.qk_norm[0], shape.eps), _norm(k, self.qk_norm[1], shape.eps)
        attended = _attend(_rotate(q, *angles), _rotate(k, *angles), v)
        x = x + F.linear(attended, w["o"], w["o_bias"])
        gate, up = F.linear(_norm(x, self.post_norm, shape.eps), w["gate_up"]).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, w["down"])

    def named(self, shape: Shape) -> list[tuple[str, Tensor]]:
        """(name within a Hugging Face layer, view of the tensor)."""
        q, kv, inner = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim, self.down.shape[1]
        parts = [("input_layernorm.weight", self.input_norm.data), ("post_attention_layernorm.weight", self.post_norm.data)]
        parts += [(f"self_attn.{n}_proj.weight", part) for n, part in zip("qkv", self.qkv.data.split((q, kv, kv)), strict=True)]
        if self.qkv_bias is not None:
            parts += [(f"self_attn.{n}_proj.bias", part) for n, part in zip("qkv", self.qkv_bias.data.split((q, kv, kv)), strict=True)]
        if self.qk_norm is not None:
            parts += [("self_attn.q_norm.weight", self.qk_norm.data[0]), ("self_attn.k_norm.weight", self.qk_norm.data[1])]
        parts += [("self_attn.o_proj.weight", self.o.data)]
        if self.o_bias is not None:
            parts += [("self_attn.o_proj.bias", self.o_bias.data)]
        gate, up = self.gate_up.data.split((inner, inner))
        return [*parts, ("mlp.gate_proj.weight", gate), ("mlp.up_proj.weight", up), ("mlp.down_proj.weight", self.down.data)]


def _copy(tensor: Tensor) -> Tensor:
    # through numbers, not views: weights may be inference tensors, which autograd refuses
    return torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device).copy_(tensor)


def _heads(qkv: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """[..., (H + 2G) d] -> q [..., H, d], k and v [..., G, d]."""
    split = qkv.unflatten(-1, (-1, shape.head_dim))
    q, k, v = split.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), -2)
    return q, k, v


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q [B, T, H, d] over k, v [B, T, G, d] -> [B, T, H d]."""
    group = q.shape[2] // k.shape[2]
    k, v = (part.repeat_interleave(group, 2) for part in (k, v))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    return out.transpose(1, 2).flatten(2)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, *, d] turned by cos, sin [T, d/2], in float32."""
    first, second = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
