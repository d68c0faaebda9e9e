"""A decoder layer: its parameters, with fused projections, and the one forward pass of all families (`engine.model.families`).

Axes: N tokens (any leading axes in the forward pass), H query heads, G KV heads, d head size, E hidden size, I feed-forward width, X experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from engine.model.config import DecoderConfig, LayerShape
from engine.model.families.family import Activation
from engine.model.linear import Projection
from kernels.gelu_mul import gelu_mul
from kernels.grouped_linear import grouped_linear
from kernels.grouped_linear.reference import grouped_linear as reference_grouped_linear
from kernels.paged_attention.reference import capped_attention
from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope
from kernels.rope.reference import rotate, widen
from kernels.silu_mul import silu_mul

Rope = Callable[
    [torch.Tensor], tuple[torch.Tensor, torch.Tensor]
]  # queries and keys side by side [N, H + G, d] -> both as the attention takes them
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # q [N, H, d], k and v [N, G, d] -> [N, H, d]


class DecoderLayer(nn.Module):
    """Parameters of one layer as a checkpoint has them; q, k, v are one product, gate and up another."""

    def __init__(
        self, config: DecoderConfig, number: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        heads, kv_heads, d, width = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
        self.shape, self._norm_offset = config.layer_shape(number), config.norm_offset
        new = partial(torch.empty, dtype=dtype, device=device)
        projection = partial(Projection, dtype=dtype, device=device)
        self.input_norm = nn.Parameter(new(width))
        self.qkv_proj = projection(width, (heads + 2 * kv_heads) * d, config.qkv_bias)
        self.qk_norm = nn.Parameter(new(2, d)) if config.qk_norm else None  # row 0 for queries, row 1 for keys
        self.o_proj = projection(heads * d, width, config.o_bias)
        self.post_norm = nn.Parameter(new(width))
        self.out_norms = (
            nn.Parameter(new(2, width)) if config.sandwich_norms else None
        )  # row 0 of attention, row 1 of the feed-forward part
        self.router = self.experts_gate_up = self.experts_down = None
        if self.shape.expert_names is not None:
            experts, inner = config.num_experts, config.expert_size
            self.router = nn.Parameter(new(experts, width))
            self.experts_gate_up, self.experts_down = nn.Parameter(new(experts, 2 * inner, width)), nn.Parameter(new(experts, width, inner))
        else:
            self.gate_up_proj = projection(width, 2 * config.intermediate_size, False)
            self.down_proj = projection(config.intermediate_size, width, False)

    def projections(self) -> list[tuple[Projection, tuple[str, ...]]]:
        """Its projections, each with the names within a Hugging Face layer of the matrices it joins."""
        found: list[tuple[Projection, tuple[str, ...]]] = [
            (self.qkv_proj, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            (self.o_proj, ("self_attn.o_proj",)),
        ]
        if self.router is None:
            found += [(self.gate_up_proj, ("mlp.gate_proj", "mlp.up_proj")), (self.down_proj, ("mlp.down_proj",))]
        return found

    def to_fill(self) -> Iterator[tuple[str, torch.Tensor]]:
        """`LayerWeights.hf_parts` of a layer without values, but those of quantised matrices, which have theirs."""
        quantized = {f"{name}.weight" for projection, names in self.projections() if projection.plain is None for name in names}
        return ((name, part) for name, part in self.stored().hf_parts(self.shape, leave_out=quantized))

    def stored(self) -> LayerWeights:
        """The tensors as a checkpoint has them, looked up once: attribute access of modules costs as much as a small operation."""
        qkv, o, mixture = self.qkv_proj, self.o_proj, self.router is not None
        return LayerWeights(
            self.input_norm.data,
            qkv.matrix,
            None if qkv.bias is None else qkv.bias.data,
            _data(self.qk_norm),
            o.matrix,
            None if o.bias is None else o.bias.data,
            self.post_norm.data,
            self.experts_gate_up.data if self.experts_gate_up is not None else self.gate_up_proj.matrix,
            self.experts_down.data if self.experts_down is not None else self.down_proj.matrix,
            _data(self.out_norms),
            _data(self.router) if mixture else None,
        )

    def weights(self) -> LayerWeights:
        """The tensors as the forward pass takes them: norms with their offset, in float32 where they have one."""
        stored = self.stored()
        if not self._norm_offset:
            return stored
        return stored._replace(
            input_norm=with_offset(stored.input_norm),
            post_norm=with_offset(stored.post_norm),
            qk_norm=None if stored.qk_norm is None else with_offset(stored.qk_norm),
            out_norms=None if stored.out_norms is None else with_offset(stored.out_norms),
        )


def _data(parameter: nn.Parameter | None) -> torch.Tensor | None:
    return None if parameter is None else parameter.data


def with_offset(norm: torch.Tensor) -> torch.Tensor:
    """What a norm of weight w multiplies by in families that store it less 1: float32, as half precision has no room for the sum."""
    return norm.float() + 1.0


class LayerWeights(NamedTuple):
    """Tensors of one layer, usually in one dtype; the matrices may be packed (see `engine.model.linear`)."""

    input_norm: torch.Tensor  # [E]
    qkv: torch.Tensor  # [(H + 2G) d, E]
    qkv_bias: torch.Tensor | None  # [(H + 2G) d]
    qk_norm: torch.Tensor | None  # [2, d]
    o: torch.Tensor  # [E, H d]
    o_bias: torch.Tensor | None  # [E]
    post_norm: torch.Tensor  # [E], before the feed-forward part
    gate_up: torch.Tensor  # [2I, E], of experts [X, 2I, E]
    down: torch.Tensor  # [E, I], of experts [X, E, I]
    out_norms: torch.Tensor | None = None  # [2, E], of the results of attention and feed-forward part
    router: torch.Tensor | None = None  # [X, E]

    def plain(self) -> LayerWeights:
        """The same with packed matrices unpacked into copies, for operations that only take plain tensors (autograd among them)."""
        qkv, o, gate_up, down = (m.to_dense() if m.is_mkldnn else m for m in (self.qkv, self.o, self.gate_up, self.down))
        return self._replace(qkv=qkv, o=o, gate_up=gate_up, down=down)

    def hf_parts(self, shape: LayerShape, *, leave_out: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """(name within a Hugging Face layer, contiguous part) for each of its tensors: views to fill, or copies once packed.

        leave_out: names of packed matrices that are not wanted, and of which no copies are made.
        """
        return ((name, part) for name, part in self._without(leave_out)._hf_parts(shape) if name not in leave_out)

    def _without(self, names: Collection[str]) -> LayerWeights:
        """The same with matrices of no content in the places of packed ones of these names."""
        places = {"qkv": "self_attn.q_proj", "o": "self_attn.o_proj", "gate_up": "mlp.gate_proj", "down": "mlp.down_proj"}
        absent = {place: getattr(self, place) for place, name in places.items() if f"{name}.weight" in names}
        return self._replace(**{place: torch.empty(matrix.shape, device="meta") for place, matrix in absent.items()})

    def _hf_parts(self, shape: LayerShape) -> Iterator[tuple[str, torch.Tensor]]:
        plain = self.plain()
        q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        yield "input_layernorm.weight", self.input_norm
        if self.out_norms is None:
            yield "post_attention_layernorm.weight", self.post_norm
        else:
            yield "post_attention_layernorm.weight", self.out_norms[0]
            yield "pre_feedforward_layernorm.weight", self.post_norm
            yield "post_feedforward_layernorm.weight", self.out_norms[1]
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
        if self.router is not None and shape.expert_names is not None:
            yield shape.expert_names.router, self.router
            for number, (gate_up, down) in enumerate(zip(plain.gate_up, plain.down, strict=True)):
                yield from zip(shape.expert_names.matrices(number), (*gate_up.chunk(2), down), strict=True)
            return
        gate, up = plain.gate_up.chunk(2)
        yield "mlp.gate_proj.weight", gate
        yield "mlp.up_proj.weight", up
        yield "mlp.down_proj.weight", plain.down


class LayerOps(NamedTuple):
    """The operations a layer is made of."""

    linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]  # x [N, in], weight [out, in], bias -> [N, out]
    # x [N, E], weight, eps, residual or None -> (normalised rows, x + residual)
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
    gates: Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]]  # by activation: [N, 2I] -> [N, I]
    # x [M, in] sorted by expert, weights [X, out, in], rows of each expert int64 [X] -> [M, out]
    grouped_linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _differentiable_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    if residual is not None:
        x = x + residual
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype), x


def _differentiable_gate(activate: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def gated(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return activate(gate) * up

    return gated


GATES: Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]] = {"silu": silu_mul, "gelu_tanh": gelu_mul}
_DIFFERENTIABLE_GATES: Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": _differentiable_gate(F.silu),
    "gelu_tanh": _differentiable_gate(partial(F.gelu, approximate="tanh")),
}

FAST = LayerOps(F.linear, rms_norm, GATES, grouped_linear)  # kernels, for plain matrices
# plain operations; norms in float32 whatever their weight's dtype
DIFFERENTIABLE = LayerOps(F.linear, _differentiable_norm, _DIFFERENTIABLE_GATES, reference_grouped_linear)


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
    attended = ops.linear(attend(*rope(qk), v).flatten(-2), w.o, w.o_bias)
    if w.out_norms is not None:
        attended = ops.rms_norm(attended, w.out_norms[0], shape.eps, None)[0]
    normed, stream = ops.rms_norm(entered, w.post_norm, shape.eps, attended)
    if w.router is None:
        out = ops.linear(ops.gates[shape.activation](ops.linear(normed, w.gate_up, None)), w.down, None)
    else:
        out = _mixture(w, normed, shape, ops)
    if w.out_norms is not None:
        out = ops.rms_norm(out, w.out_norms[1], shape.eps, None)[0]
    return LayerOutput(entered, stream, out, queries)


def _mixture(w: LayerWeights, x: torch.Tensor, shape: LayerShape, ops: LayerOps) -> torch.Tensor:
    """Mixture of experts over rows x [N, E] (any leading axes): each goes through the experts its router scores highest (Shazeer et al., 2017, arXiv
    1701.06538), and their results are added up, weighted by the softmax of the scores over all experts.

    A row's terms are added one by one, in the order of its experts' scores, whatever rows stand beside it: a GPU's reduction may order them by how many
    rows there are.
    """
    assert w.router is not None
    rows, count = x.flatten(0, -2), shape.experts_per_token
    share, chosen = ops.linear(rows, w.router, None).float().softmax(-1).topk(count, -1)  # [N, k]
    if shape.normalise_experts:
        share = share / _in_order(share.unbind(-1))[:, None]
    order = chosen.flatten().argsort(stable=True)
    sizes = (chosen.flatten()[:, None] == torch.arange(len(w.router), device=x.device)).sum(0)  # a bincount would wait for the device
    inner = ops.gates[shape.activation](ops.grouped_linear(rows[order // count], w.gate_up, sizes))
    result = ops.grouped_linear(inner, w.down, sizes)
    placed = torch.empty_like(result).index_copy(0, order, result).unflatten(0, (-1, count))  # [N, k, E]
    terms = placed * share.to(result.dtype)[..., None]
    return _in_order([term.float() for term in terms.unbind(-2)]).to(result.dtype).view(x.shape)


def _in_order(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Their sum, from the first on."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


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


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: LayerShape) -> torch.Tensor:
    """q [B, T, H, d] of the last T of T' positions over k, v [B, T', G, d] -> [B, T, H, d], causal, within the layer's window."""
    group, length, keys = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    k, v = (part.repeat_interleave(group, 2) for part in (k, v))
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    whole = length == keys and (shape.window is None or shape.window >= keys)
    mask = None
    if not whole or shape.softcap is not None:
        mask = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)
        if shape.window is not None:
            mask = mask.triu(keys - length + 1 - shape.window)
    if shape.softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=shape.scale)
    else:
        assert mask is not None
        out = capped_attention(q, k, v, ~mask, shape.scale, shape.softcap)
    return out.transpose(1, 2)
