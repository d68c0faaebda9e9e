"""Token ids of texts that were encoded before: a prompt that comes back longer is encoded from about where it is new.

A text is cut before added tokens that mark turns. The tokenizers library finds these first, and encodes what lies between two of them by itself, so the
ids of the parts, joined, are the text's. Where the cuts are depends on what lies before them alone: two texts have the same parts as far as they agree.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

PART_CHARS = 4096  # of a part at least, but for the last: about a millisecond's work
SHORTEST = 256  # characters of a part that is remembered
MAX_BYTES = 64 << 20  # of parts and their ids: some 80 prompts of 100,000 tokens that share nothing
_ENTRY_BYTES = 256  # what a part takes beside its text and ids, about


class KnownTexts:
    """What one tokenizer has encoded, the least recently used parts forgotten first. Not safe for use from several threads at once.

    Args:
        added_tokens: the tokenizer's, by id; `tokenizers.AddedToken` or what has its attributes.
        max_bytes: of what is remembered.
    """

    def __init__(self, added_tokens: dict[int, Any], max_bytes: int = MAX_BYTES) -> None:
        raw = [token for token in added_tokens.values() if token.content and not token.normalized]
        # as the library finds them: of those that begin at the first place, the longest
        contents = sorted((token.content for token in raw), key=len, reverse=True)
        self._found = re.compile("|".join(re.escape(content) for content in contents) or r"(?!)")
        self._begin_parts = {token.content for token in raw if _stands_alone(token)}
        self._ids: OrderedDict[str, array[int]] = OrderedDict()
        self.max_bytes, self.num_bytes = max_bytes, 0

    def parts(self, text: str) -> Iterator[str]:
        """The parts of a text, in order; one for an empty text."""
        start = 0
        for found in self._found.finditer(text):
            if found.start() - start >= PART_CHARS and found[0] in self._begin_parts:
                yield text[start : found.start()]
                start = found.start()
        yield text[start:]

    def ids(self, part: str, encode: Callable[[str], list[int]]) -> array[int] | list[int]:
        """Token ids of one part, which `encode` makes where it is new."""
        known = self._ids.get(part)
        if known is not None:
            self._ids.move_to_end(part)
            return known
        ids = encode(part)
        size = _size(part, len(ids))
        if len(part) < SHORTEST or size > self.max_bytes:
            return ids
        self._ids[part] = array("I", ids)  # the library's own kind of number
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            forgotten, own = self._ids.popitem(last=False)
            self.num_bytes -= _size(forgotten, len(own))
        return ids


def _stands_alone(token: Any) -> bool:
    """Whether a text that is cut before this token has the same tokens on both sides: it takes no white space from before it, is found whatever stands
    beside it, and is neither white space nor a word to a token before it."""
    first = token.content[0]
    return not (token.lstrip or token.single_word or first.isspace() or first.isalnum() or first == "_")


def _size(part: str, num_ids: int) -> int:
    return sys.getsizeof(part) + 4 * num_ids + _ENTRY_BYTES
