"""Tokenizers, and whether a draft speaks its target's language."""

from __future__ import annotations

import hashlib
import json
import re
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from engine.errors import ModelNotFound, VocabularyMismatch
from engine.inputs import is_lfs_pointer, lfs_pointer, named_errors, open_regular
from engine.text.remembered import from_bytes, remembered_name, to_bytes
from engine.text.written import written_tokenizer

MAX_TOKENIZER_BYTES = 256 << 20
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_FOLDER_NEEDS = "the folder needs tokenizer.json and tokenizer_config.json"

# names that converters and trainers give to rows of the embedding matrix that stand for no text
_PADDING = re.compile(
    r"\[PAD\d+\]|\[unused\d+\]|<pad_?\d+>|<unused_?\d+>|<dummy_?\d+>|<\|(?:extra|reserved|reserved_special_token|placeholder)_?\d+\|>"
)


class TokenizerCache(Protocol):
    """Where tokenizers are remembered: files by name."""

    def read(self, name: str) -> bytes | None: ...

    def write(self, name: str, content: bytes) -> bool: ...


def load_tokenizer(path: Path, cache: TokenizerCache | None = None) -> Any:
    """The tokenizer in a model folder: transformers' own, or one that gives the same ids and texts: remembered of it (`engine.text.remembered`), or of
    files that were written here (`engine.text.written`).

    cache: where tokenizers are remembered; None asks transformers every time.

    Raises:
        ModelNotFound: the folder holds no tokenizer that transformers can read, or one whose ids are no ids.
    """
    for name in _FILES:  # what is no regular file would be waited for, or read without an end
        if (path / name).exists():
            with open_regular(path / name, ModelNotFound, _FOLDER_NEEDS, max_bytes=MAX_TOKENIZER_BYTES):
                pass
            if is_lfs_pointer(path / name):
                raise lfs_pointer(path / name, ModelNotFound)
    if cache is not None and (written := written_tokenizer(path, _FILES, partial(_by_transformers, path))) is not None:
        return written
    known_as = None if cache is None else remembered_name(path, _FILES)
    if cache is not None and known_as is not None:
        content = cache.read(known_as)
        found = None if content is None else from_bytes(content, partial(_by_transformers, path))
        if found is not None:
            return found
    tokenizer = _by_transformers(path)
    if cache is not None and known_as is not None:
        content = to_bytes(tokenizer)
        if content is not None:
            cache.write(known_as, content)
    return tokenizer


def _by_transformers(path: Path) -> Any:
    from transformers import AutoTokenizer

    with named_errors(ModelNotFound, f"{path} holds no readable tokenizer", _FOLDER_NEEDS):
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        tokenizer("a", add_special_tokens=False)  # some faults only show when the vocabulary is used
        strange = next((i for i in tokenizer.added_tokens_decoder if not 0 <= i < 2**31), None)
    if strange is not None:
        raise ModelNotFound(f"{path} has a tokenizer with the id {strange}", _FOLDER_NEEDS)
    return tokenizer


def check_vocabularies(target: Any, draft: Any) -> int:
    """Compares two vocabularies by content: the same id must be the same token.

    Sizes may differ, as families pad their embedding matrices differently; tokens that only one side has must be padding by name.

    Args:
        target, draft: tokenizers (anything with `get_vocab() -> dict[str, int]`).

    Returns:
        Number of ids both can score: one more than the highest id of a token that is no padding. Rows of either model's logits
        from there on belong to no token.

    Raises:
        VocabularyMismatch: with the first token that differs.
    """
    target_tokens, draft_tokens = _by_id(target), _by_id(draft)
    for index in sorted(target_tokens.keys() & draft_tokens.keys()):
        ours, theirs = target_tokens[index], draft_tokens[index]
        if ours != theirs and not (_is_padding(ours) and _is_padding(theirs)):
            raise VocabularyMismatch(f"id {index} is {ours!r} for the target and {theirs!r} for the draft", _REMEDY)
    for side, own, other in (("target", target_tokens, draft_tokens), ("draft", draft_tokens, target_tokens)):
        for index in sorted(own.keys() - other.keys()):
            if not _is_padding(own[index]):
                raise VocabularyMismatch(f"only the {side} has the token {own[index]!r} (id {index})", _REMEDY)
    return 1 + max((index for index, token in target_tokens.items() if not _is_padding(token)), default=-1)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 (hex) over the tokens by id, padding left out, so that differently padded models of one family agree."""
    tokens = sorted((index, token) for index, token in _by_id(tokenizer).items() if not _is_padding(token))
    return hashlib.sha256(json.dumps(tokens, ensure_ascii=True).encode()).hexdigest()


_REMEDY = "take a draft of the target's own family, or --draft trunk or none"


def _by_id(tokenizer: Any) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _is_padding(token: str) -> bool:
    return _PADDING.fullmatch(token) is not None
