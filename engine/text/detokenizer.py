"""Text that grows token by token: incremental detokenisation, stop strings, and what must be held back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"  # what a tokenizer decodes the first bytes of an unfinished character to
MAX_HELD = 3  # tokens of an unfinished character: UTF-8 has at most four bytes, a token has at least one
CONTEXT = 5  # tokens that are decoded again with those after them
MAX_SILENT = 16  # tokens without text that may stand before the first text


class TextStream:
    """The text of a growing run of tokens.

    The text is defined token by token: a token's text is released as soon as it is certain, and never changes afterwards. An unfinished
    UTF-8 character (at most three tokens) and a suffix that may yet become a stop string are held back; bytes that are no text come out as
    replacement characters. So the text does not depend on how the tokens were cut into pushes, nor on whether anybody looked in between,
    and n tokens cost O(n) decoded ids.

    Args:
        decode: token ids to text (special tokens left out).
        context: the last few tokens before the run, so that a tokenizer that drops leading spaces keeps the first one.
        stop: non-empty strings that end the text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._longest = max((len(s) for s in self._stop), default=0)
        self._context, self._known = self._clean(list(context))
        self._held: list[int] = []  # tokens without released text
        self._queue: list[int] = []  # tokens nobody has looked at
        self._text = ""
        self._released = self._taken = 0
        self._stopped = False

    @property
    def text(self) -> str:
        """Text released so far; after `finish`, all of it."""
        return self._text[: self._released]

    def push(self, tokens: Sequence[int]) -> int | None:
        """Add tokens. Returns None, or how many of them completed the first stop string; the text then ends before that string."""
        self._queue += tokens
        if not self._stop:
            return None  # decoded when somebody looks
        before = self._text, self._released, self._context, self._known, self._held
        if self._whole() and not self._stopped:
            return None
        # A stop string, or an unfinished character that may follow one: token by token from here.
        (self._text, self._released, self._context, self._known, self._held), self._stopped = before, False
        self._queue.clear()
        for count, token in enumerate(tokens, 1):
            self._step(token)
            if self._stopped:
                return count
        return None

    def take(self) -> str:
        """Text released since the last call."""
        self._advance()
        piece = self._text[self._taken : self._released]
        self._taken = self._released
        return piece

    def finish(self) -> None:
        """Release what was held back: no token follows. (After a stop string nothing is.)"""
        self._advance()
        held, self._held = self._held, []
        if held and not self._stopped:
            self._append(self._piece(held))
        if not self._stopped:
            self._released = len(self._text)

    def _advance(self) -> None:
        """Turn the queued tokens into text."""
        if self._queue and not self._whole():
            queue, self._queue = self._queue, []
            for token in queue:
                self._step(token)

    def _whole(self) -> bool:
        """Decode the queue at once if no byte in it is in doubt, where token by token gives the same; False, and nothing done, otherwise."""
        tokens = self._held + self._queue
        piece = self._piece(tokens)
        if INCOMPLETE in piece:
            return False
        self._queue = []
        self._release(tokens, piece)
        return True

    def _step(self, token: int) -> None:
        """Turn one more token into text, or hold it."""
        if self._held and self._known and self._decode([*self._context, token]) == self._known:
            return  # a special token has no text, also within a character
        held = [*self._held, token]
        piece = self._piece(held)
        while piece.endswith(INCOMPLETE) and len(held) > MAX_HELD:
            # The first of these tokens belong to no character that can still be completed: split where both parts decode as the whole does.
            cut = next(
                n for n in range(len(held) - MAX_HELD, len(held) + 1) if self._piece(held[:n]) + self._piece(held[n:], alone=True) == piece
            )
            self._release(held[:cut], self._piece(held[:cut]))
            held, piece = held[cut:], self._piece(held[cut:])
        self._held = held
        if not piece.endswith(INCOMPLETE):
            self._release(held, piece)

    def _piece(self, tokens: list[int], *, alone: bool = False) -> str:
        """Text of the tokens after the context; of the tokens alone where that would alter the context's own text (byte fallback does)."""
        if not tokens:
            return ""
        if not alone:
            whole = self._decode(self._context + tokens)
            if whole.startswith(self._known):
                return whole[len(self._known) :]
        return self._decode(tokens)

    def _release(self, tokens: list[int], piece: str) -> None:
        """Append the text of tokens, which are then behind us."""
        if not piece:
            # special tokens, or a space that shows before a word only
            self._held = [] if self._known else tokens[-MAX_SILENT:]
            return
        self._held = []
        # without bytes that are no text, which would spoil what is decoded after them; whole tokens may follow those
        context, known = self._clean(tokens[-CONTEXT:])
        if known:
            self._context, self._known = context, known
        self._append(piece)

    def _clean(self, tokens: list[int]) -> tuple[list[int], str]:
        """The longest end of the tokens that decodes to whole characters, and its text; empty where there is none."""
        for start in range(len(tokens)):
            text = self._decode(tokens[start:])
            if text and INCOMPLETE not in text:
                return tokens[start:], text
        return [], ""

    def _append(self, piece: str) -> None:
        if self._stopped:
            return
        start = max(0, len(self._text) - self._longest + 1)
        self._text += piece
        found = [at for s in self._stop if (at := self._text.find(s, start)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self._released, self._stopped = len(self._text), True
            self._held = []
        else:
            self._released = max(self._released, len(self._text) - self._possible_stop())

    def _possible_stop(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for size in range(min(self._longest - 1, len(self._text)), 0, -1):
            if any(s.startswith(self._text[-size:]) for s in self._stop if len(s) > size):
                return size
        return 0
