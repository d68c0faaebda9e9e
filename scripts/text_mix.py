"""Calibration text from several sources in given shares of tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from engine.calibrate.corpus import documents, text_files
from engine.errors import InvalidOption

EQUAL = "equal"
_PIECE_CHARACTERS = 16  # for each token of context


def shares_of(words: str, sources: Sequence[str]) -> list[float]:
    """Shares that add up to 1, from "equal" or one number a source ("4,1,1"). Raises InvalidOption."""
    try:
        numbers = [1.0] * len(sources) if words == EQUAL else [float(word) for word in words.split(",")]
    except ValueError as error:
        raise InvalidOption(f"--mix {words}", f"give {EQUAL}, or a number for each source of --text, such as 4,1,1") from error
    if len(numbers) != len(sources) or not numbers or min(numbers) <= 0 or not sum(numbers) < float("inf"):
        raise InvalidOption(f"--mix {words} for {len(sources)} sources of --text", "give one number above 0 for each")
    return [number / sum(numbers) for number in numbers]


def pieces(files: Sequence[Path], characters: int, seed: int) -> Iterator[str]:
    """Parts of about so many characters of all files, whole lines, in an order shuffled by `seed`: one long file is as good as many short ones."""
    found = []
    for path in files:
        part: list[str] = []
        size = 0
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            part.append(line)
            size += len(line)
            if size >= characters:
                found.append("".join(part))
                part, size = [], 0
        found.append("".join(part))
    random.Random(seed).shuffle(found)
    yield from found


def mixed_documents(
    sources: Sequence[str],
    shares: Sequence[float],
    tokenizer: Any,
    num_tokens: int,
    context: int,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> tuple[list[list[int]], str]:
    """As `engine.calibrate.corpus.documents`, every source giving its share of num_tokens as far as its text suffices; a shortage is logged.

    Returns:
        the documents of all sources in one shuffled order, and a digest of the text they came from.
    """
    found: list[list[int]] = []
    digest = sha256()
    for source, share in zip(sources, shares, strict=True):
        wanted = round(share * num_tokens)
        docs, own = documents(pieces(text_files([source]), _PIECE_CHARACTERS * context, seed), tokenizer, wanted, context, per_text=8)
        have = sum(map(len, docs))
        log(f"text: {source} gives {have:,} tokens" + (f" of the {wanted:,} asked for" if have < wanted else ""))
        found += docs
        digest.update(own.encode())
    random.Random(seed).shuffle(found)
    return found, digest.hexdigest()
