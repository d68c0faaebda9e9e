"""What a draft head is trained for, over a reduced vocabulary, in chunks so that no full table of logits is ever held.

p is the target's distribution over its whole vocabulary, q the draft's over the R reduced tokens. A proposal drawn from q is accepted with
probability sum min(p, q) (Leviathan et al., 2023, arXiv 2211.17192); what p puts outside the R tokens is lost acceptance. Two losses:
the divergence sum over R of p (log p - log q), which has a gradient everywhere, and 1 - sum over R of min(p, q), half the L1 distance (total
variation) but for what lies outside, which is the thing itself (DistillSpec, Zhou et al., 2024, arXiv 2310.08461, compares them).
Their gradients in the logits are closed forms (`kernels.distil_gradient`), so no graph of them is kept.

Axes: N positions, C positions of a chunk, E hidden size, V vocabulary, R reduced vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.distil_gradient import distil_gradient


@dataclass(frozen=True)
class TeacherHead:
    """The target's head with its rows reordered: those of the reduced vocabulary first.

    rows: [V, E]. size: R. place: [V] int64, where a token's row stands.
    """

    rows: Tensor
    size: int
    place: Tensor

    @classmethod
    def of(cls, head: Tensor, token_ids: Tensor) -> TeacherHead:
        """head [V, E], token_ids [R] int64 ascending."""
        ids = token_ids.to(head.device)
        outside = torch.ones(head.shape[0], dtype=torch.bool, device=head.device)
        outside[ids] = False
        order = torch.cat([ids, outside.nonzero()[:, 0]])
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=head.device)
        return cls(head[order].contiguous(), len(ids), place)


class Totals(NamedTuple):
    """Of the target's logits over its whole vocabulary, at each of N positions."""

    log_sum: Tensor  # [N] float32: the logarithm of the sum of their exponentials
    best: Tensor  # [N] int64: where in the teacher head's order the largest one stands


class Sums(NamedTuple):
    """Sums over positions, as float32 scalars on the device."""

    accepted: Tensor  # sum min(p, q): expected acceptance at temperature 1
    agreed: Tensor  # positions where both name the same most likely token
    divergence: Tensor  # nats, over the reduced vocabulary
    covered: Tensor  # p's mass in the reduced vocabulary


class Gradients(NamedTuple):
    """Mean loss's gradients: of the draft's states [N, E], or [D, N, E] of D depths, in their dtype, and of its head [R, E] float32 (None: not asked
    for)."""

    states: Tensor
    head: Tensor | None


@torch.no_grad()
def totals_of(teacher_states: Tensor, teacher: TeacherHead, *, chunk: int) -> Totals:
    """Totals of teacher_states [N, E], the target's after its final norm; chunk: positions whose V logits are held at a time."""
    found = Totals(
        torch.empty(len(teacher_states), device=teacher_states.device),
        torch.empty(len(teacher_states), dtype=torch.int64, device=teacher_states.device),
    )
    for a in range(0, len(teacher_states), chunk):
        wide = teacher_states[a : a + chunk] @ teacher.rows.T
        best = wide.argmax(-1, keepdim=True)
        log_p = torch.log_softmax(wide, -1, dtype=torch.float32)  # one pass over the logits, which a sum of exponentials has no kernel for
        found.log_sum[a : a + chunk] = (wide.gather(1, best).float() - log_p.gather(1, best))[:, 0]
        found.best[a : a + chunk] = best[:, 0]
    return found


@torch.no_grad()
def distil(
    states: Tensor,
    head: Tensor,
    teacher_states: Tensor,
    teacher: TeacherHead,
    mix: float,
    *,
    head_gradient: bool,
    chunk: int,
    weights: Tensor | None = None,
    totals: Totals | None = None,
) -> tuple[Sums, Gradients]:
    """Sums and gradients of (1 - mix) KL + mix TV, the mean over positions.

    Args:
        states: [N, E] the draft's states after its final norm, or [D, N, E] those of D depths of a block, whose losses are added up; the sums are the
            first's. head: [R, E] its head, of the same dtype.
        teacher_states: [N, E] the target's after its final norm.
        mix: share of total variation, 0 to 1.
        chunk: positions at a time.
        weights: [D, N] float32 of the depths' losses at each position; None: 1.
        totals: `totals_of` the teacher's states, where they are known.
    """
    totals = totals_of(teacher_states, teacher, chunk=chunk) if totals is None else totals
    deep = states if states.dim() == 3 else states[None]
    count = deep.shape[1]
    grad_states = torch.empty_like(deep)
    grad_head = torch.zeros(head.shape, device=head.device) if head_gradient else None
    sums = torch.zeros(4, device=states.device)
    for a in range(0, count, chunk):
        own = slice(a, a + chunk)
        wanted = teacher_states[own] @ teacher.rows[: teacher.size].T
        for depth, rows in enumerate(deep[:, own]):
            logits = rows @ head.T
            found = distil_gradient(logits, wanted, totals.log_sum[own], mix, None if weights is None else weights[depth, own])
            gradient = logits  # in their place
            if depth == 0:
                agreed = (totals.best[own] == found.best).sum()
                sums += torch.stack([found.accepted.sum(), agreed, found.divergence.sum(), found.covered.sum()])
            grad_states[depth, own] = (gradient @ head) / count
            if grad_head is not None:
                grad_head += (gradient.T @ rows).float()
    if grad_head is not None:
        grad_head /= count
    return Sums(*sums), Gradients(grad_states.view_as(states), grad_head)


def _log_probabilities(rows: Tensor, teacher: TeacherHead, log_sum: Tensor) -> Tensor:
    """log p [C, R] float32 of the reduced vocabulary, from the target's states [C, E] and what its logits add up to [C]."""
    return (rows @ teacher.rows[: teacher.size].T).float().sub_(log_sum[:, None])


class Scores(NamedTuple):
    """Per position, float32 [N] unless said otherwise."""

    accepted: Tensor  # sum min(p, q)
    agreed: Tensor  # [N] bool
    kept: (
        Tensor  # min(1, q / p) at the token that follows: the chance that this token, given that it was drawn from p, was an accepted draft
    )
    divergence: Tensor
    covered: Tensor


@torch.no_grad()
def score(
    states: Tensor, head: Tensor, teacher_states: Tensor, teacher: TeacherHead, labels: Tensor, *, chunk: int, totals: Totals | None = None
) -> Scores:
    """How well the draft does at each position; arguments as `distil`'s, labels [N] int64 the tokens that follow."""
    totals = totals_of(teacher_states, teacher, chunk=chunk) if totals is None else totals
    found: list[tuple[Tensor, ...]] = []
    for a in range(0, states.shape[0], chunk):
        own = slice(a, a + chunk)
        log_p = _log_probabilities(teacher_states[own], teacher, totals.log_sum[own])
        narrow = states[own] @ head.T
        log_q, agreed = torch.log_softmax(narrow, -1, dtype=torch.float32), totals.best[own] == narrow.argmax(-1)
        place = teacher.place[labels[own]]
        inside = place.clamp_max(teacher.size - 1)[:, None]
        ratio = (log_q.gather(1, inside) - log_p.gather(1, inside))[:, 0].exp()
        p, q = log_p.exp(), log_q.exp()
        kept = torch.where(place < teacher.size, ratio.clamp_max(1.0), 0.0)
        found.append((torch.minimum(p, q).sum(-1), agreed, kept, (p * (log_p - log_q)).sum(-1), p.sum(-1)))
    return Scores(*(torch.cat(parts) for parts in zip(*found, strict=True)))
