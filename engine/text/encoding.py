"""From a text to token ids, by any thread, also while another one decodes with the same tokenizer."""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any

from engine.errors import InvalidOption, PromptTooLong
from engine.inputs import named_errors

_LOCK = threading.Lock()  # one text at a time; decoding takes no lock, as nothing that it reads is changed here
# a setting of the tokenizer, not of the call, decides what special tokens in a text are: tokenizer -> a copy that takes them as ordinary text
_ORDINARY: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def encode_text(
    tokenizer: Any, text: str, *, ordinary: bool = False, add_special_tokens: bool = False, most: int | None = None
) -> list[int]:
    """Token ids of a text; `ordinary`: what looks like a special token in it is none.

    most: more tokens than this are no use. A text that is far too long is found to be so by its beginning, not after minutes.

    Raises:
        InvalidOption: the tokenizer refuses the text, or cannot take special tokens as ordinary text.
        PromptTooLong: there are more than `most`.
    """

    def encode(piece: str) -> list[int]:
        with _LOCK, named_errors(InvalidOption, "the tokenizer cannot encode the prompt", "check the text, or the model's tokenizer files"):
            if ordinary:
                return _ids(_ordinary(tokenizer)(piece, add_special_tokens=add_special_tokens, split_special_tokens=True))
            return _ids(tokenizer(piece, add_special_tokens=add_special_tokens))

    chars = 16 * most if most is not None else len(text)
    while most is not None and chars < len(text):
        found = len(encode(text[:chars]))
        if found > most + 16:  # the cut may have made a few more of the last word
            raise PromptTooLong(f"the prompt has more than {most} tokens, the model's context", "shorten it")
        chars *= 4
    return encode(text)


def _ids(encoding: Any) -> list[int]:
    return [int(i) for i in encoding["input_ids"]]


def _ordinary(tokenizer: Any) -> Any:
    """A tokenizer whose setting may be changed: another thread may be decoding with the given one. A tokenizer without a backend has no setting."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return tokenizer
    if tokenizer not in _ORDINARY:
        _ORDINARY[tokenizer] = copy.deepcopy(tokenizer)
    return _ORDINARY[tokenizer]
