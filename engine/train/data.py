"""What a draft head is trained and measured on: conversations of the target with itself, and text that the user adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.calibrate.corpus import MIN_DOCUMENT_TOKENS, documents, read_texts, text_files
from engine.errors import InvalidOption
from engine.model.decoder import Decoder
from engine.text.chat_opening import ChatOpening
from engine.train.documents import TokenDocuments
from engine.train.self_generated import SelfGenerationOptions, draw

_FILES = ("train.npz", "temperature-1.npz", "greedy.npz")
_GIVEN_FILES = ("given-temperature-1.npz", "given-greedy.npz")
_OTHER_FILES = ("other-temperature-1.npz", "other-greedy.npz")
_SEED_STEP = 1_000_003  # held-out sets are drawn with other seeds than what is trained on


@dataclass(frozen=True)
class TrainingSets:
    """train: what is learned from. sampled, greedy: held out, with answers at temperature 1 and greedy ones, to questions of the target's own. given:
    the same two kinds of answers to messages that were given and held out, where there are any; other: to messages of kinds that are not trained on."""

    train: TokenDocuments
    sampled: TokenDocuments
    greedy: TokenDocuments
    given: tuple[TokenDocuments, TokenDocuments] | None = None
    other: tuple[TokenDocuments, TokenDocuments] | None = None

    def save(self, folder: Path) -> None:
        """A file for each in the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        # the file that `load` looks for comes last
        kinds = (*(self.other or (None, None)), *(self.given or (None, None)), self.greedy, self.sampled, self.train)
        for name, docs in zip((*_OTHER_FILES, *_GIVEN_FILES, *_FILES[::-1]), kinds, strict=True):
            if docs is None:
                (folder / name).unlink(missing_ok=True)
            else:
                docs.save(folder / name)

    @classmethod
    def load(cls, folder: Path) -> TrainingSets | None:
        """What `save` wrote; None when the folder holds none of it. Raises TrainingDataError for damaged files."""
        if not (folder / _FILES[0]).exists():
            return None
        train, sampled, greedy = (TokenDocuments.load(folder / name) for name in _FILES)
        pairs = []
        for names in (_GIVEN_FILES, _OTHER_FILES):
            found = [TokenDocuments.load(folder / name) for name in names if (folder / name).exists()]
            pairs.append((found[0], found[1]) if len(found) == 2 else None)
        return cls(train, sampled, greedy, *pairs)


def draw_sets(
    decoder: Decoder,
    chat: ChatOpening,
    options: SelfGenerationOptions,
    *,
    given: Sequence[Sequence[int]] = (),
    other: Sequence[Sequence[int]] = (),
    held_out: int,
    tokens: int | None,
    seconds: float | None,
    log: Callable[[str], None],
) -> TrainingSets:
    """Held-out sets of about `held_out` conversations each, then the training set by `tokens` or `seconds` (see `draw`).

    given: token ids of users' messages; about a twentieth of them, at least one, is held out. other: those of kinds that are never trained on. Raises
    InvalidOption for a single given message, and for an other one that is also given.
    """
    if {tuple(message) for message in given} & {tuple(message) for message in other}:
        raise InvalidOption("a message is both given and of the other kinds", "leave it out of one of the two files")
    train_on, kept_back = split_given(given, options.seed)
    wanted: list[tuple[int, float, Sequence[Sequence[int]]]] = [(1, 1.0, ()), (2, 0.0, ())]
    wanted += [(3, 1.0, kept_back), (4, 0.0, kept_back)] if kept_back else []
    wanted += [(5, 1.0, other), (6, 0.0, other)] if other else []
    sets = []
    for number, temperature, messages in wanted:
        chosen = replace(options, rows=held_out, answer_temperature=temperature, given_share=1.0, seed=options.seed + number * _SEED_STEP)
        sets.append(draw(decoder, chat, chosen, given=messages, tokens=held_out * options.context))
        kind = f"{len(messages)} {'other' if number > 4 else 'given'} messages" if messages else "its own questions"
        log(f"held out: {len(sets[-1])} conversations with answers at temperature {temperature:g} to {kind}, {sets[-1].facts['seconds']} s")
        release(decoder.device)
    train = draw(decoder, chat, options, given=train_on, tokens=tokens, seconds=seconds, log=log)
    release(decoder.device)
    facts = train.facts
    log(f"to train on: {len(train):,} conversations, {facts['drawn_tokens']:,} tokens drawn at {facts['tokens_per_s']:,} tokens/s")
    pairs = iter([(sets[at], sets[at + 1]) for at in range(2, len(sets), 2)])
    return TrainingSets(train, sets[0], sets[1], next(pairs) if kept_back else None, next(pairs) if other else None)


def split_given(given: Sequence[Sequence[int]], seed: int) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """(to train on, held out): a twentieth drawn by the seed, at least one. Raises InvalidOption for a single message."""
    if len(given) == 1:
        raise InvalidOption("one message cannot be both learned from and held out", "give at least two")
    order = np.random.default_rng((seed, 5)).permutation(len(given))
    count = -(-len(given) // 20)
    return [given[i] for i in sorted(order[count:])], [given[i] for i in sorted(order[:count])]


def read_messages(path: str | Path, tokenizer: Any) -> list[list[int]]:
    """Token ids of users' messages, one a line of a UTF-8 file; empty lines and repetitions are left out. Raises InvalidOption."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidOption(f"{path} cannot be read: {error}", "give a UTF-8 file with one message a line") from error
    texts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not texts:
        raise InvalidOption(f"{path} holds no message", "give a file with one message a line")
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


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
