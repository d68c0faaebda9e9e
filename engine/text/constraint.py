"""Text of a given form: which tokens may come next, by a grammar library that compiles JSON schemas (llguidance)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.errors import InvalidOption

MAX_SCHEMA_CHARS = 1 << 16
_SEPARATORS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_REMEDY = "give a JSON schema that llguidance compiles, or leave response_format out"


class JsonConstraints:
    """Compiles schemas for one tokenizer.

    Args:
        tokenizer: of transformers or alike, with a `backend_tokenizer` of the tokenizers library.
        eos_token_ids: what may end a text once it is whole.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._eos = tokenizer, sorted(eos_token_ids)
        self._compiled: Any = None

    def constraint(self, schema: str) -> JsonConstraint:
        """One text's constraint. schema: JSON text of a schema.

        Raises:
            InvalidOption: llguidance is not installed, or it does not compile the schema.
        """
        try:
            import llguidance
        except ModuleNotFoundError as missing:
            raise InvalidOption(
                "response_format needs the package llguidance", "install the extra: pip install 'foretold[server]'"
            ) from missing
        if len(schema) > MAX_SCHEMA_CHARS:
            raise InvalidOption(f"response_format has a schema of {len(schema):,} characters", f"at most {MAX_SCHEMA_CHARS:,} are taken")
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None or not self._eos:
            raise InvalidOption("response_format needs a tokenizer of the tokenizers library, and an end token", "use another model")
        if self._compiled is None:
            self._compiled = llguidance.LLTokenizer(backend.to_str(), eos_token=self._eos)
        try:
            # without white space of the model's choice, as a small one may never stop writing it
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_SEPARATORS)
            matcher = llguidance.LLMatcher(self._compiled, grammar)
            fault = matcher.get_error() if matcher.is_error() else ""
        except (ValueError, RuntimeError) as error:
            fault = str(error) or "no reason given"
        if fault:
            raise InvalidOption(f"response_format has a schema that is not understood: {fault.splitlines()[0][:200]}", _REMEDY)
        return JsonConstraint(matcher, self._compiled.vocab_size)


class JsonConstraint:
    """What may follow in one text. Made by `JsonConstraints`."""

    def __init__(self, matcher: Any, num_tokens: int) -> None:
        self._matcher, self._num_tokens = matcher, num_tokens

    def append(self, token_ids: Sequence[int]) -> None:
        """Tokens that joined the text for good; they must have been allowed."""
        if len(token_ids) and not self._matcher.is_stopped():
            self._matcher.consume_tokens(list(token_ids))

    def allowed(self, drafts: Sequence[int], vocab_size: int) -> np.ndarray | None:
        """Which tokens may come after the text and `drafts`, [vocab_size] bool; None where any may, as the drafts themselves may not."""
        if any(not 0 <= token < self._num_tokens for token in drafts):  # the matcher would give up for good
            return None
        kept = self._matcher.try_consume_tokens(list(drafts)) if len(drafts) else 0
        try:
            if kept < len(drafts):
                return None
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        finally:
            if kept:
                self._matcher.rollback(kept)
        found = np.zeros(vocab_size, dtype=bool)
        mask = np.unpackbits(bits, bitorder="little")[:vocab_size].astype(bool)
        found[: len(mask)] = mask
        return found


def any_object() -> str:
    """The schema of any JSON object."""
    return json.dumps({"type": "object"})
