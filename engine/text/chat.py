"""Turns of a conversation as text to append, taken from the tokenizer's chat template."""

from __future__ import annotations

from typing import Any

from engine.errors import InvalidOption

_USER, _ASSISTANT = "user-turn-placeholder", "assistant-turn-placeholder"


def next_turn(tokenizer: Any, message: str, token_ids: list[int]) -> list[int]:
    """Token ids that continue a chat after the assistant's turn: its closing, the user's message, and the opening of the next answer.

    The template is rendered over placeholder turns and the new message; what follows the assistant's placeholder is what the message adds,
    whatever was said before. So the history's own tokens stay as they were sampled, and its cache stays valid.

    Args:
        tokenizer: of the target, with a chat template.
        token_ids: the conversation so far; what closes the assistant's turn and stands there already is not repeated.

    Raises:
        InvalidOption: no template, one that refuses these turns, or one that leaves earlier answers out.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidOption("the model's tokenizer has no chat template", "use --raw, or an instruction-tuned model")
    from jinja2 import TemplateError

    turns = [("user", _USER), ("assistant", _ASSISTANT), ("user", message)]
    try:
        text = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns], tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise InvalidOption(f"the model's chat template refuses a second turn: {error}", "use --raw and write the turns out") from error
    _, found, added = text.partition(_ASSISTANT)
    if not found:
        raise InvalidOption("the model's chat template leaves out earlier answers", "use --raw and write the turns out")
    ids = tokenizer(added, add_special_tokens=False)["input_ids"]
    present = next((n for n in range(len(ids) - 1, 0, -1) if token_ids[-n:] == ids[:n]), 0)
    return ids[present:]
