"""The fixed parts of a chat around a user's message, by which a model can be made to write both sides of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidOption
from engine.text.encoding import encode_text
from engine.text.templates import has_template, render

_MESSAGE = "user-message-placeholder"


@dataclass(frozen=True)
class ChatOpening:
    """opening: token ids before a user's message. closing: token ids from the end of that message to the start of the answer, empty where
    there is no user's turn. ends: end-of-sequence ids."""

    opening: tuple[int, ...]
    closing: tuple[int, ...]
    ends: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.opening:
            raise InvalidOption(
                "nothing stands before a text, so the model has nothing to go on", "use a model with a chat template or a BOS token"
            )

    @property
    def special(self) -> tuple[int, ...]:
        """All ids that the template itself puts into a chat, and the ends."""
        return tuple(sorted({*self.opening, *self.closing, *self.ends}))


def chat_opening(tokenizer: Any, ends: Sequence[int]) -> ChatOpening:
    """The parts of the tokenizer's chat template; without one, a beginning-of-text (or an end-of-text) token alone.

    Raises:
        InvalidOption: no template and no such token, or a template that leaves a user's message out or changes it.
    """
    if not has_template(tokenizer):
        first = next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, *ends) if token is not None), None)
        return ChatOpening(() if first is None else (int(first),), (), tuple(ends))
    text = render(tokenizer, [{"role": "user", "content": _MESSAGE}])
    before, found, after = text.partition(_MESSAGE)
    if not found:
        raise InvalidOption("the model's chat template leaves out the user's message", "train on text with --text")
    opening, closing = (encode_text(tokenizer, part) for part in (before, after))
    return ChatOpening(tuple(opening), tuple(closing), tuple(ends))
