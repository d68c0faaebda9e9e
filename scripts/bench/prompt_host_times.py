"""What the host does for a prompt behind a known beginning, in CPU time: in the engine, and in making token ids of a chat."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from engine.engine import Engine
from engine.hub.cache import CacheFolder
from engine.model.forward_pass import DecoderOutput, ForwardPass
from engine.runtime.model_runner import GraphedDecoder
from engine.runtime.prompt_passes import PASS_REQUESTS
from engine.runtime.sampling import SamplingParams
from engine.text.prompts import encode_prompt
from engine.text.tokenizer import load_tokenizer

_UNCOUNTED = 2  # first tries of a size


class HostTimes:
    """Times what the host does for requests behind known contexts: the runner's passes return at once.

    Args:
        engine: of a random decoder, with prefix sharing. repeats: of every figure.
    """

    def __init__(self, engine: Engine, repeats: int) -> None:
        self.core, self.repeats = engine.core, repeats
        assert engine.core.shared_prefixes is not None
        engine.core.shared_prefixes.max_pages = engine.core.pool.max_pages  # a CPU's keeps a few
        self._generator = torch.Generator().manual_seed(1)
        config, device = engine.core.target.config, engine.core.device
        self._logits = torch.randn(PASS_REQUESTS[-1], config.vocab_size, generator=self._generator).to(device)
        self._hidden = torch.zeros(1, config.hidden_size, device=device)
        self._launched: list[tuple[float, float]] = []  # CPU seconds when passes were launched, and were over

    def _text(self, length: int) -> list[int]:
        return torch.randint(10, min(self.core.target.config.vocab_size, 100_000), (length,), generator=self._generator).tolist()

    def _pass(self, asked: ForwardPass) -> DecoderOutput:
        """Nothing but what every runner asks of the host."""
        began = time.process_time()
        asked.batch.check_pages()
        runner = self.core.scheduler.target
        if isinstance(runner, GraphedDecoder):
            runner.tables.rows(asked.sequences)
        out = DecoderOutput(self._logits[: len(asked.sequences)], self._hidden.expand(sum(asked.query_lens), -1), {})
        self._launched.append((began, time.process_time()))
        return out

    def rows(self, contexts: list[int], prompts: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """A row of each context and prompt."""
        with mock.patch.object(self.core.scheduler.target, "run", self._pass):
            for context in contexts:
                known = self._text(context)
                self._times([known], 0)
                for count, length in prompts:
                    tries = [
                        self._times([[*known, *self._text(length)] for _ in range(count)], context)
                        for _ in range(_UNCOUNTED + self.repeats)
                    ]
                    middle = [round(1e3 * sorted(own)[self.repeats // 2], 3) for own in zip(*tries[_UNCOUNTED:], strict=True)]
                    yield {"context": context, "prompts": count, "tokens": length} | dict(
                        zip(("check_ms", "launch_ms", "end_ms"), middle, strict=True)
                    )

    def _times(self, prompts: list[list[int]], context: int) -> tuple[float, float, float]:
        """CPU seconds to check, to launch, to end."""
        core, params = self.core, SamplingParams(max_new_tokens=1, ignore_eos=True, draft_length=0, temperature=1.0)
        self._launched.clear()
        began = time.process_time()
        rows = [core.check_tokens(prompt) for prompt in prompts]
        checked = time.process_time()
        with core.lock:
            requests = [
                core.submit(core.open_sequence_state(), prompt, params, owns_cache=True, row=row)
                for prompt, row in zip(prompts, rows, strict=True)
            ]
            results = [core.finish(request) for request in requests]
        ended = time.process_time()
        size = core.pool.page_size
        if min(result.reused_tokens for result in results) < context // size * size or any(result.new_tokens != 1 for result in results):
            raise SystemExit(f"{[result.reused_tokens for result in results]} of {context} tokens were known")
        passes = sum(after - before for before, after in self._launched)
        return checked - began, self._launched[0][0] - checked, ended - self._launched[0][0] - passes


def chat_of(kilobytes: int) -> list[dict[str, str]]:
    """Messages of so many kilobytes in all, of this repository's own sources."""
    text = "\n".join(path.read_text() for path in sorted(Path(__file__).parents[2].glob("engine/**/*.py")))[: kilobytes << 10]
    messages: list[dict[str, str]] = []
    at, sizes = 0, (6000, 300, 900, 6000, 1500, 4000, 200)
    while at < len(text):
        size = sizes[len(messages) % len(sizes)]
        messages.append({"role": ("user", "assistant")[len(messages) % 2], "content": text[at : at + size]})
        at += size
    return messages


def text_rows(folder: Path, contexts: list[int], repeats: int) -> Iterator[dict[str, Any]]:
    """A row of each context: CPU milliseconds of encoding a chat the first time, and with a turn more."""
    for context in contexts:
        messages, ids, longer = chat_of(max(1, context * 4 >> 10)), [], []
        times: list[tuple[float, float]] = []
        for turn in range(_UNCOUNTED + repeats):
            tokenizer, fresh = load_tokenizer(folder, CacheFolder("tokenizers")), load_tokenizer(folder, CacheFolder("tokenizers"))
            turns = (f"go on, {turn}", "done", "and?")
            longer = [*messages, *({"role": ("user", "assistant")[n % 2], "content": own} for n, own in enumerate(turns))]
            moments = [time.process_time()]
            for own in (messages, longer):
                ids = encode_prompt(tokenizer, own, continue_final_message=False)
                moments.append(time.process_time())
            times.append((moments[1] - moments[0], moments[2] - moments[1]))
            if ids != encode_prompt(fresh, longer, continue_final_message=False):
                raise SystemExit("what was remembered gives other ids")
        first, again = (round(1e3 * sorted(own)[repeats // 2], 2) for own in zip(*times[_UNCOUNTED:], strict=True))
        yield {"context": len(ids), "messages": len(longer), "first_ms": first, "again_ms": again}
