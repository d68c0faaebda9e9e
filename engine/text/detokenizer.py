"""Text that grows token by token: incremental detokenisation, stop strings, and what must be held back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

INCOMPLETE = "\ufffd"  # what a tokenizer decodes the first bytes of an unfinished character to


class TextStream:
    """The text of a growing run of tokens.

    Text is released only when it is certain: an unfinished UTF-8 character and a suffix that may yet become a stop string are held back.
    The text of a run of tokens does not depend on how the run was cut into pushes, so speculation cannot change it.

    Args:
        decode: token ids to text (special tokens left out).
        context: the last few tokens before the run, so that a tokenizer that drops leading spaces keeps the first one.
        stop: non-empty strings that end the text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._longest = max((len(s) for s in self._stop), default=0)
        self._ids = list(context)
        self._prefix, self._read = 0, len(self._ids)  # decoding starts at _prefix; text of tokens before _read is in _text
        self._text = ""
        self._released = self._taken = 0

    @property
    def text(self) -> str:
        """Text released so far; after `finish`, all of it."""
        return self._text[: self._released]

    def push(self, tokens: Sequence[int]) -> int | None:
        """Add tokens. Returns None, or how many of them completed the first stop string; the text then ends before that string."""
        begin = len(self._ids)
        self._ids += tokens
        if not self._stop:
            return None  # decoded when somebody looks
        before = self._prefix, self._read, self._text, self._released
        if self._advance(len(self._ids)) == "text":
            return None
        # A stop string, or an unfinished character that may follow one: token by token from here.
        self._prefix, self._read, self._text, self._released = before
        for end in range(begin + 1, len(self._ids) + 1):
            if self._advance(end) == "stop":
                del self._ids[end:]
                return end - begin
        return None

    def take(self) -> str:
        """Text released since the last call."""
        if self._advance(len(self._ids)) == "held":
            for end in range(self._read + 1, len(self._ids)):
                self._advance(end)
        piece = self._text[self._taken : self._released]
        self._taken = self._released
        return piece

    def finish(self) -> None:
        """Release what was held back: no token follows. (After a stop string nothing is.)"""
        rest = self._decode(self._ids[self._prefix :])[len(self._decode(self._ids[self._prefix : self._read])) :]
        self._prefix = self._read = len(self._ids)
        if not self._append(rest):
            self._released = len(self._text)

    def _advance(self, end: int) -> Literal["text", "held", "stop"]:
        """Turn the tokens before `end` into text, unless they end within a character ("held"); "stop" when a stop string is complete."""
        if self._read >= end:
            return "text"
        whole, known = self._decode(self._ids[self._prefix : end]), self._decode(self._ids[self._prefix : self._read])
        if whole.endswith(INCOMPLETE):
            return "held"
        if len(whole) <= len(known):
            return "text"  # special tokens only: no text, and the next token still needs the same context
        self._prefix, self._read = self._read, end
        return "stop" if self._append(whole[len(known) :]) else "text"

    def _append(self, piece: str) -> bool:
        start = max(0, len(self._text) - self._longest + 1)
        self._text += piece
        found = [at for s in self._stop if (at := self._text.find(s, start)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self._released = len(self._text)
            self._prefix = self._read = len(self._ids)
            return True
        self._released = max(self._released, len(self._text) - self._held())
        return False

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for size in range(min(self._longest - 1, len(self._text)), 0, -1):
            if any(s.startswith(self._text[-size:]) for s in self._stop if len(s) > size):
                return size
        return 0
