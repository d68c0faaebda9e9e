"""Turns of a conversation as text to append, taken from the tokenizer's chat template."""

from __future__ import annotations

from typing import Any

from engine.errors import InvalidOption
from engine.text.messages import Disguise, checked_messages, disguised
from engine.text.templates import has_template, render

_USER, _ASSISTANT = "user-turn-placeholder", "assistant-turn-placeholder"


def next_turn(tokenizer: Any, message: str, token_ids: list[int]) -> list[int]:
    """Token ids that continue a chat after the assistant's turn: its closing, the user's message, and the opening of the next answer.

    The template is rendered over placeholder turns and the new message; what follows the assistant's placeholder is what the message adds,
    whatever was said before. So the history's own tokens stay as they were sampled, and its cache stays valid. Special tokens in the message are
    ordinary text (`engine.text.messages`).

    Args:
        tokenizer: of the target, with a chat template.
        token_ids: the conversation so far; what closes the assistant's turn and stands there already is not repeated, nor is what a template
            puts between an answer and its end token (a space, say) after an answer that ended without.

    Raises:
        InvalidOption: no template, one that refuses these turns, or one that leaves earlier answers out.
    """
    if not has_template(tokenizer):
        raise InvalidOption("the model's tokenizer has no chat template", "use --raw, or an instruction-tuned model")
    turns = [("user", _USER), ("assistant", _ASSISTANT), ("user", message)]
    given = checked_messages([{"role": role, "content": content} for role, content in turns])
    messages, disguise = disguised(tokenizer, given)
    text = render(tokenizer, messages, failing="refuses a second turn")
    _, found, added = text.partition(_ASSISTANT)
    if not found:
        raise InvalidOption("the model's chat template leaves out earlier answers", "use --raw and write the turns out")
    ids = disguise.encode(added)
    return ids[_present(tokenizer, ids, token_ids, disguise) :]


def _present(tokenizer: Any, ids: list[int], token_ids: list[int], disguise: Disguise) -> int:
    """How many of the ids to add stand at the conversation's end already."""
    for count in range(len(ids) - 1, 0, -1):
        if token_ids[-count:] == ids[:count]:
            return count
    # the end token is there, what the template writes before it is not: that is blank, or it would not be the end
    special = disguise.special_ids
    end = next((at for at, token in enumerate(ids) if token in special), None)
    if end is not None and token_ids and token_ids[-1] == ids[end] and not tokenizer.decode(ids[:end]).strip():
        return end + 1
    return 0
