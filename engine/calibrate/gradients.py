"""How much an error in a cached key or value changes what the target says later: gradients of the log-likelihood of its own samples.

With labels drawn from the model's own distribution, the expectation of g g^T (g the gradient at a cached vector) is the Fisher information, and
half of e^T E[g g^T] e is the divergence that a small error e causes. Text is cut at a point: what stands before is the cache, whose vectors are
the leaves; what follows reads it. So exactly what a resumed session does with its cache is what is differentiated.

Axes: B texts, n cached tokens, T following tokens, D coded KV elements of a token, H query heads, G KV heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from codec.spec import NUM_SINKS, KvLayout
from codec.weighting import Weighting
from engine.model.decoder import Decoder
from engine.model.layers import LayerWeights


@torch.enable_grad()
def cache_gradients(target: Decoder, token_ids: Tensor, split: int, layout: KvLayout, generator: torch.Generator) -> Tensor:
    """Gradients, float32 [B, split - NUM_SINKS, D], of sampled log-likelihoods of tokens from `split` on, at the pre-RoPE KV before it.

    Args:
        token_ids: [B, split + T] int64, on the target's device.
        generator: for the sampled labels, on the target's device.
    """
    batch, _length = token_ids.shape
    leaves = _cached(target, token_ids[:, :split]).requires_grad_(True)
    logits = _continue(target, token_ids, split, leaves)
    log_p = logits.float().log_softmax(-1)
    labels = torch.multinomial(log_p.detach().exp().flatten(0, 1), 1, generator=generator).reshape(batch, -1, 1)
    (-log_p.gather(-1, labels).sum()).backward()
    assert leaves.grad is not None
    grad = leaves.grad[:, :, layout.first_layer :].flatten(2)
    return grad[:, NUM_SINKS:].reshape(batch, split - NUM_SINKS, layout.dim)


@torch.no_grad()
def _cached(target: Decoder, token_ids: Tensor) -> Tensor:
    """Pre-RoPE KV of all layers, float32 [B, n, L, 2, G, d]."""
    batch, n = token_ids.shape
    pool = target.new_pool(batch * -(-n // 64))
    sequences = [pool.new_sequence() for _ in range(batch)]
    target.forward(token_ids.flatten(), sequences, [n] * batch, logits="none")
    c = target.config
    return torch.stack([target.read_kv(s, 0, n) for s in sequences]).reshape(batch, n, c.num_layers, 2, c.num_kv_heads, c.head_dim)


def _continue(target: Decoder, token_ids: Tensor, split: int, cache: Tensor) -> Tensor:
    """Logits [B, T, V] of the tokens from `split` on, differentiable in the cache: the decoder's layers in plain operations."""
    c = target.config
    batch, length = token_ids.shape
    x = target.embed(token_ids[:, split:].flatten()).reshape(batch, length - split, -1)
    cos, sin = (_outside_inference(part) for part in target.rope.slice(0, length))
    for number, layer in enumerate(target.layers):
        plain: LayerWeights = layer.weights().plain()  # type: ignore[operator]
        w = LayerWeights(*(None if t is None else _outside_inference(t) for t in plain))  # type: ignore[arg-type]
        x = x + _attention(_norm(x, w.input_norm, c.rms_norm_eps), w, cache[:, :, number], cos, sin, split, c)
        gate, up = F.linear(_norm(x, w.post_norm, c.rms_norm_eps), w.gate_up).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, w.down)
    head = target.embed_tokens.weight if target.lm_head is None else target.lm_head.weight
    return F.linear(_norm(x, _outside_inference(target.final_norm), c.rms_norm_eps), _outside_inference(head))


def _outside_inference(tensor: Tensor) -> Tensor:
    """A tensor made under inference mode (weights loaded there, angles grown there) as a copy that autograd takes; any other as it is."""
    return tensor.clone() if tensor.is_inference() else tensor


def _attention(x: Tensor, w: LayerWeights, cache: Tensor, cos: Tensor, sin: Tensor, split: int, c) -> Tensor:
    heads, groups, d = c.num_heads, c.num_kv_heads, c.head_dim
    q, k, v = F.linear(x, w.qkv, w.qkv_bias).unflatten(-1, (-1, d)).split((heads, groups, groups), 2)  # [B, T, *, d]
    if w.qk_norm is not None:
        q, k = _norm(q, w.qk_norm[0], c.rms_norm_eps), _norm(k, w.qk_norm[1], c.rms_norm_eps)
    keys = torch.cat([cache[:, :, 0].to(k.dtype), k], 1)
    values = torch.cat([cache[:, :, 1].to(v.dtype), v], 1)
    q, keys = _rotate(q, cos[split:], sin[split:]), _rotate(keys, cos, sin)
    length = keys.shape[1]
    mask = torch.ones(length - split, length, dtype=torch.bool, device=x.device).tril(split)
    keys, values = (t.repeat_interleave(heads // groups, 2) for t in (keys, values))
    q, keys, values = (t.transpose(1, 2) for t in (q, keys, values))
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return F.linear(out.transpose(1, 2).flatten(2), w.o, w.o_bias)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * scaled).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, *, d] turned by angles [T, d/2], halves convention, in float32."""
    first, second = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


@dataclass
class Sensitivity:
    """Running sums over cached tokens: the Fisher information's diagonal blocks, sum of g g^T float32 [blocks, d, d]."""

    layout: KvLayout
    total: Tensor | None = None
    count: int = 0

    def add(self, grad: Tensor) -> None:
        """Gradients float32 [*, D]."""
        g = grad.reshape(-1, self.layout.num_blocks, self.layout.head_dim).transpose(0, 1)
        block = g.transpose(1, 2) @ g
        self.total = block if self.total is None else self.total + block
        self.count += g.shape[1]

    def weighting(self) -> Weighting:
        """S with S^2 = the block-diagonal Fisher information, up to a common factor."""
        assert self.total is not None, "gradients were added"
        return Weighting.from_metric(self.total / self.count)
