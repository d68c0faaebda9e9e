"""Parameters of the decoder's layers, with fused projections, and the Hugging Face names of their parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from engine.model.config import DecoderConfig
from engine.model.linear import Projection


class DecoderLayer(nn.Module):
    """Parameters of one layer; q, k, v are one product, gate and up another."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        heads, kv_heads, d, width = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
        self.input_norm = nn.Parameter(torch.empty(width))
        self.qkv_proj = Projection(width, (heads + 2 * kv_heads) * d, config.qkv_bias)
        self.qk_norm = nn.Parameter(torch.empty(2, d)) if config.qk_norm else None  # row 0 for queries, row 1 for keys
        self.o_proj = Projection(heads * d, width, config.o_bias)
        self.post_norm = nn.Parameter(torch.empty(width))
        self.gate_up_proj = Projection(width, 2 * config.intermediate_size, False)
        self.down_proj = Projection(config.intermediate_size, width, False)

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


class LayerWeights(NamedTuple):
    """Tensors of one layer, in the model's dtype; the matrices may be packed (see `engine.model.linear`)."""

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
