"""A layer of the Llama family: its parameters, with fused projections, and its forward pass.

Axes: N tokens (any leading axes in the forward pass), H query heads, G KV heads, d head size, E hidden size, I feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from engine.model.config import DecoderConfig
from engine.model.linear import Projection
from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope
from kernels.rope.reference import rotate, widen
from kernels.silu_mul import silu_mul

Rope = Callable[
    [torch.Tensor], tuple[torch.Tensor, torch.Tensor]
]  # queries and keys side by side [N, H + G, d] -> both as the attention takes them
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # q [N, H, d], k and v [N, G, d] -> [N, H, d]


class DecoderLayer(nn.Module):
    """Parameters of one layer; q, k, v are one product, gate and up another."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        super().__init__()
        heads, kv_heads, d, width = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
        new = partial(torch.empty, dtype=dtype, device=device)
        projection = partial(Projection, dtype=dtype, device=device)
        self.input_norm = nn.Parameter(new(width))
        self.qkv_proj = projection(width, (heads + 2 * kv_heads) * d, config.qkv_bias)
        self.qk_norm = nn.Parameter(new(2, d)) if config.qk_norm else None  # row 0 for queries, row 1 for keys
        self.o_proj = projection(heads * d, width, config.o_bias)
        self.post_norm = nn.Parameter(new(width))
        self.gate_up_proj = projection(width, 2 * config.intermediate_size, False)
        self.down_proj = projection(config.intermediate_size, width, False)

    def weights(self) -> LayerWeights:
        """The tensors, looked up once: attribute access of modules costs as much as a small operation."""
        qkv, o = self.qkv_proj, self.o_proj
        return LayerWeights(
            self.input_norm.data,
            qkv.matrix,
            None if qkv.bias is None else qkv.bias.data,
            None if self.qk_norm is None else self.qk_norm.data,
            o.matrix,
            None if o.bias is None else o.bias.data,
            self.post_norm.data,
            self.gate_up_proj.matrix,
            self.down_proj.matrix,
        )


class LayerShape(NamedTuple):
    """What a layer needs to know besides its tensors."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float

    @classmethod
    def of(cls, config: DecoderConfig) -> LayerShape:
        """Of a decoder's layers."""
        return cls(config.num_heads, config.num_kv_heads, config.head_dim, config.rms_norm_eps)


class LayerWeights(NamedTuple):
    """Tensors of one layer, usually in one dtype; the matrices may be packed (see `engine.model.linear`)."""

    input_norm: torch.Tensor  # [E]
    qkv: torch.Tensor  # [(H + 2G) d, E]
    qkv_bias: torch.Tensor | None  # [(H + 2G) d]
    qk_norm: torch.Tensor | None  # [2, d]
    o: torch.Tensor  # [E, H d]
    o_bias: torch.Tensor | None  # [E]
    post_norm: torch.Tensor  # [E]
    gate_up: torch.Tensor  # [2I, E]
    down: torch.Tensor  # [E, I]

    def plain(self) -> LayerWeights:
        """The same with packed matrices unpacked into copies, for operations that only take plain tensors (autograd among them)."""
        qkv, o, gate_up, down = (m.to_dense() if m.is_mkldnn else m for m in (self.qkv, self.o, self.gate_up, self.down))
        return self._replace(qkv=qkv, o=o, gate_up=gate_up, down=down)

    def hf_parts(self, config: DecoderConfig) -> Iterator[tuple[str, torch.Tensor]]:
        """(name within a Hugging Face layer, contiguous part) for each of its tensors: views to fill, or copies once packed."""
        plain = self.plain()
        q, kv, inner = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.intermediate_size
        yield "input_layernorm.weight", self.input_norm
        yield "post_attention_layernorm.weight", self.post_norm
        for name, part in zip("qkv", plain.qkv.split((q, kv, kv)), strict=True):
            yield f"self_attn.{name}_proj.weight", part
        if self.qkv_bias is not None:
            for name, part in zip("qkv", self.qkv_bias.split((q, kv, kv)), strict=True):
                yield f"self_attn.{name}_proj.bias", part
        if self.qk_norm is not None:
            yield "self_attn.q_norm.weight", self.qk_norm[0]
            yield "self_attn.k_norm.weight", self.qk_norm[1]
        yield "self_attn.o_proj.weight", plain.o
        if self.o_bias is not None:
            yield "self_attn.o_proj.bias", self.o_bias
        gate, up = plain.gate_up.split((inner, inner))
        yield "mlp.gate_proj.weight", gate
        yield "mlp.up_proj.weight", up
        yield "mlp.down_proj.weight", plain.down


class LayerOps(NamedTuple):
    """The operations a layer is made of."""

    linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]  # x [N, in], weight [out, in], bias -> [N, out]
    # x [N, E], weight, eps, residual or None -> (normalised rows, x + residual)
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
    silu_mul: Callable[[torch.Tensor], torch.Tensor]  # [N, 2I] -> [N, I]


def _differentiable_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    if residual is not None:
        x = x + residual
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype), x


def _differentiable_silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


FAST = LayerOps(F.linear, rms_norm, silu_mul)  # kernels, for plain matrices
DIFFERENTIABLE = LayerOps(
    F.linear, _differentiable_norm, _differentiable_silu_mul
)  # plain operations; norms in float32 whatever their weight's dtype


class LayerOutput(NamedTuple):
    """What a layer's forward pass returns, each tensor [N, E] but `queries`.

    The residual stream after the layer is stream + update: the next norm adds them in passing.
    """

    entered: torch.Tensor  # residual stream before the layer
    stream: torch.Tensor  # after its attention
    update: torch.Tensor  # of its feed-forward part, not yet added
    queries: torch.Tensor  # [N, H, d] before rotation


def layer_forward(
    w: LayerWeights,
    x: torch.Tensor,
    rope: Rope,
    attend: Attend,
    shape: LayerShape,
    ops: LayerOps,
    update: torch.Tensor | None = None,
) -> LayerOutput:
    """One layer over the residual stream x [N, E], to which the update [N, E] of the layer before is added first."""
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    normed, entered = ops.rms_norm(x, w.input_norm, shape.eps, update)
    split = ops.linear(normed, w.qkv, w.qkv_bias).unflatten(-1, (-1, shape.head_dim))
    queries, v = split.narrow(-2, 0, heads), split.narrow(-2, heads + kv_heads, kv_heads)
    if w.qk_norm is None:
        qk = split.narrow(-2, 0, heads + kv_heads)
    else:
        queries = ops.rms_norm(queries, w.qk_norm[0], shape.eps, None)[0]
        keys = ops.rms_norm(split.narrow(-2, heads, kv_heads), w.qk_norm[1], shape.eps, None)[0]
        qk = torch.cat((queries, keys), -2)
    attended = attend(*rope(qk), v).flatten(-2)
    normed, stream = ops.rms_norm(entered, w.post_norm, shape.eps, ops.linear(attended, w.o, w.o_bias))
    return LayerOutput(entered, stream, ops.linear(ops.silu_mul(ops.linear(normed, w.gate_up, None)), w.down, None), queries)


def rope_of(cos: torch.Tensor, sin: torch.Tensor, num_heads: int) -> Rope:
    """Rotation by angles [N, d/2] float32 through the kernels; num_heads: of the queries."""

    def rope(qk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        turned = apply_rope(qk, cos, sin)
        return turned[..., :num_heads, :], turned[..., num_heads:, :]

    return rope


def rotation(cos: torch.Tensor, sin: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rotation of [*, T, heads, d] by angles [T, d/2] float32 in plain operations, which autograd follows."""
    wide = widen(cos, sin)
    return lambda x: rotate(x, *wide)


def differentiable_rope(cos: torch.Tensor, sin: torch.Tensor, num_heads: int) -> Rope:
    """`rope_of` for [*, T, heads, d], which autograd follows."""
    turn = rotation(cos, sin)

    def rope(qk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        turned = turn(qk)
        return turned[..., :num_heads, :], turned[..., num_heads:, :]

    return rope


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """q [B, T, H, d] over k, v [B, T', G, d] -> [B, T, H, d], causal, or under a mask [T, T'] of what is seen."""
    group = q.shape[2] // k.shape[2]
    k, v = (part.repeat_interleave(group, 2) for part in (k, v))
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)
