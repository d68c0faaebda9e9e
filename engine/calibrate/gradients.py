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
from engine.model.config import LayerShape
from engine.model.decoder import Decoder
from engine.model.layers import DIFFERENTIABLE, LayerWeights, dense_attention, differentiable_rope, layer_forward, rotation


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
    sequences = [pool.new_sequence(n) for _ in range(batch)]
    target.forward(token_ids.flatten(), sequences, [n] * batch, logits="none")
    c = target.config
    return torch.stack([target.read_kv(s, 0, n) for s in sequences]).reshape(batch, n, c.num_layers, 2, c.num_kv_heads, c.head_dim)


def _continue(target: Decoder, token_ids: Tensor, split: int, cache: Tensor) -> Tensor:
    """Logits [B, T, V] of the tokens from `split` on, differentiable in the cache: the decoder's layers in plain operations."""
    c = target.config
    length = token_ids.shape[1]
    x = target.embed(token_ids[:, split:].flatten()).unflatten(0, (-1, length - split))
    turns = []
    for local in [False] if c.local_rope is None else [False, True]:
        cos, sin = (_outside_inference(part) for part in target.rope_table(local=local).slice(0, length))
        turns.append((rotation(cos[:split], sin[:split]), differentiable_rope(cos[split:], sin[split:], c.num_heads)))
    update = None
    for number, layer in enumerate(target.layers):
        plain: LayerWeights = layer.weights().plain()  # type: ignore[operator]
        w = LayerWeights(*(None if t is None else _outside_inference(t) for t in plain))  # type: ignore[arg-type]
        shape = target.layer_shapes[number]
        turn_cached, rope = turns[shape.local_rope]
        keys, values = turn_cached(cache[:, :, number, 0].to(x.dtype)), cache[:, :, number, 1].to(x.dtype)

        def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor = keys, values: Tensor = values, shape: LayerShape = shape) -> Tensor:
            return dense_attention(q, torch.cat([keys, k], 1), torch.cat([values, v], 1), shape)

        out = layer_forward(w, x, rope, attend, shape, DIFFERENTIABLE, update)
        x, update = out.stream, out.update
    head = target.embed_tokens.weight if target.lm_head is None else target.lm_head.weight
    normed, _ = DIFFERENTIABLE.rms_norm(x, _outside_inference(target.output_norm), c.rms_norm_eps, update)
    logits = F.linear(normed, _outside_inference(head))
    return logits if c.logit_softcap is None else torch.tanh(logits / c.logit_softcap) * c.logit_softcap


def _outside_inference(tensor: Tensor) -> Tensor:
    """A tensor made under inference mode (weights loaded there, angles grown there) as a copy that autograd takes; any other as it is."""
    return tensor.clone() if tensor.is_inference() else tensor


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
