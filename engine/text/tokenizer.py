"""Tokenizers, and whether a draft speaks its target's language."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from engine.errors import ModelNotFound, VocabularyMismatch

# names that converters and trainers give to rows of the embedding matrix that stand for no text
_PADDING = re.compile(
    r"\[PAD\d+\]|\[unused\d+\]|<pad_?\d+>|<unused_?\d+>|<dummy_?\d+>|<\|(?:extra|reserved|reserved_special_token|placeholder)_?\d+\|>"
)


def load_tokenizer(path: Path) -> Any:
    """The transformers tokenizer in a model folder.

    Raises:
        ModelNotFound: the folder holds no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelNotFound(
            f"{path} holds no readable tokenizer: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            "the folder needs tokenizer.json and tokenizer_config.json",
        ) from error


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
