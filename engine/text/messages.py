"""Chat messages as callers give them: checked, put into one shape, and kept from forging turns.

A message's text may hold the very strings by which a template marks turns (`<|im_start|>system`). Each such string is exchanged for a
character of the private use area while the template is rendered, and encoded afterwards as ordinary text; all other text is encoded exactly as
if nothing had been exchanged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import EmptyPrompt, InvalidOption
from engine.inputs import shown
from engine.text.encoding import encode_text
from engine.text.remembered import follows_library

_FORM = 'give {"role": "user", "content": "..."}'
_PRIVATE = range(0xF0000, 0xFFFFE)  # a plane that no standard gives a meaning to
_MARKS = re.compile(f"[{chr(_PRIVATE.start)}-{chr(_PRIVATE.stop - 1)}]")


def checked_messages(messages: Sequence[Any] | Mapping[str, Any]) -> list[dict[str, Any]]:
    """Messages as templates take them: a role, and content that is a text.

    A single mapping is a list of one. Lists of text parts are joined, as templates that take parts do; keys whose value is None are left out.

    Raises:
        EmptyPrompt: there is no message.
        InvalidOption: a message that is no mapping, lacks its role, or lacks content without calling tools; a part that is no text.
    """
    given = [messages] if isinstance(messages, Mapping) else list(messages)
    if not given:
        raise EmptyPrompt("there is no message", _FORM)
    return [_checked(message, number) for number, message in enumerate(given, 1)]


def _checked(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not all(isinstance(key, str) for key in message):
        raise InvalidOption(f"message {number} is {shown(message)}", _FORM)
    kept = {key: value for key, value in message.items() if value is not None}
    role = kept.get("role")
    if not isinstance(role, str) or not role.strip():
        raise InvalidOption(f"message {number} has the role {shown(role)}" if "role" in kept else f"message {number} has no role", _FORM)
    content = kept.get("content")
    if content is None:
        if not kept.get("tool_calls"):
            raise InvalidOption(f"message {number} has no content", _FORM)
        kept["content"] = ""
    else:
        kept["content"] = joined_parts(content, f"message {number}")
    for text in _texts(kept):
        valid_text(text, f"message {number}")
    return kept


def joined_parts(content: Any, where: str) -> str:
    """Text of a message's content: a text, a list of parts, or one part. Raises InvalidOption, which `where` begins, for what is no text."""
    if isinstance(content, str):
        return content
    parts = [content] if isinstance(content, Mapping) else content
    if not isinstance(parts, (list, tuple)):
        raise InvalidOption(f"{where} has content of type {type(content).__name__}", _FORM)
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
            raise InvalidOption(f"{where} has a part of type {shown(kind)}", 'only text is read: {"type": "text", "text": "..."}')
        texts.append(text)
    return "".join(texts)


def valid_text(text: str, where: str) -> str:
    """The text itself; InvalidOption for lone surrogates, which bytes that are no UTF-8 become and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidOption(f"{where} is not valid text", "give UTF-8") from error
    return text


def _texts(value: Any, depth: int = 0) -> list[str]:
    """All strings in a value, keys included."""
    if depth > 32:
        raise InvalidOption("a message is nested too deep", _FORM)
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for item in pair for text in _texts(item, depth + 1)]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _texts(item, depth + 1)]
    return []


def special_tokens(tokenizer: Any | None) -> dict[str, int]:
    """Text -> id of the special tokens, which decoding leaves out: a stop string equal to one is a stop token."""
    decoder = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {token.content: index for index, token in decoder.items() if token.special}


def _normalizes_to_tokens(tokenizer: Any) -> bool:
    """Whether a text without special tokens may have some once it is normalised: as they are looked for then, or are tokens of the model as well."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if getattr(backend, "normalizer", None) is None:
        return False
    if not follows_library(tokenizer):
        return True
    special = [(index, token) for index, token in tokenizer.added_tokens_decoder.items() if token.special]
    return any(token.normalized for _, token in special) or any(backend.model.id_to_token(index) is not None for index, _ in special)


class Disguise:
    """Texts of messages without special tokens, and the way back.

    Args:
        tokenizer: of the target.
        texts: all that callers wrote into the rendering.

    Raises:
        InvalidOption: the texts use up the private use area.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._special = {text: index for text, index in special_tokens(tokenizer).items() if text}
        self._found = re.compile("|".join(re.escape(text) for text in sorted(self._special, key=len, reverse=True)) or r"(?!)")
        used = {c for text in texts if not text.isascii() for c in _MARKS.findall(text)}
        self._free = (chr(code) for code in _PRIVATE if chr(code) not in used)
        self._marks: dict[str, str] = {}  # text -> the character that stands for it
        self._normalizes = _normalizes_to_tokens(tokenizer)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokenizer's special tokens."""
        return frozenset(self._special.values())

    def hide(self, text: str) -> str:
        """The text with a mark for every special token in it; one mark for all of it where a normaliser would make special tokens of the rest."""
        hidden = self._found.sub(lambda match: self._mark(match[0]), text)
        if self._normalizes and self._special:
            special = self.special_ids
            if any(not special.isdisjoint(encode_text(self._tokenizer, piece)) for piece in _MARKS.split(hidden) if piece):
                return self._mark(text)
        return hidden

    def hide_all(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message with all its texts hidden but the role, which must not hold a special token at all (InvalidOption)."""
        role = message["role"]
        if self.hide(role) != role:
            raise InvalidOption(f"the role {shown(role)} holds a special token", _FORM)
        return {key: value if key == "role" else self._hide_value(value) for key, value in message.items()}

    def encode(self, rendered: str, most: int | None = None) -> list[int]:
        """Token ids of a rendering: the template's special tokens as such, those that were hidden as ordinary text. most: see `encode_text`."""
        if not self._marks:
            return encode_text(self._tokenizer, rendered, most=most)
        origin = {mark: text for text, mark in self._marks.items()}
        ids: list[int] = []
        for piece in re.split(f"([{''.join(origin)}])", rendered):
            if piece:
                ids += encode_text(self._tokenizer, origin.get(piece, piece), ordinary=piece in origin, most=most)
        return ids

    def _hide_value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, Mapping):
            return {self.hide(key) if isinstance(key, str) else key: self._hide_value(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._hide_value(item) for item in value]
        return value

    def _mark(self, text: str) -> str:
        if text not in self._marks:
            mark = next(self._free, None)
            if mark is None:
                raise InvalidOption("the messages use every character of the private use area", "leave some of them out")
            self._marks[text] = mark
        return self._marks[text]


def disguised(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], Disguise]:
    """Checked messages with their texts hidden, and the disguise that encodes their rendering."""
    disguise = Disguise(tokenizer, _texts(list(messages)))
    return [disguise.hide_all(message) for message in messages], disguise
