"""A student that goes on from the target's last states: one row a draft token, its own output in place of the target's state of what it has drafted.

A row joins a token's embedding with the target's state of the token before it (EAGLE, Li et al., 2024, arXiv 2401.15077), or with the states of several
layers (EAGLE-3, Li et al., 2025, arXiv 2503.01840). It is trained as it drafts (EAGLE-3's training-time test): pass d over a document is fed the
outputs of pass d - 1, and its rows see the rows of true states before their block and the own ones in it.

Axes: B documents, T tokens, E hidden size, S joined states, H query heads, G KV heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draft.head_file import EMBED_NORM, FUSE, JOIN, STATE_NORM
from engine.model.config import LayerShape
from engine.model.layers import DIFFERENTIABLE, LayerWeights, differentiable_rope, layer_forward
from engine.train.model import Depths, Student, TargetStates, Teacher
from kernels.paged_attention.reference import capped_attention

# of a state's size in the rows that training begins with: of 0, .1, .3 and 1, what SmolLM2's head learned from soonest
_EMBEDDING_SHARE = 0.1


class StateStudent(Student):
    """Own layers, norm, head and join of a draft head on the target's states, float32.

    Args:
        teacher, num_layers, token_ids, own_head: see `Student`.
        state_layers: numbers of the target's layers whose states are joined, ascending, its last one at the end.
    """

    def __init__(self, teacher: Teacher, num_layers: int, token_ids: Tensor, *, own_head: bool, state_layers: Sequence[int]) -> None:
        super().__init__(teacher, num_layers, token_ids, own_head=own_head)
        self.state_layers = tuple(state_layers)
        size, device = self.norm.shape[0], self.norm.device
        whole, count = torch.eye(size, device=device), len(self.state_layers)
        self.state_norm, self.embed_norm = nn.Parameter(torch.ones(size, device=device)), nn.Parameter(torch.ones(size, device=device))
        self.join = nn.Parameter(torch.cat([whole, whole], 1))  # [E, 2E]: of the state, of the embedding
        self.fuse = nn.Parameter(torch.cat([torch.zeros(size, (count - 1) * size, device=device), whole], 1)) if count > 1 else None

    @torch.no_grad()
    def scale_rows(self, scale: float) -> None:
        """Begin with rows of this size, made of states for the most part: what the copied layers add to a residual stream drowns rows that are far
        smaller than theirs, and an embedding says its own token to the head."""
        self.state_norm.fill_(scale)
        self.embed_norm.fill_(scale)
        self.join[:, len(self.join) :].mul_(_EMBEDDING_SHARE)

    def fused(self, states: Sequence[Tensor]) -> Tensor:
        """The target's states after `state_layers` layers, each [B, T, E] -> what stands for them all [B, T, E]."""
        if self.fuse is None:
            return states[-1]
        eps = self.shapes[0].eps
        wide = torch.cat([F.rms_norm(state.float(), state.shape[-1:], None, eps).to(state.dtype) for state in states], -1)
        return F.linear(wide, self.fuse.to(wide.dtype))

    def joined(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """Rows of the own layers [B, T, E] from states of the tokens before and embeddings, each [B, T, E]; an unknown state is 0."""
        eps = self.shapes[0].eps
        parts = [
            DIFFERENTIABLE.rms_norm(part, weight, eps, None)[0]
            for part, weight in ((states, self.state_norm), (embeddings, self.embed_norm))
        ]
        return F.linear(torch.cat(parts, -1), self.join.to(states.dtype))

    def taps(self, exit_layer: int) -> tuple[int, ...]:
        """See `Student`."""
        return self.state_layers

    def at_depths(self, teacher: Teacher, token_ids: Tensor, states: TargetStates, depths: int) -> Depths:
        """See `Student`. Before the first token there is no state: 0."""
        length = token_ids.shape[1]
        before = F.pad(self.fused(states.taken), (0, 0, 1, 0))[:, :length]  # of the token before each
        embeddings = F.embedding(token_ids, teacher.embed)
        angles = teacher.angles(length + depths - 1)
        weights = [layer.weights(before.dtype) for layer in self.layers]  # type: ignore[operator]
        keys: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.layers]  # of each layer, by depth
        drafts = []
        for depth in range(depths):
            rows = self.joined(before, F.pad(embeddings, (0, 0, 0, depth))[:, depth:])
            ropes = [differentiable_rope(cos[depth:][:length], sin[depth:][:length], self.shapes[0].num_heads) for cos, sin in angles]
            before = self._layers(weights, rows, ropes, keys)
            drafts.append(DIFFERENTIABLE.rms_norm(before, self.norm, self.shapes[0].eps, None)[0])
        return Depths(drafts, states.final)

    def _layers(self, weights: list[LayerWeights], rows: Tensor, ropes: list, keys: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
        """The own layers over the rows of one depth [B, T, E] -> the residual stream after them; their keys and values join `keys`."""
        stream, update = rows, None
        for w, shape, known in zip(weights, self.shapes, keys, strict=True):
            out = layer_forward(w, stream, ropes[shape.local_rope], partial(_attend, known, shape), shape, DIFFERENTIABLE, update)
            stream, update = out.stream, out.update
        return stream if update is None else stream + update

    def tensors(self) -> dict[str, Tensor]:
        """See `Student`; the join's as well."""
        own = {STATE_NORM: self.state_norm.data, EMBED_NORM: self.embed_norm.data, JOIN: self.join.data}
        return super().tensors() | own | ({} if self.fuse is None else {FUSE: self.fuse.data})


def _attend(known: list[tuple[Tensor, Tensor]], shape: LayerShape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the rows of one depth, q [B, T, H, d] and k, v [B, T, G, d], which join `known`; see `unrolled_attention`."""
    known.append((k, v))
    return unrolled_attention(q, known, shape)


def unrolled_attention(q: Tensor, known: Sequence[tuple[Tensor, Tensor]], shape: LayerShape) -> Tensor:
    """Rows t of depth D (the last of `known`), at position t + D - 1: each sees the rows 0 to t of the first depth, and row t of those after it.

    q [B, T, H, d]; known: keys and values [B, T, G, d] of depths 1 to D. Returns [B, T, H, d].
    """
    depth, length, group = len(known), q.shape[1], q.shape[2] // known[0][0].shape[2]
    ahead = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)  # rows from a key of the first depth
    visible = ahead >= 0
    if shape.window is not None:
        visible &= ahead + depth - 1 < shape.window
    own = [ahead == 0 if shape.window is None or depth - d < shape.window else torch.zeros_like(visible) for d in range(2, depth + 1)]
    k, v = (torch.cat(parts, 1).repeat_interleave(group, 2).transpose(1, 2) for parts in zip(*known, strict=True))
    q = q.transpose(1, 2)
    if shape.softcap is not None:
        out = capped_attention(q, k, v, ~torch.cat([visible, *own], 1), shape.scale, shape.softcap)
    elif depth == 1 and (shape.window is None or shape.window >= length):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=shape.scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.cat([visible, *own], 1), scale=shape.scale)
    return out.transpose(1, 2)


def student_of(teacher: Teacher, num_layers: int, token_ids: Tensor, *, own_head: bool, state_layers: Sequence[int] = ()) -> Student:
    """A student as a draft head's config describes it: on the target's states after `state_layers` layers, or (none) on those at its exit."""
    if state_layers:
        return StateStudent(teacher, num_layers, token_ids, own_head=own_head, state_layers=state_layers)
    return Student(teacher, num_layers, token_ids, own_head=own_head)


@torch.no_grad()
def stream_scale(teacher: Teacher, token_ids: Tensor, positions: Tensor, layer: int) -> float:
    """Median over positions [N] of documents token_ids [B, T] of the root mean square of the teacher's residual stream after so many layers."""
    [stream], _ = teacher.run_taps(token_ids, (layer,))
    return float(stream.flatten(0, 1)[positions].float().square().mean(-1).sqrt().median())
