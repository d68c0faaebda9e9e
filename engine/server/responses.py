"""OpenAI's answers: completions, their chunks, and usage, from what the engine returns."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from engine.runtime.logprobs import TokenLogprobs
from engine.runtime.request import GenerationResult

_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Choice:
    """One finished choice. text: None where it is calls alone. calls: of functions, in OpenAI's form. logprobs: in the route's form, or None."""

    result: GenerationResult
    text: str | None
    calls: Sequence[dict[str, Any]] = ()
    logprobs: Any = None

    @property
    def reason(self) -> str:
        """OpenAI's word for its end."""
        return "tool_calls" if self.calls else finish_reason(self.result)


class LogprobsForm:
    """Log probabilities in OpenAI's two forms.

    Args:
        decode: token ids to text, special tokens included.
        chat: form of /v1/chat/completions, else of /v1/completions.
    """

    def __init__(self, decode: Callable[[list[int]], str], chat: bool) -> None:
        self._decode, self._chat = decode, chat

    def __call__(self, given: Sequence[TokenLogprobs], offset: int = 0) -> dict[str, Any] | None:
        """Of some tokens in a row; None for none. offset: characters before the first."""
        if not given:
            return None
        if self._chat:
            content = [
                self._entry(one.token_id, one.logprob) | {"top_logprobs": [self._entry(token, value) for token, value in one.top]}
                for one in given
            ]
            return {"content": content, "refusal": None}
        texts = [self._decode([one.token_id]) for one in given]
        starts = [offset, *accumulate((len(text) for text in texts), initial=offset)][1:-1]
        tops = [{self._decode([token]): value for token, value in one.top} for one in given]
        values = [_finite(one.logprob) for one in given]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": starts}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._decode([token_id])
        # part of a character: its bytes are not in the text
        return {"token": text, "logprob": _finite(logprob), "bytes": None if "\ufffd" in text else list(text.encode())}


def _finite(logprob: float) -> float:
    """A number that JSON has; OpenAI's own stands for what is less probable."""
    return max(logprob, -9999.0)


def finish_reason(result: GenerationResult) -> str:
    """OpenAI's word for the end of a text."""
    return _REASONS[result.finish_reason]


@dataclass(frozen=True)
class Answer:
    """Makes the JSON of one call's answer: whole, or chunk by chunk.

    chat: form of /v1/chat/completions, else of /v1/completions. n: choices a prompt.
    """

    model: str
    chat: bool
    n: int = 1
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    _frames: dict[int, tuple[bytes, bytes]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}")

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer of a call that does not stream; choices: of the call's prompts in turn."""
        results = [choice.result for choice in choices]
        return self._head("chat.completion" if self.chat else "text_completion") | {
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": usage(results, self.n),
            "foretold": figures(results),
        }

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        if not self.chat:
            return {"index": index, "text": choice.text, "logprobs": choice.logprobs, "finish_reason": choice.reason}
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None, "annotations": []}
        if choice.calls:
            message["tool_calls"] = choice.calls
        return {"index": index, "message": message, "logprobs": choice.logprobs, "finish_reason": choice.reason}

    def called(self, index: int, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A chunk with calls of functions."""
        numbered = [{"index": number, **call} for number, call in enumerate(calls)]
        return self._chunk(index, {"delta": {"tool_calls": numbered}, "logprobs": None, "finish_reason": None})

    def opening(self, index: int) -> dict[str, Any]:
        """The chunk that says who speaks."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None})

    def piece_event(self, index: int, text: str) -> bytes:
        """`sse(self.piece(index, text))`, quickly: of all chunks of a choice's text only the text differs, so the rest is written once."""
        if index not in self._frames:
            mark = uuid.uuid4().hex  # a text that neither the model's name nor the id holds
            before, _, after = sse(self.piece(index, mark)).partition(f'"{mark}"'.encode())
            self._frames[index] = before, after
        before, after = self._frames[index]
        return before + json.dumps(text, ensure_ascii=False).encode("utf-8", "replace") + after

    def piece(self, index: int, text: str, logprobs: Any = None) -> dict[str, Any]:
        """A chunk with text."""
        content = {"delta": {"content": text}} if self.chat else {"text": text}
        return self._chunk(index, {**content, "logprobs": logprobs, "finish_reason": None})

    def closing(self, index: int, reason: str) -> dict[str, Any]:
        """A choice's last chunk."""
        content: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        return self._chunk(index, {**content, "logprobs": None, "finish_reason": reason})

    def usage_chunk(self, results: Sequence[GenerationResult]) -> dict[str, Any]:
        """The chunk after the last choice's end, for callers that asked for it."""
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        return head | {"choices": [], "usage": usage(results, self.n), "foretold": figures(results)}

    def _chunk(self, index: int, content: Mapping[str, Any]) -> dict[str, Any]:
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        return head | {"choices": [{"index": index, **content}]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def sse(value: Mapping[str, Any]) -> bytes:
    """An event of a stream: JSON in the form of server-sent events."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


def usage(results: Sequence[GenerationResult], n: int) -> dict[str, Any]:
    """Tokens of a call; a prompt counts once, however many choices it has. results: n choices of the first prompt, then of the next."""
    prompts = results[::n]
    prompt_tokens, new_tokens = sum(r.prompt_tokens for r in prompts), sum(r.new_tokens for r in results)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(r.reused_tokens for r in prompts)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
            "reasoning_tokens": 0,
            "audio_tokens": 0,
        },
    }


def figures(results: Sequence[GenerationResult]) -> dict[str, Any]:
    """What OpenAI's protocol has no field for: speculation's figures over all choices, and seconds to the first token."""
    proposed, accepted = sum(r.speculation.proposed for r in results), sum(r.speculation.accepted for r in results)
    steps, new_tokens = sum(r.speculation.steps for r in results), sum(r.speculation.new_tokens for r in results)
    return {
        "drafter": results[0].speculation.drafter,
        "proposed": proposed,
        "accepted": accepted,
        "acceptance_rate": accepted / proposed if proposed else 0.0,
        "tokens_per_step": new_tokens / steps if steps else 0.0,
        "ttft_s": min(r.ttft_s for r in results),
        "seeds": [r.seed for r in results],
    }
