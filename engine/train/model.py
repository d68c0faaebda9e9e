"""The two models of a distillation: the frozen target run densely over whole documents, and the layers that learn from it.

Axes: B documents, T tokens, E hidden size, H query heads, G KV heads, d head size, I feed-forward width, V vocabulary, R reduced vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.layers import (
    DIFFERENTIABLE,
    FAST,
    LayerShape,
    LayerWeights,
    dense_attention,
    differentiable_rope,
    layer_forward,
    rope_of,
)

Angles = Callable[[int], tuple[Tensor, Tensor]]  # T -> cos, sin [T, d/2] float32 of positions 0 .. T - 1


@dataclass(frozen=True)
class Teacher:
    """The frozen target: `embed` [V, E], `layers`, `norm` [E], `head` [V, E], all in one dtype on one device."""

    embed: Tensor
    layers: Sequence[LayerWeights]
    norm: Tensor
    head: Tensor
    shape: LayerShape
    angles: Angles

    @torch.no_grad()
    def run(self, token_ids: Tensor, tap: int) -> tuple[Tensor, Tensor]:
        """token_ids [B, T] int64 -> the residual stream after `tap` layers, and the last one after the final norm, each [B, T, E]."""
        batch, length = token_ids.shape
        shape = self.shape
        cos, sin = (part.repeat(batch, 1) for part in self.angles(length))
        rope = rope_of(cos, sin, shape.num_heads)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return dense_attention(*(part.unflatten(0, (batch, length)) for part in (q, k, v))).flatten(0, 1)

        stream, update = F.embedding(token_ids.flatten(), self.embed), None
        taken = stream
        for number, w in enumerate(self.layers):
            out = layer_forward(w, stream, rope, attend, shape, FAST, update)
            if number == tap:
                taken = out.entered
            stream, update = out.stream, out.update
        normed, stream = FAST.rms_norm(stream, self.norm, shape.eps, update)
        if tap == len(self.layers):
            taken = stream
        return taken.unflatten(0, (batch, length)), normed.unflatten(0, (batch, length))


class Student(nn.Module):
    """Own layers, final norm and head of a draft head, float32, initialised from a teacher.

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
        """The target's residual stream at the exit layer [B, T, E] -> what the head multiplies [B, T, E], in hidden's dtype."""
        stream, update, rope = hidden, None, differentiable_rope(*angles, self.shape.num_heads)
        for layer in self.layers:
            out = layer_forward(layer.weights(hidden.dtype), stream, rope, dense_attention, self.shape, DIFFERENTIABLE, update)  # type: ignore[operator]
            stream, update = out.stream, out.update
        return DIFFERENTIABLE.rms_norm(stream, self.norm, self.shape.eps, update)[0]

    def tensors(self) -> dict[str, Tensor]:
        """Hugging Face name -> tensor of everything a draft head stores but the token ids."""
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
    """One trained layer; its attributes are those of `LayerWeights`, float32."""

    input_norm: nn.Parameter
    qkv: nn.Parameter
    qkv_bias: nn.Parameter | None
    qk_norm: nn.Parameter | None
    o: nn.Parameter
    o_bias: nn.Parameter | None
    post_norm: nn.Parameter
    gate_up: nn.Parameter
    down: nn.Parameter

    def __init__(self, source: LayerWeights) -> None:
        super().__init__()
        for name in LayerWeights._fields:
            tensor = getattr(source, name)
            self.register_parameter(name, None if tensor is None else nn.Parameter(_copy(tensor)))

    def weights(self, dtype: torch.dtype) -> LayerWeights:
        """Its tensors, matrices and their biases rounded to the dtype that products run in; the norms stay float32."""
        named = {name: getattr(self, name) for name in LayerWeights._fields}
        return LayerWeights(**{name: t if t is None or "norm" in name else t.to(dtype) for name, t in named.items()})

    def named(self, shape: LayerShape) -> list[tuple[str, Tensor]]:
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
