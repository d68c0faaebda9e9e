"""From what a caller gives as prompts to token ids: text, token ids, or chat messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, cast

from engine.errors import EmptyPrompt, InvalidOption

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int] | Messages


def is_messages(prompt: object) -> TypeGuard[Messages]:
    """True for a non-empty list of mappings (chat messages with `role` and `content`)."""
    return isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts; a single text, list of token ids or list of messages becomes a list of one."""
    single = isinstance(prompts, str) or is_messages(prompts) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [prompts] if single else list(prompts)  # type: ignore[list-item, arg-type]


def encode_prompt(tokenizer: Any | None, prompt: Prompt) -> list[int]:
    """Token ids of a prompt. Text is taken raw, messages go through the tokenizer's chat template with the assistant's turn opened.

    Raises:
        EmptyPrompt: no text, no ids, no messages, or nothing but what the tokenizer always adds.
        InvalidOption: text or messages without a tokenizer, or messages without a chat template.
    """
    ids: list[int] = []
    if isinstance(prompt, str):
        ids = _needed(tokenizer)(prompt)["input_ids"] if prompt.strip() else []
    elif is_messages(prompt):
        if not getattr(_needed(tokenizer), "chat_template", None):
            raise InvalidOption(
                "the model's tokenizer has no chat template", "give the prompt as text (--raw), or use an instruction-tuned model"
            )
        text = _needed(tokenizer).apply_chat_template([dict(m) for m in prompt], tokenize=False, add_generation_prompt=True)
        ids = _needed(tokenizer)(text, add_special_tokens=False)["input_ids"]
    else:
        ids = [int(t) for t in cast(Sequence[int], prompt)]
    if not ids:
        raise EmptyPrompt("the prompt is empty", "give at least one word, or one token id")
    return list(ids)


def _needed(tokenizer: Any | None) -> Any:
    if tokenizer is None:
        raise InvalidOption("a text prompt needs a tokenizer", "give token ids, or an engine with a tokenizer")
    return tokenizer


def end_tokens(config_ids: Sequence[int], tokenizer: Any | None, folder: Path | None) -> frozenset[int]:
    """End-of-sequence ids named by the model's config, its tokenizer and its generation_config.json."""
    found = set(config_ids)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    file = folder / "generation_config.json" if folder else None
    if file is not None and file.is_file():
        named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        found.update(named if isinstance(named, list) else [] if named is None else [named])
    return frozenset(found)


def special_tokens(tokenizer: Any | None) -> dict[str, int]:
    """Text -> id of the special tokens, which decoding leaves out: a stop string equal to one is a stop token."""
    decoder = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {token.content: index for index, token in decoder.items() if token.special}
