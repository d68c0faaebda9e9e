"""What a trunk draft is trained and measured on: conversations of the target with itself, and text that the user adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from draft.train_data import TokenDocuments
from engine.calibration_text import MIN_DOCUMENT_TOKENS, documents, read_texts, text_files
from engine.chat_opening import ChatOpening
from engine.decoder import Decoder
from engine.errors import InvalidOption
from engine.self_text import SelfTextOptions, draw

_FILES = ("train.npz", "temperature-1.npz", "greedy.npz")
_SEED_STEP = 1_000_003  # held-out sets are drawn with other seeds than what is trained on


@dataclass(frozen=True)
class TrainingSets:
    """train: what is learned from. sampled, greedy: held out, with answers at temperature 1 and greedy ones."""

    train: TokenDocuments
    sampled: TokenDocuments
    greedy: TokenDocuments

    def save(self, folder: Path) -> None:
        """Three files in the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, docs in zip(_FILES, (self.train, self.sampled, self.greedy), strict=True):
            docs.save(folder / name)

    @classmethod
    def load(cls, folder: Path) -> TrainingSets | None:
        """What `save` wrote; None when the folder holds none of it. Raises TrainingDataError for damaged files."""
        if not (folder / _FILES[0]).exists():
            return None
        return cls(*(TokenDocuments.load(folder / name) for name in _FILES))


def draw_sets(
    decoder: Decoder,
    chat: ChatOpening,
    options: SelfTextOptions,
    *,
    held_out: int,
    tokens: int | None,
    seconds: float | None,
    log: Callable[[str], None],
) -> TrainingSets:
    """Held-out sets of about `held_out` conversations each, then the training set by `tokens` or `seconds` (see `draw`)."""
    sets = []
    for number, temperature in ((1, 1.0), (2, 0.0)):
        chosen = replace(options, rows=held_out, answer_temperature=temperature, seed=options.seed + number * _SEED_STEP)
        sets.append(draw(decoder, chat, chosen, tokens=held_out * options.context))
        log(f"held out: {len(sets[-1])} conversations with answers at temperature {temperature:g}, {sets[-1].facts['seconds']} s")
        release(decoder.device)
    train = draw(decoder, chat, options, tokens=tokens, seconds=seconds, log=log)
    release(decoder.device)
    facts = train.facts
    log(f"to train on: {len(train):,} conversations, {facts['drawn_tokens']:,} tokens drawn at {facts['tokens_per_s']:,} tokens/s")
    return TrainingSets(train, *sets)


def release(device: torch.device) -> None:
    """Give the memory of what is no longer used back to the device."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def choose_rows(decoder: Decoder, context: int, most: int = 4096) -> int:
    """Conversations at a time that suit the device: on a GPU what 70% of its free memory holds, on a CPU 16."""
    if decoder.device.type != "cuda":
        return 16
    c = decoder.config
    row = context * c.num_layers * c.kv_width * decoder.dtype.itemsize + 24 * c.vocab_size + 64 * c.hidden_size
    return max(32, min(most, int(0.7 * torch.cuda.mem_get_info(decoder.device)[0] / row) // 32 * 32))


def add_text(sets: TrainingSets, sources: Sequence[str | Path], tokenizer: Any, share: float, context: int, seed: int) -> TrainingSets:
    """The training set with text of the user's added, at most `share` of its tokens. Raises InvalidOption for unusable sources."""
    if not 0 < share < 1:
        raise InvalidOption(f"a share of {share} of added text", "use more than 0 and less than 1")
    budget = int(len(sets.train.tokens) * share / (1 - share))
    texts = read_texts(text_files(sources), seed)
    found, digest = documents(texts, tokenizer, budget, context)
    kept, total = [], 0
    for document in found:
        if total + len(document) > max(budget, MIN_DOCUMENT_TOKENS):
            break
        kept.append(document)
        total += len(document)
    lengths = [len(document) for document in kept]
    facts = sets.train.facts | {"text_tokens": total, "text_digest": digest}
    train = sets.train.joined(TokenDocuments.of(kept, [0] * len(kept), lengths, {}))
    return replace(sets, train=replace(train, facts=facts))
