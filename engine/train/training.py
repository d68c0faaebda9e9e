"""From a decoder to a trained draft head: teacher, training with checkpoints and a learning curve, measuring, 8 bits, the folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from draft.head_file import DraftHeadConfig, file_fields, read_draft_head, target_digest, write_draft_head
from engine.errors import InvalidOption
from engine.model.config import DecoderConfig
from engine.model.decoder import Decoder
from engine.train.data import TrainingSets
from engine.train.documents import TokenDocuments, coverage, reduced_vocabulary
from engine.train.measure import measure
from engine.train.model import Teacher
from engine.train.trainer import Progress, Trainer, TrainOptions

_MEASURES = 12  # held-out measurements in a learning curve
_CHECKPOINT_SECONDS = 60.0
_KEPT_SHARE = 0.7  # of a GPU's free memory that the target's states of the documents may take


@dataclass(frozen=True)
class Architecture:
    """A draft head's shape: m, n, R, whose head, and the layers whose states it joins (see `draft.head_file`)."""

    exit_layer: int
    draft_layers: int
    vocab_size: int
    head: Literal["own", "tied"]
    state_layers: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str, num_layers: int = 0) -> Architecture:
        """ "6,2,16384,own" -> m, n, R, head; "last,1,16384,own" or "10+20+last,1,16384,own": on states of a target of num_layers layers. Raises
        InvalidOption."""
        try:
            m, n, size, head = text.split(",")
            exit_layer, state_layers = parse_exit(m, num_layers)
            found = cls(exit_layer, int(n), int(size), cast(Literal["own", "tied"], head), state_layers)
        except (ValueError, InvalidOption) as error:
            remedy = "write exit layer, draft layers, vocabulary, own or tied: 6,2,16384,own"
            raise InvalidOption(f"{text!r} does not describe a draft head", remedy) from error
        if head not in ("own", "tied"):
            raise InvalidOption(f"a head of kind {head!r}", "use own or tied")
        return found

    def cost(self, config: DecoderConfig) -> float:
        """Weights a draft step reads, as a share of those a target step reads (the looked-up embedding row aside)."""
        c = config
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        layer = c.hidden_size * (2 * q + 2 * kv + 3 * c.intermediate_size)
        below = 2 * c.hidden_size**2 if self.state_layers else self.exit_layer * layer
        read = below + self.draft_layers * layer + self.vocab_size * c.hidden_size
        return read / (c.num_layers * layer + c.vocab_size * c.hidden_size)


def parse_exit(text: str, num_layers: int) -> tuple[int, tuple[int, ...]]:
    """ "6" -> an exit after layer 6 (6, ()); "last" -> the states after the last of num_layers layers (num_layers, (num_layers,)); "10+20+last" ->
    those after several. Raises InvalidOption."""
    *lower, top = text.split("+")
    try:
        if top != "last":
            return int(text), ()
        return num_layers, (*map(int, lower), num_layers)
    except ValueError as error:
        raise InvalidOption(f"an exit layer {text!r}", "give a number of layers, last, or several up to the last: 10+20+last") from error


def teacher_of(decoder: Decoder) -> Teacher:
    """The decoder's weights as a teacher; packed ones are unpacked into copies.

    Raises:
        InvalidOption: its logits are capped, which the losses know nothing of.
    """
    if decoder.config.logit_softcap is not None:
        raise InvalidOption("a draft head for a target whose logits are capped", "use its own first layers as the draft")
    head = decoder.embed_tokens.weight.data if decoder.lm_head is None else decoder.lm_head.weight
    layers = [layer.weights().plain() for layer in decoder.layers]  # type: ignore[operator]
    ropes = [decoder.rope_table(local=local) for local in ([False] if decoder.config.local_rope is None else [False, True])]
    return Teacher(
        decoder.embed_tokens.weight.data,
        layers,
        decoder.output_norm,
        head,
        decoder.layer_shapes,
        lambda length: [rope.slice(0, length) for rope in ropes],
        decoder.config.embedding_scale,
    )


class DraftHeadTraining:
    """One training: its trainer, its learning curve, and what becomes of the result.

    Args:
        special: token ids that the reduced vocabulary must hold.
        options: the architecture's fields in it are replaced.
    """

    def __init__(
        self,
        decoder: Decoder,
        teacher: Teacher,
        sets: TrainingSets,
        special: Sequence[int],
        architecture: Architecture,
        options: TrainOptions,
    ) -> None:
        self.decoder, self.teacher, self.sets, self.architecture = decoder, teacher, sets, architecture
        ids = reduced_vocabulary(sets.train, decoder.config.vocab_size, architecture.vocab_size, special)
        a = architecture
        self.options = replace(options, exit_layer=a.exit_layer, draft_layers=a.draft_layers, head=a.head, state_layers=a.state_layers)
        free = torch.cuda.mem_get_info(decoder.device)[0] if decoder.device.type == "cuda" else 0
        self.trainer = Trainer(teacher, ids, sets.train, self.options, keep_bytes=int(_KEPT_SHARE * free))
        self.curve: list[dict[str, Any]] = []

    def start_from(self, folder: str | Path) -> dict[str, dict[str, Any]]:
        """Begin with the weights of a draft head of this shape, whose figures on the held-out sets are returned. A head that is the target's own rows
        may have another vocabulary. Raises InvalidOption for another shape or target, and what `read_draft_head` raises."""
        config, tensors = read_draft_head(folder)
        ours = (self.architecture.exit_layer, self.architecture.draft_layers, self.architecture.head, self.architecture.state_layers)
        theirs = (config.exit_layer, config.num_layers, config.head, config.state_layers)
        if ours != theirs or config.target_fingerprint_config != target_digest(self.decoder.config):
            what = f"the draft head in {folder} has exit layer, layers, head and states {theirs}, of {config.target}; asked are {ours}"
            raise InvalidOption(what, "train the shape and target that it has, or start without it")
        known = tensors.pop("token_ids")
        if self.trainer.student.own_head and not torch.equal(known.cpu(), self.trainer.token_ids.cpu()):
            raise InvalidOption("a trained head of another vocabulary cannot be gone on from", "start without it, or use a tied head")
        for student in (self.trainer.student, self.trainer.averaged):
            student.load_tensors(tensors)
        return self.all_measured()

    def run(
        self,
        log: Callable[[str], None],
        *,
        checkpoint: Path | None = None,
        resume: bool = False,
        pause_after: float | None = None,
        report_every: int = 50,
    ) -> bool:
        """Train to the end (True), or until `pause_after` seconds of this call have passed (False); a checkpoint is written each minute and
        at the end. Raises CheckpointMismatch, InvalidOption."""
        started = saved = time.monotonic()
        if resume:
            if checkpoint is None:
                raise InvalidOption("nothing to resume from", "name the checkpoint with --checkpoint")
            if checkpoint.exists():
                self.curve = self.trainer.restore(checkpoint)["curve"]
                log(f"resumed at step {self.trainer.step}, {self.trainer.seconds:.0f} s in")

        if self.decoder.device.type == "cuda":
            kept = "kept: it runs each of them once" if self.trainer.kept is not None else "not kept, they would take too much memory"
            log(f"the target's states of {len(self.sets.train.tokens):,} tokens are {kept}")

        def report(progress: Progress) -> None:
            nonlocal saved
            entry: dict[str, Any] = {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(progress).items()}
            line = (
                f"step {progress.step} ({self.trainer.progress():.0%}), epoch {progress.epoch:.2f}: acceptance {progress.acceptance:.4f}, "
                f"agreement {progress.agreement:.4f}, divergence {progress.divergence:.3f}, mix {progress.mix:.2f}, "
                f"{progress.tokens_per_s:,.0f} tokens/s"
            )
            if int(self.trainer.progress() * _MEASURES) > len([e for e in self.curve if "held_out" in e]):
                entry["held_out"] = self.measured(self.sets.sampled, greedy=False)
                line += f"; held out {entry['held_out']['acceptance']:.4f}, {entry['held_out']['tokens_per_step']:.3f} tokens a step"
            self.curve.append(entry)
            log(line)
            if checkpoint is not None and time.monotonic() - saved > _CHECKPOINT_SECONDS:
                saved = time.monotonic()
                self.trainer.save(checkpoint, {"curve": self.curve})

        def paused() -> bool:
            return pause_after is not None and time.monotonic() - started > pause_after

        done = self.trainer.run(paused, report, report_every)
        if checkpoint is not None:
            self.trainer.save(checkpoint, {"curve": self.curve})
        return done

    def all_measured(self) -> dict[str, dict[str, Any]]:
        """`measured` on every held-out set: temperature_1 and greedy, and the same after given_ and other_ for answers to given messages."""
        groups = {"temperature_1": (self.sets.sampled, False), "greedy": (self.sets.greedy, True)}
        for name, pair in (("given", self.sets.given), ("other", self.sets.other)):
            if pair is not None:
                groups |= {f"{name}_temperature_1": (pair[0], False), f"{name}_greedy": (pair[1], True)}
        return {name: self.measured(docs, greedy=greedy) for name, (docs, greedy) in groups.items()}

    def measured(self, docs: TokenDocuments, *, greedy: bool) -> dict[str, Any]:
        """Held-out figures of the averaged weights, as plain values (see `engine.train.measure.Measured`)."""
        t = self.trainer
        found = measure(
            self.teacher,
            t.averaged,
            t.teacher_head,
            self.architecture.exit_layer,
            docs,
            greedy=greedy,
            batch_tokens=self.options.batch_tokens,
            chunk=self.options.chunk,
        )
        return found.as_dict()

    def figures(self) -> dict[str, Any]:
        """Everything worth reporting of the training as it stands, as plain values."""
        t, c = self.trainer, self.decoder.config
        device = torch.cuda.get_device_name(self.decoder.device) if self.decoder.device.type == "cuda" else "cpu"
        return {
            "architecture": file_fields(self.architecture),
            "draft_step_cost": round(self.architecture.cost(c), 4),
            "coverage": round(coverage(self.sets.sampled, t.token_ids), 4),
            "steps": t.step,
            "epochs": round(t.epochs, 2),
            "trained_tokens": t.tokens,
            "training_seconds": round(t.seconds, 1),
            "states_kept": t.kept is not None,
            "options": file_fields(self.options),
            "data": self.sets.train.facts,
            "data_documents": len(self.sets.train),
            "data_tokens": len(self.sets.train.tokens),
            "device": device,
            "torch": torch.__version__,
            "held_out_documents": len(self.sets.sampled),
            **self.all_measured(),
        }

    def save(self, folder: Path, target: str, bits: Literal[8, 16], figures: dict[str, Any]) -> dict[str, Any]:
        """Write the draft head; returns the figures with those of the stored weights added, which the folder's config.json also holds."""
        t, a = self.trainer, self.architecture
        tensors = t.averaged.tensors() | {"token_ids": t.token_ids}
        digest = target_digest(self.decoder.config)
        config = DraftHeadConfig(target, digest, a.exit_layer, a.draft_layers, a.vocab_size, a.head, bits, state_layers=a.state_layers)
        write_draft_head(folder, config, tensors)
        _, stored = read_draft_head(folder)
        kept = {name: tensor.clone() for name, tensor in t.averaged.tensors().items()}
        t.averaged.load_tensors(stored)
        figures = figures | {"stored_bits": bits, "stored": self.all_measured()}
        t.averaged.load_tensors(kept)
        config = write_draft_head(folder, replace(config, training=figures), tensors)
        return figures | {"adapter_digest": config.digest, "adapter_bytes": sum(f.stat().st_size for f in folder.glob("adapter.*"))}
