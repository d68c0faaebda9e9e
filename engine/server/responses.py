"""OpenAI's answers: completions, their chunks, and usage, from what the engine returns."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.runtime.request import GenerationResult

_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


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

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}")

    def whole(self, texts: Sequence[str], results: Sequence[GenerationResult], logprobs: Sequence[Any]) -> dict[str, Any]:
        """The answer of a call that does not stream; results: of the call's prompts in turn, each with its choices."""
        choices = []
        for index, (text, result, own) in enumerate(zip(texts, results, logprobs, strict=True)):
            content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            choices.append({"index": index, **content, "logprobs": own, "finish_reason": finish_reason(result)})
        return self._head("chat.completion" if self.chat else "text_completion") | {
            "choices": choices,
            "usage": usage(results, self.n),
            "foretold": figures(results),
        }

    def opening(self, index: int) -> dict[str, Any]:
        """The chunk that says who speaks."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None})

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
