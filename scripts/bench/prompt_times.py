"""Time to the first token of prompts behind known beginnings: through the engine, as one pass of its runner, and as the target's own pass.

    python scripts/bench/prompt_times.py --shape qwen2.5-1.5b --prompts 64,300,900,4x60 --contexts 0,8000 --json-out prompts.json

Weights are random. Prompts are LENGTH or COUNTxLENGTH, of requests that come together. Every row is a JSON line: `engine_ms` through `Engine.generate`,
which finds the context in its prefix cache, until the last request has its first token; `pass_ms` a pass of the runner, captured where it can be
(`captured`, by `capture_steps`, whose line comes first); `own_ms` the decoder's own. Each is the median of --repeats, after two that are not counted.
Nothing is printed of a size whose logits are not those of the own pass: `relative_rms` is the distance of both.

    python scripts/bench/prompt_times.py --host --prompts 60,8x60 --contexts 1000,8000,32000,100000

With --host the model's passes are left out, and rows say what the host does for requests behind a known context, in CPU milliseconds of all of them
together: `check_ms` to check their ids, `launch_ms` from there to the launch of their first pass (finding the beginning, pages, inputs), `end_ms` from
there to their end (sampling, keeping pages, results). Texts of one new token, drawn, so that whole pages are shared on a CPU as well.

    python scripts/bench/prompt_times.py --tokenizer FOLDER --contexts 1000,8000,32000,100000

With --tokenizer, a model's folder: CPU milliseconds to make token ids of a chat of about so many tokens, `first_ms`, and of the same chat with one more
question and answer, `again_ms`; the latter's ids are compared with those of a tokenizer that has seen nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.decode_profile import SHAPES, moment, random_decoder
from bench.document import RowDocument, command_line, measured_on
from bench.prompt_host_times import HostTimes, text_rows
from engine.engine import Engine
from engine.kv.pool import KvSequence
from engine.model.decoder import forward_reserved
from engine.runtime import memory, model_runner, prompt_passes
from engine.runtime.sampling import SamplingParams

BOUND = 0.1  # of logits: orders of sums in bfloat16 differ by .035 after 28 layers, a pass that reads or writes another place by about 1
_UNCOUNTED = 2  # first runs of a size


def count_and_length(prompt: str) -> tuple[int, int]:
    """4x60 -> (4, 60), 60 -> (1, 60)."""
    count, _, length = prompt.rpartition("x")
    return int(count or 1), int(length)


def median_ms(run: Callable[[], float], repeats: int) -> float:
    """Milliseconds; run: the seconds of one try."""
    times = [run() for _ in range(_UNCOUNTED + repeats)]
    return 1e3 * sorted(times[_UNCOUNTED:])[repeats // 2]


class PromptTimes:
    """Times prompts of one engine behind contexts of one length.

    Args:
        engine: of a random decoder, with prefix sharing.
        context: tokens that all prompts go on from. repeats: of every figure.
    """

    def __init__(self, engine: Engine, context: int, repeats: int) -> None:
        self.engine, self.repeats = engine, repeats
        self.decoder, self.runner = engine.core.target, engine.core.scheduler.target
        self._generator = torch.Generator().manual_seed(context)
        self.context = self._text(context)
        if context:
            engine.generate([self.context], SamplingParams(max_new_tokens=1, ignore_eos=True))

    def _text(self, length: int) -> list[int]:
        """Token ids that no other text has."""
        return torch.randint(10, min(self.decoder.config.vocab_size, 100_000), (length,), generator=self._generator).tolist()

    def engine_ms(self, count: int, length: int) -> float:
        """Through `Engine.generate`; each try has prompts of its own."""
        params, least = (
            SamplingParams(max_new_tokens=1, ignore_eos=True, draft_length=0),
            len(self.context) - self.engine.core.pool.page_size,
        )

        def run() -> float:
            asked = [[*self.context, *self._text(length)] for _ in range(count)]
            results = self.engine.generate(asked, params)
            if min(result.reused_tokens for result in results) <= least:
                known = [result.reused_tokens for result in results]
                raise SystemExit(f"only {known} of {len(self.context)} tokens were known (on a CPU give --contexts in multiples of 256)")
            return max(result.ttft_s for result in results)

        return median_ms(run, self.repeats)

    @torch.inference_mode()
    def passes(self, count: int, length: int) -> dict[str, Any]:
        """`pass_ms`, `own_ms`, `captured` and `relative_rms`."""
        device, pool = self.decoder.device, self.engine.core.pool
        ids = torch.tensor(self._text(count * length), device=device)
        sequences = [self._behind_context(pool) for _ in range(count)]
        logits: dict[str, torch.Tensor] = {}

        def timed(name: str, model: Any) -> float:
            def run() -> float:
                began = moment(device)
                logits[name] = forward_reserved(model, ids, sequences, [length] * count, logits="last").logits
                logits[name].argmax(-1).tolist()
                return moment(device) - began

            return median_ms(run, self.repeats)

        with mock.patch.object(self.decoder, "run", wraps=self.decoder.run) as run:
            found: dict[str, Any] = {"pass_ms": timed("pass", self.runner), "captured": not run.called}
        found["own_ms"] = timed("own", self.decoder)
        for sequence in sequences:
            sequence.free()
        distance = ((logits["pass"] - logits["own"]).norm() / logits["own"].norm()).item()
        if not distance < BOUND:
            raise SystemExit(f"{count} x {length} tokens: logits {distance:.3f} from the own pass's")
        return found | {"relative_rms": distance}

    def _behind_context(self, pool: Any) -> KvSequence:
        sequence = pool.new_sequence()
        if self.context:
            ids = torch.tensor(self.context, device=self.decoder.device)
            forward_reserved(self.decoder, ids, [sequence], [len(self.context)], logits="none")
            sequence.advance(len(self.context))
        return sequence


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-1.5b", choices=sorted(SHAPES))
    parser.add_argument("--prompts", default="64,200,300,500,900,1500,4096,4x60,8x60", help="LENGTH or COUNTxLENGTH, comma-separated")
    parser.add_argument("--contexts", default="0,8000", help="tokens before the prompts, comma-separated")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--pass-rows", help="other sizes of captured passes than the engine's, ascending and comma-separated (256,512,2048)"
    )
    parser.add_argument("--host", action="store_true", help="what the host does, without the model's passes")
    parser.add_argument("--tokenizer", type=Path, help="a model's folder, of whose tokenizer chats are timed instead")
    parser.add_argument("--json-out", type=Path)
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error("--repeats is at least 1")
    if args.pass_rows:
        sizes = tuple(int(own) for own in args.pass_rows.split(","))
        if sizes != tuple(sorted(set(sizes))) or sizes[0] < 1:
            parser.error("--pass-rows are ascending")
        for module in (prompt_passes, model_runner, memory):
            module.PASS_ROWS = sizes  # type: ignore[attr-defined]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompts = [count_and_length(own) for own in args.prompts.split(",")]
    contexts = [int(own) for own in args.contexts.split(",")]
    if args.tokenizer is not None:
        report = RowDocument({**measured_on(device), "command": command_line("bench/prompt_times.py", argv)}, args.json_out)
        for row in text_rows(args.tokenizer, contexts, args.repeats):
            report.add(row)
        return 0
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    positions = max(32768, 1024 + max(contexts) + max(length for _, length in prompts))
    target = random_decoder(args.shape, device, dtype, positions=positions)
    most = max(count * (max(contexts) + length) for count, length in prompts)
    engine = Engine(target, draft=None, max_batch=max(count for count, _ in prompts), pool_tokens=3 * most + (1 << 15))
    captured = None if args.host else engine.core.capture_steps()
    about = {
        **measured_on(device), "command": command_line("bench/prompt_times.py", argv), "shape": args.shape,
        "pass_rows": prompt_passes.PASS_ROWS, "captured": captured and captured._asdict(),
    }  # fmt: skip
    report = RowDocument(about, args.json_out)
    for row in HostTimes(engine, args.repeats).rows(contexts, prompts) if args.host else ():
        report.add(row)
    for context in [] if args.host else contexts:
        times = PromptTimes(engine, context, args.repeats)
        for count, length in prompts:
            row = {"context": context, "prompts": count, "tokens": length, **times.passes(count, length)}
            report.add(row | {"engine_ms": times.engine_ms(count, length)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
