"""The two models of a distillation: the frozen target run densely over whole documents, and the layers that learn from it.

Axes: B documents, T tokens, E hidden size, H query heads, G KV heads, d head size, I feed-forward width, V vocabulary, R reduced vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.config import LayerShape
from engine.model.layers import (
    DIFFERENTIABLE,
    FAST,
    LayerWeights,
    dense_attention,
    differentiable_rope,
    layer_forward,
    rope_of,
)

Pairs = Sequence[tuple[Tensor, Tensor]]  # cos, sin [T, d/2] float32 of positions 0 .. T - 1, one pair a RoPE
Angles = Callable[[int], Pairs]  # by T


@dataclass(frozen=True)
class Teacher:
    """The frozen target: `embed` [V, E], `layers` with their `shapes`, `norm` [E], `head` [V, E], all on one device, matrices in one dtype."""

    embed: Tensor
    layers: Sequence[LayerWeights]
    norm: Tensor
    head: Tensor
    shapes: Sequence[LayerShape]
    angles: Angles
    embedding_scale: float = 1.0

    def run(self, token_ids: Tensor, tap: int) -> tuple[Tensor, Tensor]:
        """token_ids [B, T] int64 -> the residual stream after `tap` layers, and the last one after the final norm, each [B, T, E]."""
        taken, final = self.run_taps(token_ids, (tap,))
        return taken[0], final

    @torch.no_grad()
    def run_taps(self, token_ids: Tensor, taps: Sequence[int]) -> TargetStates:
        """`run` with the residual streams after several numbers of layers, in the order of `taps`."""
        batch, length = token_ids.shape
        ropes = [rope_of(cos.repeat(batch, 1), sin.repeat(batch, 1), self.shapes[0].num_heads) for cos, sin in self.angles(length)]

        def attend(shape: LayerShape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (part.unflatten(0, (batch, length)) for part in (q, k, v))
            return dense_attention(q, k, v, shape).flatten(0, 1)

        stream, update = F.embedding(token_ids.flatten(), self.embed), None
        if self.embedding_scale != 1.0:
            stream = stream * torch.tensor(self.embedding_scale, dtype=stream.dtype)
        taken = {0: stream}
        for number, (w, shape) in enumerate(zip(self.layers, self.shapes, strict=True)):
            out = layer_forward(w, stream, ropes[shape.local_rope], partial(attend, shape), shape, FAST, update)
            if number in taps:
                taken[number] = out.entered
            stream, update = out.stream, out.update
        normed, stream = FAST.rms_norm(stream, self.norm, self.shapes[0].eps, update)
        taken[len(self.layers)] = stream
        return TargetStates([taken[tap].unflatten(0, (batch, length)) for tap in taps], normed.unflatten(0, (batch, length)))

    @torch.no_grad()
    def normed(self, stream: Tensor) -> Tensor:
        """The residual stream after the last layer [..., E] -> what the head multiplies, of the same shape."""
        return FAST.rms_norm(stream, self.norm, self.shapes[0].eps, None)[0]


class TargetStates(NamedTuple):
    """Of documents of a batch: the residual streams after some of the target's layers, and its last states after the final norm, each [B, T, E]."""

    taken: list[Tensor]
    final: Tensor


class Depths(NamedTuple):
    """drafts: of each depth [B, T, E], after the student's final norm: at [b, t] of depth d (0 first) what says the token after t + d, drafted after d
    tokens of the document that had been drafted from t on. final: the target's states after its final norm [B, T, E]."""

    drafts: list[Tensor]
    final: Tensor

    def rows(self, depth: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(states [N, E] of one depth that speak after positions [N] of the flattened documents, [N] bool whether a block could have got there)."""
        own = self.drafts[min(depth, len(self.drafts) - 1)]
        shift = 0 if len(self.drafts) == 1 else depth
        return own.flatten(0, 1)[(positions - shift).clamp_min(0)], positions % own.shape[1] >= shift


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
        first, self.own_head = len(teacher.layers) - num_layers, own_head
        self.shapes = list(teacher.shapes[first:])
        self.layers = nn.ModuleList(_OwnLayer(layer) for layer in teacher.layers[first:])
        self.norm = nn.Parameter(_copy(teacher.norm))
        rows = _copy(teacher.head[token_ids.to(teacher.head.device)])
        self.head = nn.Parameter(rows, requires_grad=own_head)

    def forward(self, hidden: Tensor, angles: Pairs) -> Tensor:
        """The target's residual stream at the exit layer [B, T, E] -> what the head multiplies [B, T, E], in hidden's dtype."""
        ropes = [differentiable_rope(*pair, self.shapes[0].num_heads) for pair in angles]
        stream, update = hidden, None
        for layer, shape in zip(self.layers, self.shapes, strict=True):
            w: LayerWeights = layer.weights(hidden.dtype)  # type: ignore[operator]
            attend = partial(dense_attention, shape=shape)
            out = layer_forward(w, stream, ropes[shape.local_rope], attend, shape, DIFFERENTIABLE, update)
            stream, update = out.stream, out.update
        return DIFFERENTIABLE.rms_norm(stream, self.norm, self.shapes[0].eps, update)[0]

    def taps(self, exit_layer: int) -> tuple[int, ...]:
        """Numbers of the target's layers whose states the student goes on from."""
        return (exit_layer,)

    def at_depths(self, teacher: Teacher, token_ids: Tensor, states: TargetStates, depths: int) -> Depths:
        """What the head multiplies for the first, second... draft of a block, along documents token_ids [B, T] whose states after the layers `taps` are
        given. Here each is as the first, whatever was drafted before: verification writes the states at the exit."""
        return Depths([self(states.taken[0], teacher.angles(token_ids.shape[1]))], states.final)

    def tensors(self) -> dict[str, Tensor]:
        """Hugging Face name -> tensor of everything a draft head stores but the token ids."""
        named = {"model.norm.weight": self.norm.data}
        for number, (layer, shape) in enumerate(zip(self.layers, self.shapes, strict=True)):
            named |= {f"model.layers.{number}.{name}": part for name, part in layer.named(shape)}  # type: ignore[operator]
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
    out_norms: nn.Parameter | None
    router: nn.Parameter | None

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
        tensors: dict[str, Any] = {name: getattr(self, name) for name in LayerWeights._fields}
        plain: dict[str, Any] = {name: None if tensor is None else tensor.data for name, tensor in tensors.items()}
        return list(LayerWeights(**plain).hf_parts(shape))


def _copy(tensor: Tensor) -> Tensor:
    # through numbers, not views: weights may be inference tensors, which autograd refuses
    return torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device).copy_(tensor)
