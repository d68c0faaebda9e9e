"""How good a draft head is on held-out documents: acceptance, and what whole blocks of proposals would bring.

Blocks are replayed on the documents themselves. Text that a target wrote at temperature 1 is distributed as speculative decoding would write it,
and given its next token x the draft there was x and accepted with probability min(1, q(x) / p(x)); a greedy text's token was drafted if both
most likely tokens agree. What is drafted after an accepted token has the document's own tokens before it, so walking along a document with these
probabilities is speculative decoding itself, without running it. A draft on the target's states is fed its own ones within a block: its chances are
those of each place there.

Axes: N positions, k proposals of a block.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from engine.train.documents import TokenDocuments, batches
from engine.train.loss import TeacherHead, score, totals_of
from engine.train.model import Student, Teacher


@dataclass(frozen=True)
class Measured:
    """Over the answers of held-out documents. acceptance: mean sum min(p, q). agreement: same most likely token. divergence: nats. covered: p's
    mass in the reduced vocabulary. tokens_per_step: replayed with k proposals a block. by_position: accepted share of the proposals at each
    place of a block that were reached (all before them accepted). by_depth: acceptance (mean sum min(p, q)) at each place of a block, for a draft that
    says other things there."""

    positions: int
    acceptance: float
    agreement: float
    divergence: float
    covered: float
    tokens_per_step: float
    by_position: list[float]
    by_depth: list[float] = field(default_factory=list)

    def as_dict(self) -> dict:
        """Plain values, rounded; without an empty by_depth."""
        values = {k: v for k, v in asdict(self).items() if k != "by_depth" or v}
        return {k: [round(x, 4) for x in v] if isinstance(v, list) else round(v, 4) for k, v in values.items()}


@torch.no_grad()
def measure(
    teacher: Teacher,
    student: Student,
    head: TeacherHead,
    exit_layer: int,
    documents: TokenDocuments,
    *,
    greedy: bool,
    proposals: int = 4,
    batch_tokens: int = 32_768,
    chunk: int = 8192,
) -> Measured:
    """Measure a student on documents whose answers the target wrote at temperature 1, or greedily, or of a model that only
    answers."""
    device, dtype = teacher.norm.device, teacher.norm.dtype
    rows = student.head.detach().to(dtype)
    columns: list[list[np.ndarray]] = [[] for _ in range(5)]
    lines: list[np.ndarray] = []  # chances that each token of a document's answer was an accepted proposal, by place in the block
    deeper: list[list[np.ndarray]] = []
    for batch in batches(documents, batch_tokens, device):
        width = batch.token_ids.shape[1]
        where = batch.positions[batch.answer]
        if not len(where):
            continue
        found = student.at_depths(teacher, batch.token_ids, teacher.run_taps(batch.token_ids, student.taps(exit_layer)), proposals)
        final, labels, chances = found.final.flatten(0, 1)[where], batch.labels[batch.answer], []
        totals = totals_of(final, head, chunk=chunk)
        for depth in range(len(found.drafts)):
            states, _ = found.rows(depth, where)
            scores = score(states, rows, final, head, labels, chunk=chunk, totals=totals)
            host = [part.float().cpu().numpy() for part in scores]
            if depth == 0:
                for column, part in zip(columns, host, strict=True):
                    column.append(part)
            if len(found.drafts) > 1:
                deeper += [[] for _ in range(len(found.drafts) - len(deeper))]
                deeper[depth].append(host[0])
            chances.append(host[1] if greedy else host[2])
        document = (where // width).cpu().numpy()
        lines += np.split(np.stack(chances), np.flatnonzero(np.diff(document)) + 1, axis=1)
    accepted, agreed, _, divergence, covered = (float(np.concatenate(column).mean()) for column in columns)
    per_step, by_position = replay(lines, proposals)
    by_depth = [float(np.concatenate(column).mean()) for column in deeper]
    return Measured(sum(line.shape[-1] for line in lines), accepted, agreed, divergence, covered, per_step, by_position, by_depth)


def replay(lines: list[np.ndarray], proposals: int, seed: int = 0) -> tuple[float, list[float]]:
    """Walk along documents in blocks of `proposals` drafts.

    lines: per document, the chance that each of its tokens was an accepted proposal [n], or [k, n] by its place in the block.

    Returns:
        mean tokens a step (a block cut short by a document's end is left out), and by place in the block the share accepted of those reached.
    """
    rng = np.random.default_rng(seed)
    steps = tokens = 0
    reached, accepted = np.zeros(proposals), np.zeros(proposals)
    for line in lines:
        drawn: np.ndarray = rng.random(line.shape[-1:])  # a token is a proposal at most once
        hits = np.broadcast_to(np.less(drawn, line), (proposals, len(drawn)))
        at = 0
        while at + proposals < len(drawn):
            run = 0
            while run < proposals and hits[run, at + run]:
                run += 1
            reached[: min(run + 1, proposals)] += 1
            accepted[:run] += 1
            steps, tokens, at = steps + 1, tokens + run + 1, at + run + 1
    return tokens / max(1, steps), [float(a / r) if r else 0.0 for a, r in zip(accepted, reached, strict=True)]
