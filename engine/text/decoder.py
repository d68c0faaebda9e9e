"""From a request's token ids to its text, with one tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.errors import InvalidOption
from engine.text.constraint import JsonConstraint, JsonConstraints
from engine.text.detokenizer import TextStream
from engine.text.prompts import special_tokens


class TextDecoder:
    """Makes the text streams of requests.

    Args:
        tokenizer: None: all text is empty, and stop strings are refused.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self.tokenizer = tokenizer
        self._constraints: JsonConstraints | None = None
        self._special = special_tokens(tokenizer)

    def constraint(self, schema: str, eos_token_ids: frozenset[int]) -> JsonConstraint:
        """A constraint for one text that must fit a JSON schema. Raises InvalidOption as `engine.text.constraint.JsonConstraints.constraint`."""
        if self._constraints is None:
            self._constraints = JsonConstraints(self.tokenizer, sorted(eos_token_ids))
        return self._constraints.constraint(schema)

    def stop_token_ids(self, stop: Sequence[str]) -> tuple[int, ...]:
        """Ids of those stop strings that are special tokens, which decoding leaves out. Raises InvalidOption for stop strings without a tokenizer."""
        if stop and self.tokenizer is None:
            raise InvalidOption("stop strings need a tokenizer", "use stop_token_ids, or give the engine a tokenizer")
        return tuple(self._special[s] for s in stop if s in self._special)

    def stream(self, context: Sequence[int], stop: Sequence[str]) -> TextStream:
        """The text that follows the `context` tokens and ends before a stop string."""
        return TextStream(self.decode, context, stop)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        if self.tokenizer is None or not token_ids:
            return ""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
