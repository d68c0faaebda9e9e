"""Distillation of a draft head: the loop, its schedule, its checkpoints.

The target runs a batch of whole documents once; its states at the exit layer feed the student, its last states say what the student should have
said. Those states at the exit are exact at inference too, whatever was proposed (verification writes them), and the student's own keys and values come
from them: so training on the target's text alone is what drafting meets, at every position of a block. A student on the target's last states is fed its
own within a block: it is unrolled over `unroll` places of it (`engine.train.state_model`).

Deterministic on a CPU from seed, data and number of steps, through any number of interruptions; a training limited by time is as
deterministic as the clock. Weights are averaged exponentially (Polyak and Juditsky, 1992); the average is what is measured and kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from draft.errors import CheckpointMismatch, ExitLayerError, TrainingError
from draft.head_file import file_fields
from engine.files import atomic_file
from engine.train.documents import TokenDocuments, epoch_order, make_batch
from engine.train.kept_states import KeptStates
from engine.train.loss import TeacherHead, distil, totals_of
from engine.train.model import Student, Teacher
from engine.train.state_model import StateStudent, stream_scale, student_of

CHECKPOINT_VERSION = 1


@dataclass(frozen=True)
class TrainOptions:
    """exit_layer, draft_layers: m and n. head: "own" (trained) or "tied" (the target's rows). steps or seconds: where the training ends, one of
    them. batch_tokens: of a step, padding included. optimizer: "adamw", or "muon" for the layers' matrices (Jordan et al., 2024; steps scaled to
    AdamW's, Liu et al., 2025, arXiv 2502.16982) with AdamW for the rest. learning_rate: peak, after `warmup_steps`, falling as a cosine to a
    fiftieth. mix_from, mix_to: part of the training over which the loss goes from divergence to total variation. averaging: highest decay of the
    averaged weights. chunk: positions whose logits are held at a time. state_layers: numbers of the layers whose states are joined with embeddings, the
    target's last one, which is exit_layer too, at the end (see `draft.head_file`); then unroll: places of a block that are trained; unroll_weight: of
    each place's loss in the one before's."""

    exit_layer: int
    draft_layers: int
    head: str = "own"
    steps: int | None = None
    seconds: float | None = None
    batch_tokens: int = 32_768
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    mix_from: float = 0.4
    mix_to: float = 0.6
    averaging: float = 0.998
    chunk: int = 8192
    seed: int = 0
    state_layers: tuple[int, ...] = ()
    unroll: int = 3
    unroll_weight: float = 0.8


@dataclass(frozen=True)
class Progress:
    """What a step reports: figures are means over the positions since the last report."""

    step: int
    epoch: float
    seconds: float
    tokens: int
    tokens_per_s: float
    acceptance: float
    agreement: float
    divergence: float
    mix: float
    learning_rate: float


class Trainer:
    """Trains the student of `teacher` on `documents`; `student` holds the live weights, `averaged` the kept ones.

    Args:
        keep_bytes: memory that the target's states of the documents may take, so that it runs each of them once, whatever the epochs (`kept`: those
            states, None where they take more). A resumed training looks other states up than one that was never interrupted, by a rounding.

    Raises:
        ExitLayerError, TrainingError: options that do not fit the target or each other.
    """

    def __init__(
        self, teacher: Teacher, token_ids: Tensor, documents: TokenDocuments, options: TrainOptions, *, keep_bytes: int = 0
    ) -> None:
        total = len(teacher.layers)
        joined = options.state_layers
        if joined and (joined[-1] != total or options.exit_layer != total or joined[0] < 1 or any(a >= b for a, b in pairwise(joined))):
            what = f"states after {list(joined)} layers, with an exit after layer {options.exit_layer}, of a target of {total} layers"
            raise ExitLayerError(what, f"give layers in order, from 1 on, and {total} at the end, which is the exit layer too")
        if (not joined and not 1 <= options.exit_layer < total) or not 1 <= options.draft_layers <= total:
            what = f"an exit after layer {options.exit_layer} and {options.draft_layers} draft layers do not fit a target of {total}"
            raise ExitLayerError(what, f"choose an exit layer between 1 and {total - 1}, and draft layers from 1 on")
        if (options.steps is None) == (options.seconds is None) or (options.steps or options.seconds or 0) <= 0:
            raise TrainingError("a training needs an end: steps or seconds", "give exactly one of them, above 0")
        if options.head not in ("own", "tied") or options.optimizer not in ("adamw", "muon"):
            raise TrainingError(f"head {options.head!r}, optimizer {options.optimizer!r}", "heads: own, tied; optimizers: adamw, muon")
        self.teacher, self.documents, self.options = teacher, documents, options
        self.token_ids, self.dtype, self.device = token_ids, teacher.norm.dtype, teacher.norm.device
        self.teacher_head = TeacherHead.of(teacher.head, token_ids)
        own_head = options.head == "own"
        self.student, averaged = (
            student_of(teacher, options.draft_layers, token_ids, own_head=own_head, state_layers=joined) for _ in range(2)
        )
        self.averaged = averaged.requires_grad_(False)
        self.optimizers = _optimizers(self.student, options, self.device)
        self.step, self.epoch, self.cursor, self.tokens, self.seconds = 0, 0, 0, 0, 0.0
        self._order: list[np.ndarray] = epoch_order(documents, options.batch_tokens, options.seed, 0)
        if isinstance(self.student, StateStudent) and isinstance(averaged, StateStudent):
            batch = make_batch(documents, self._order[0], self.device)
            scale = stream_scale(teacher, batch.token_ids, batch.positions, total - options.draft_layers)
            self.student.scale_rows(scale)
            averaged.scale_rows(scale)
        taps = self.student.taps(options.exit_layer)
        kept = KeptStates.num_bytes(teacher, documents, taps) <= keep_bytes
        self.kept = KeptStates(teacher, documents, taps) if kept else None
        self._sums = torch.zeros(5, device=self.device)
        self._reported = (0, 0.0)  # tokens and seconds at the last report
        self._data_digest = documents.digest

    # --- running --------------------------------------------------------------------------------------------------------

    def progress(self) -> float:
        """How much of the training is done, 0 to 1."""
        done = self.step / self.options.steps if self.options.steps else self.seconds / (self.options.seconds or 1.0)
        return min(1.0, done)

    @property
    def epochs(self) -> float:
        """Times the documents were gone through."""
        return self.epoch + self.cursor / len(self._order)

    def schedule(self) -> tuple[float, float]:
        """(learning rate, share of total variation in the loss) of the next step."""
        o, done = self.options, self.progress()
        falling = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
        rate = o.learning_rate * min(1.0, (self.step + 1) / max(1, o.warmup_steps)) * falling
        ramp = min(1.0, max(0.0, (done - o.mix_from) / max(1e-9, o.mix_to - o.mix_from)))
        return rate, ramp * ramp * (3 - 2 * ramp)

    def run(
        self, until: Callable[[], bool] = lambda: False, report: Callable[[Progress], None] | None = None, report_every: int = 50
    ) -> bool:
        """Train to the end, or until `until()` says so after a step; `report` is called every `report_every` steps. True at the end."""
        clock = time.monotonic()
        while self.progress() < 1.0:
            self._step_once()
            if report is not None and self.step % report_every == 0:
                self._wait()
            now = time.monotonic()
            self.seconds, clock = self.seconds + now - clock, now
            if report is not None and self.step % report_every == 0:
                report(self._report())
                clock = time.monotonic()  # what a report does (measuring, say) is not training
            if until():
                break
        self._wait()
        return self.progress() >= 1.0

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _step_once(self) -> None:
        o = self.options
        # a user's message is never drafted
        indices = self._next_documents()
        batch = make_batch(self.documents, indices, self.device, answers_only=True)
        rate, mix = self.schedule()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        depths = o.unroll if o.state_layers else 1
        if self.kept is None:
            target = self.teacher.run_taps(batch.token_ids, self.student.taps(o.exit_layer))
            totals = totals_of(target.final.flatten(0, 1)[batch.positions], self.teacher_head, chunk=o.chunk)
        else:
            target, totals = self.kept.of(indices, batch, self.teacher_head, o.chunk)
        found = self.student.at_depths(self.teacher, batch.token_ids, target, depths)
        parts, reached = zip(*(found.rows(depth, batch.positions) for depth in range(depths)), strict=True)
        states = torch.stack(parts)
        weights = torch.stack([own * o.unroll_weight**depth for depth, own in enumerate(reached)])
        head = self.student.head.detach().to(self.dtype)
        sums, gradients = distil(
            states.detach(),
            head,
            found.final.flatten(0, 1)[batch.positions],
            self.teacher_head,
            mix,
            head_gradient=self.student.own_head,
            chunk=o.chunk,
            weights=weights if depths > 1 else None,
            totals=totals,
        )
        states.backward(gradients.states)
        if gradients.head is not None:
            self.student.head.grad = gradients.head
        torch.nn.utils.clip_grad_norm_([p for p in self.student.parameters() if p.requires_grad], o.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += len(batch.positions)
        self._sums += torch.stack([*sums, torch.ones_like(sums.accepted) * len(batch.positions)])
        self._average()

    @torch.no_grad()
    def _average(self) -> None:
        weight = 1 - min(self.options.averaging, self.step / (self.step + 10))
        kept: list[Tensor] = [p.detach() for p in self.averaged.parameters()]
        torch._foreach_lerp_(kept, [p.detach() for p in self.student.parameters()], weight)

    def _next_documents(self) -> np.ndarray:
        if self.cursor == len(self._order):
            self.epoch, self.cursor = self.epoch + 1, 0
            self._order = epoch_order(self.documents, self.options.batch_tokens, self.options.seed, self.epoch)
        self.cursor += 1
        return self._order[self.cursor - 1]

    def _report(self) -> Progress:
        accepted, agreed, divergence, _covered, count = self._sums.tolist()
        tokens, seconds = self.tokens - self._reported[0], self.seconds - self._reported[1]
        self._reported = (self.tokens, self.seconds)
        self._sums.zero_()
        rate, mix = self.schedule()
        return Progress(
            self.step,
            self.epochs,
            self.seconds,
            self.tokens,
            tokens / max(seconds, 1e-9),
            accepted / count,
            agreed / count,
            divergence / count,
            mix,
            rate,
        )

    # --- checkpoints ----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, extra: dict[str, Any] | None = None) -> None:
        """Write everything a later run needs to go on, under a temporary name first. extra: plain values returned by `restore`."""
        state = {
            "version": CHECKPOINT_VERSION,
            "options": file_fields(self.options),
            "data": self._data_digest,
            "token_ids": self.token_ids.cpu(),
            "student": self.student.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "place": [self.step, self.epoch, self.cursor, self.tokens, self.seconds],
            "sums": self._sums,
            "reported": list(self._reported),
            "extra": extra or {},
        }
        with atomic_file(path) as file:
            torch.save(state, file)

    def restore(self, path: str | Path) -> dict[str, Any]:
        """Go on where `save` left off; returns its `extra`. The end (steps or seconds) may be another than it was.

        Raises:
            CheckpointMismatch: the file is damaged, or from a training with other options, data or vocabulary.
        """
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            version = state["version"]
        except Exception as error:  # torch.load names no closed set of errors for a damaged file
            raise CheckpointMismatch(f"{path} is no checkpoint: {error}", "start again without --resume") from error
        ends = ("steps", "seconds", "chunk")
        ours, theirs = ({k: v for k, v in options.items() if k not in ends} for options in (file_fields(self.options), state["options"]))
        different = sorted(key for key in ours if ours[key] != theirs.get(key))
        if (
            version != CHECKPOINT_VERSION
            or different
            or state["data"] != self._data_digest
            or not torch.equal(state["token_ids"].cpu(), self.token_ids.cpu())
        ):
            what = f"other {', '.join(different)}" if different else "other data"
            raise CheckpointMismatch(f"{path} is of a training with {what}", "use the same options and data, or start without --resume")
        self.student.load_state_dict(state["student"])
        self.averaged.load_state_dict(state["averaged"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step, self.epoch, self.cursor, self.tokens, self.seconds = state["place"]
        self._sums, self._reported = state["sums"], (int(state["reported"][0]), float(state["reported"][1]))
        self._order = epoch_order(self.documents, self.options.batch_tokens, self.options.seed, self.epoch)
        return state["extra"]


def _optimizers(student: Student, options: TrainOptions, device: torch.device) -> list[torch.optim.Optimizer]:
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    inner = [p for name, p in trained.items() if p.dim() > 1 and name != "head"] if options.optimizer == "muon" else []
    left = {name: p for name, p in trained.items() if all(p is not other for other in inner)}
    groups = [
        {"params": [p for p in left.values() if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in left.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), eps=1e-9, fused=device.type == "cuda")
    ]
    if inner:
        made.append(torch.optim.Muon(inner, lr=options.learning_rate, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return made
