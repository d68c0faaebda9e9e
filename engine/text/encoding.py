"""From a text to token ids, by any thread, also while another one decodes with the same tokenizer."""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any

from engine.errors import InvalidOption, PromptTooLong
from engine.inputs import named_errors
from engine.text.known_texts import SHORTEST, KnownTexts
from engine.text.remembered import follows_library

_LOCK = threading.Lock()  # one text at a time; decoding takes no lock, as nothing that it reads is changed here
# a setting of the tokenizer, not of the call, decides what special tokens in a text are: tokenizer -> a copy that takes them as ordinary text
_ORDINARY: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
# tokenizer -> how many tokens it had, and what it has encoded
_KNOWN: weakref.WeakKeyDictionary[Any, tuple[int, KnownTexts]] = weakref.WeakKeyDictionary()


def encode_text(
    tokenizer: Any, text: str, *, ordinary: bool = False, add_special_tokens: bool = False, most: int | None = None
) -> list[int]:
    """Token ids of a text; `ordinary`: what looks like a special token in it is none. Of one that begins as one before did, the beginning is known
    (`engine.text.known_texts`).

    most: more tokens than this are no use. A text that is far too long is found to be so by its beginning, not after minutes.

    Raises:
        InvalidOption: the tokenizer refuses the text, or cannot take special tokens as ordinary text.
        PromptTooLong: there are more than `most`.
    """

    def encode(piece: str) -> list[int]:
        if ordinary:
            return _ids(_ordinary(tokenizer)(piece, add_special_tokens=add_special_tokens, split_special_tokens=True))
        return _ids(tokenizer(piece, add_special_tokens=add_special_tokens))

    def remembered(piece: str) -> list[int]:
        with named_errors(InvalidOption, "the tokenizer cannot encode the prompt", "check the text, or the model's tokenizer files"):
            with _LOCK:
                known = None if ordinary or len(piece) < SHORTEST else _known(tokenizer, add_special_tokens)
                if known is None:
                    return encode(piece)
            ids: list[int] = []
            for part in known.parts(piece):
                with _LOCK:
                    ids += known.ids(part, encode)
            return ids

    chars = 16 * most if most is not None else len(text)
    while most is not None and chars < len(text):
        found = len(remembered(text[:chars]))
        if found > most + 16:  # the cut may have made a few more of the last word
            raise PromptTooLong(f"the prompt has more than {most} tokens, the model's context", "shorten it")
        chars *= 4
    return remembered(text)


def _ids(encoding: Any) -> list[int]:
    return list(map(int, encoding["input_ids"]))


def _known(tokenizer: Any, add_special_tokens: bool) -> KnownTexts | None:
    """What a tokenizer has encoded; None for one whose texts cannot be cut: by rules of its own, or as it puts tokens around each."""
    if not follows_library(tokenizer) or (add_special_tokens and tokenizer.backend_tokenizer.num_special_tokens_to_add(False)):
        return None
    size = len(tokenizer)
    if tokenizer not in _KNOWN or _KNOWN[tokenizer][0] != size:  # tokens were added
        _KNOWN[tokenizer] = size, KnownTexts(tokenizer.added_tokens_decoder)
    return _KNOWN[tokenizer][1]


def _ordinary(tokenizer: Any) -> Any:
    """A tokenizer whose setting may be changed: another thread may be decoding with the given one. A tokenizer without a backend has no setting."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return tokenizer
    if tokenizer not in _ORDINARY:
        _ORDINARY[tokenizer] = copy.deepcopy(tokenizer)
    return _ORDINARY[tokenizer]
