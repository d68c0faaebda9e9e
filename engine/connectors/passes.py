"""Features of a text's tokens, by a target's first layers and a draft's layers alone: what coding another engine's keys and values takes of ours.

Axes: T tokens, m layers that are run and never coded, G KV heads, d head size, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from codec.layouts import KeyRotation
from codec.pack import CodecPack
from codec.predictor.dense import predictor_spec
from codec.serialize import Features
from draft.early_exit import default_exit_layer
from draft.head_file import open_draft_head
from draft.source import DraftHeadSource, DraftSource, EarlyExitSource, ModelSource
from engine.errors import InvalidOption, PackMismatch
from engine.hub.fingerprint import fingerprint
from engine.kv.pool import KvSequence, PagedPool
from engine.loading import DraftChoice, choose_draft
from engine.model.config import DecoderConfig
from engine.model.decoder import Decoder
from engine.model.rope import inverse_frequencies
from engine.model.weights import open_checkpoint
from engine.runtime.drafters import load_draft_head
from engine.sessions.codec_params import load_pack
from kernels.upload import upload

PASS_TOKENS = {"cpu": 1024, "cuda": 4096}
_PAGE = 64


@dataclass(frozen=True)
class CodedModel:
    """A model folder with the codec parameters that fit it; no weights are loaded.

    prints: fingerprints of target, draft and tokenizer, the last as the codec parameters name it: token ids are all that is seen of it here.
    """

    folder: Path
    config: DecoderConfig
    choice: DraftChoice
    pack: CodecPack
    prints: dict[str, str]

    @classmethod
    def open(cls, folder: Path, draft: str, pack: str | None) -> CodedModel:
        """Args:
            draft: as for `engine.loading.choose_draft`. pack: its path; None: the one that comes with the draft.

        Raises:
            InvalidOption: no codec parameters are named or found. PackMismatch: they are another pair's. ModelNotFound, UnsupportedArchitecture,
            BadDraftHead: as the names say.
        """
        config, _ = open_checkpoint(folder)
        choice = choose_draft(draft, config)
        source: DraftSource | None = None
        if choice.head is not None:
            head, _ = open_draft_head(choice.head)
            head.check_target(config)
            source = DraftHeadSource(head, None, torch.empty(0, dtype=torch.int64), choice.head)
        elif choice.model is not None:
            source = ModelSource(None, choice.model)
        elif choice.exit_layer is not None:
            source = EarlyExitSource(choice.exit_layer)
        path: str | Path | None = pack or (None if source is None else source.codec_params_file)
        if choice.head is not None and head.state_layers:  # whose codec parameters are those of an early exit
            choice = DraftChoice(exit_layer=default_exit_layer(config.num_layers))
            source = EarlyExitSource(default_exit_layer(config.num_layers))
        if path is None:
            raise InvalidOption("no codec parameters come with this model and draft", "make a pack with scripts/calibrate.py and name it")
        drafts = "none" if source is None else source.fingerprint(lambda _, where: fingerprint(cast(Path, where)))
        prints = {"target": fingerprint(folder), "draft": drafts}
        loaded = load_pack(path, prints)
        prints["tokenizer"] = loaded.fingerprints.get("tokenizer", "none")
        return cls(folder, config, choice, loaded, prints)

    @property
    def rotation(self) -> KeyRotation:
        """Of the model's keys, on a CPU."""
        rope = self.config.rope
        return KeyRotation(inverse_frequencies(rope, self.config.head_dim), rope.attention_factor)


@dataclass(eq=False)
class TextState:
    """The caches of one text in the models that are run. length: tokens that were run."""

    sequences: list[KvSequence] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.token_ids)


class FeaturePasses:
    """Runs what the predictor of a model's codec parameters looks at.

    Args:
        model: opened. dtype: of weights and caches. device: where they lie.
        max_tokens: of all texts together that caches are kept of.

    Raises:
        What loading a decoder or a draft head raises.
    """

    def __init__(self, model: CodedModel, *, dtype: torch.dtype, device: torch.device | str, max_tokens: int) -> None:
        self.model, pack = model, model.pack
        self.first_layer = pack.layout.first_layer
        config = model.config
        layout = (config.num_layers, config.num_kv_heads, config.head_dim)
        if layout != (pack.layout.num_layers, pack.layout.num_kv_heads, pack.layout.head_dim):
            raise PackMismatch(f"the codec parameters are laid out as {pack.layout}", "calibrate them for this model")
        self.spec = predictor_spec(pack.predictor_settings)
        self.target = Decoder.from_pretrained(model.folder, dtype=dtype, device=device, num_layers=max(1, self.first_layer))
        self.head: Decoder | None = None
        self.draft: Decoder | None = None
        taps = self.spec.taps
        if model.choice.head is not None:
            own = SimpleNamespace(
                config=config,
                embed_tokens=self.target.embed_tokens,
                lm_head=None,
                dtype=self.target.dtype,
                device=self.target.device,
                gemm=self.target.gemm,
            )
            self.head = cast(Decoder, load_draft_head(model.choice.head, cast(Decoder, own)).head_layers)
        elif model.choice.model is not None and taps:
            self.draft = Decoder.from_pretrained(model.choice.model, dtype=dtype, device=device, num_layers=max(1, *taps))
        self._own_taps = tuple(tap - self.first_layer for tap in taps if tap > self.first_layer) if self.head is not None else ()
        shared = tuple(min(tap, self.first_layer) if self._own_taps else tap for tap in (() if self.draft is not None else taps))
        self._target_taps = tuple(sorted({*self.spec.target_taps, *shared, *((self.first_layer,) if self._own_taps else ())}))
        self._decoders = [self.target, *(d for d in (self.head if self._own_taps else None, self.draft) if d is not None)]
        pages = -(-max_tokens // _PAGE)
        self._pools: list[PagedPool] = [decoder.new_pool(4, _PAGE, max_pages=pages) for decoder in self._decoders]

    @property
    def weight_bytes(self) -> int:
        """Of all models that are loaded for this."""
        return sum(d.weight_bytes for d in (self.target, self.head, self.draft) if d is not None)

    @property
    def cache_bytes(self) -> int:
        """Of the pools as they are now."""
        return sum(pool.bytes for pool in self._pools)

    def open(self) -> TextState:
        """Of an empty text."""
        return TextState([pool.new_sequence() for pool in self._pools])

    def close(self, state: TextState) -> None:
        """Give its pages back."""
        for sequence in state.sequences:
            sequence.free()
        state.sequences = []

    def run(self, state: TextState, token_ids: Sequence[int]) -> Features:
        """Run the text's next tokens. Returns their features; `first_rows` then has their keys and values in the first layers.

        Raises PoolExhausted; the state is then as it was.
        """
        most = PASS_TOKENS.get(self.target.device.type, PASS_TOKENS["cpu"])
        parts = [self._pass(state, token_ids[at : at + most]) for at in range(0, len(token_ids), most)]
        return Features(*(None if rows[0] is None else torch.cat(rows) for rows in zip(*parts, strict=True)))  # type: ignore[arg-type]

    def _pass(self, state: TextState, token_ids: Sequence[int]) -> Features:
        count = len(token_ids)
        ids = torch.tensor(list(token_ids), dtype=torch.int64, device=self.target.device)
        for sequence in state.sequences:
            sequence.reserve(count)
        taken = self._forward(self.target, state.sequences[0], ids, None, self._target_taps, self.first_layer)
        states: dict[int, Any] = dict(taken)
        if self._own_taps and self.head is not None:
            more = self._forward(self.head, state.sequences[1], None, taken[self.first_layer], self._own_taps, max(self._own_taps))
            states |= {self.first_layer + tap: rows for tap, rows in more.items()}
        elif self.draft is not None:
            clipped = ids.clamp_max(self.draft.config.vocab_size - 1)
            states = self._forward(self.draft, state.sequences[1], clipped, None, self.spec.taps, max(self.spec.taps))
        draft_rows = torch.stack([states[tap] for tap in self.spec.taps], 1) if self.spec.taps else None
        target_rows = torch.stack([taken[tap] for tap in self.spec.target_taps], 1) if self.spec.target_taps else None
        for sequence in state.sequences:
            sequence.advance(count)
        state.token_ids += list(token_ids)
        return Features(draft_rows, target_rows)

    def _forward(
        self,
        decoder: Decoder,
        sequence: KvSequence,
        ids: torch.Tensor | None,
        hidden: torch.Tensor | None,
        taps: tuple[int, ...],
        last_layer: int,
    ) -> dict[int, torch.Tensor]:
        """States [count, E] after each of `taps` layers."""
        rows = ids if hidden is None else hidden
        assert rows is not None
        if last_layer == 0 and ids is not None:
            return {0: decoder.embed(ids)}
        return decoder.forward(ids, [sequence], [len(rows)], taps=taps, logits="none", last_layer=last_layer, hidden=hidden).taps

    def first_rows(self, state: TextState, start: int, end: int) -> torch.Tensor:
        """A copy of keys (rotated) and values of the first layers [m, 2, T, G, d], of tokens [start, end) that were run; start begins a page."""
        assert start % _PAGE == 0
        kv = self._pools[0].kv[: self.first_layer]
        pages = upload(state.sequences[0].pages[start // _PAGE : -(-end // _PAGE)], kv.device)
        return kv[:, :, pages].flatten(2, 3)[:, :, : end - start]
