"""Turns of a conversation as text to append, taken from the tokenizer's chat template."""

from __future__ import annotations

from typing import Any

from engine.errors import InvalidOption

_USER, _ASSISTANT = "user-turn-placeholder", "assistant-turn-placeholder"


def next_turn(tokenizer: Any, message: str, token_ids: list[int]) -> list[int]:
    """Token ids that continue a chat after the assistant's turn: its closing, the user's message, and the opening of the next answer.

    The template is rendered over placeholder turns with and without the new message; the difference is what the message adds, whatever was said
    before. So the history's own tokens stay as they were sampled, and its cache stays valid.

    Args:
        tokenizer: of the target, with a chat template.
        token_ids: the conversation so far; what closes the assistant's turn and stands there already is not repeated.

    Raises:
        InvalidOption: no template, or one that rewrites earlier turns when a new one comes.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidOption("the model's tokenizer has no chat template", "use --raw, or an instruction-tuned model")
    past = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}]
    before = tokenizer.apply_chat_template(past, tokenize=False)
    after = tokenizer.apply_chat_template([*past, {"role": "user", "content": message}], tokenize=False, add_generation_prompt=True)
    if not after.startswith(before) or _ASSISTANT not in before:
        raise InvalidOption("the model's chat template rewrites earlier turns", "use --raw and write the turns out")
    closing = before[before.rindex(_ASSISTANT) + len(_ASSISTANT) :]
    ids = tokenizer(closing, add_special_tokens=False)["input_ids"]
    present = next((n for n in range(len(ids), 0, -1) if token_ids[-n:] == ids[:n]), 0)
    return [*ids[present:], *tokenizer(after[len(before) :], add_special_tokens=False)["input_ids"]]
