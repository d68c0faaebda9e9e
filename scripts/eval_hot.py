"""What the quantised formats cost: loss by the quality protocol, drafts accepted, tokens per second.

Each format by the protocol of codec_quality.py: an exact prefill, the first three quarters of the cache put into the format, the last quarter scored
against the untouched target. `kl`, `nll`, `top1_agreement`: the decoded cache is read in plain pages, as for every other codec. `running`: the same,
but the last quarter attends to the codes and is itself written as codes, the latest tokens read exactly, as when text is generated.

`expected_acceptance` (pairs with a draft model): mean over the scored positions of sum min(p, q), q the draft's distribution: what speculation at
temperature 1 accepts, without the noise of sampling. `speculation`: real, the same prompts (the windows' beginnings) as one batch.

    python scripts/eval_hot.py --pair qwen2.5-coder --text docs/ src/ --tokens 24576 --json-out scripts/results/hot-h100-qwen2.5-coder.json
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.document import command_line
from codec_compare import write_json
from engine.calibrate.channel_means import channel_means
from engine.cli.command import load, quiet_libraries, versions
from engine.cli.options import report
from engine.engine import Engine
from engine.errors import ForetoldError, InvalidOption
from engine.hub.pairs import PAIRS
from engine.kv.formats import KV_CACHE_DTYPES, PLAIN, element_bits
from engine.kv.pool import KvPool, KvSequence
from engine.runtime.memory import open_pool
from engine.runtime.sampling import SamplingParams
from eval.codec_quality import Case, Quality, Scores
from eval.text_tokens import digest, split_tokens

TEMPERATURES = (0.0, 1.0)
_WARM_TOKENS = 8
_PAGE = 64


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class QuantisedQuality(Quality):
    """The protocol with a pool of any format; sums what the engine's draft model would have accepted of the scored positions."""

    def __init__(self, engine: Engine, context: int, pool: KvPool | None = None):
        super().__init__(engine.core.target, context, engine.device)
        self.draft = engine.core.draft_model
        self.draft_pool = self.draft.new_pool(self.batch * -(-context // _PAGE), _PAGE) if self.draft else None
        self.pool = pool or self.pool  # type: ignore[assignment]
        self.accepted, self.positions = 0.0, 0

    def _log_probs(self, ids: torch.Tensor, sequences: list[KvSequence]) -> torch.Tensor:
        log_probs = super()._log_probs(ids, sequences)
        if self.draft is not None and self.draft_pool is not None:
            own = [self.draft_pool.new_sequence(self.context) for _ in ids]
            try:
                hidden = self.draft(ids.flatten(), own, [self.context] * len(ids), logits="none").hidden
            finally:
                for sequence in own:
                    sequence.free()
            for row, p in zip(hidden.unflatten(0, (len(ids), -1)), log_probs, strict=True):
                q = self.draft.head(row[self.prefix :]).softmax(-1)
                width = min(q.shape[-1], p.shape[-1])  # either may be padded beyond the tokenizer's tokens
                self.accepted += float(torch.minimum(p[:, :width].exp(), q[:, :width]).sum(dtype=torch.float64))
                self.positions += len(p)
        return log_probs

    @property
    def expected_acceptance(self) -> float | None:
        """None without a draft model."""
        return self.accepted / self.positions if self.positions else None


def pool_of(engine: Engine, kv_format: str, tokens: int) -> KvPool:
    """A pool in a format for so many tokens."""
    pages = -(-tokens // _PAGE)
    target = engine.core.target
    means = None if kv_format == PLAIN else channel_means(target, engine.tokenizer, engine.core.config.target_dir)
    return open_pool(target, kv_format, pages, _PAGE, pages, means=means)


@torch.inference_mode()
def decoded(engine: Engine, case: Case, pool: KvPool) -> torch.Tensor:
    """The case's prefix KV float32 [P, D] after a stay in `pool`."""
    sequence = pool.new_sequence()
    try:
        sequence.ensure(len(case.kv))
        engine.core.target.write_kv(sequence, 0, case.kv)
        return engine.core.target.read_kv(sequence, 0, case.prefix)
    finally:
        sequence.free()


def figures(scores: Scores, quality: QuantisedQuality) -> dict[str, Any]:
    return {
        "kl": scores.kl,
        "kl_standard_error": scores.kl_standard_error,
        "nll": scores.nll / scores.predictions,
        "nll_untouched": scores.nll_untouched / scores.predictions,
        "top1_agreement": scores.agree / scores.positions,
        "expected_acceptance": quality.expected_acceptance,
    }


def loss(engine: Engine, kv_format: str, windows: list[list[int]], context: int) -> dict[str, Any]:
    """One format's loss over the test windows, a batch of them at a time."""
    plain, scores, running_scores = QuantisedQuality(engine, context), Scores(), Scores()
    running = QuantisedQuality(engine, context, pool_of(engine, kv_format, plain.batch * (context + _PAGE)))
    untouched = Quality(engine.core.target, context, engine.device)
    for start in range(0, len(windows), plain.batch):
        cases = untouched.untouched(windows[start : start + plain.batch])
        plain.score(cases, [decoded(engine, case, running.pool) for case in cases], scores)
        running.score(cases, [case.kv for case in cases], running_scores)
        log(f"  {kv_format}: {start + len(cases)} of {len(windows)} sequences, KL {scores.kl:.5f}, running {running_scores.kl:.5f}")
    return figures(scores, plain) | {"running": figures(running_scores, running)}


def speculation(engine: Engine, kv_format: str, prompts: list[list[int]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Real speculation over the prompts as one batch, at each temperature."""
    room = sum(-(-(len(p) + args.new_tokens + args.draft_length) // _PAGE) + 1 for p in prompts) * _PAGE
    core = engine.core
    own = Engine(
        core.target,
        engine.tokenizer,
        draft=core.source,
        kv_cache_dtype=kv_format,
        pool_tokens=room,
        prefix_sharing=False,
        target_dir=core.config.target_dir,
    )
    rows = []
    for temperature in TEMPERATURES:

        def params(count: int, temperature: float = temperature) -> list[SamplingParams]:
            return [
                SamplingParams(count, temperature, seed=seed, ignore_eos=True, draft_length=args.draft_length)
                for seed in range(len(prompts))
            ]

        own.generate(prompts, params(_WARM_TOKENS))
        began = time.perf_counter()
        results = own.generate(prompts, params(args.new_tokens))
        seconds = time.perf_counter() - began
        counts = [r.speculation for r in results]
        proposed, accepted = sum(c.proposed for c in counts), sum(c.accepted for c in counts)
        steps, new = sum(c.steps for c in counts), sum(r.new_tokens for r in results)
        rows.append(
            {
                "temperature": temperature,
                "batch": len(prompts),
                "prompt_tokens": len(prompts[0]),
                "draft_length": args.draft_length,
                "proposed": proposed,
                "accepted": accepted,
                "acceptance_rate": accepted / max(1, proposed),
                "tokens_per_step": sum(c.new_tokens for c in counts) / max(1, steps),
                "new_tokens": new,
                "tokens_per_s": new / seconds,
                "pool_bytes": own.core.pool.bytes,
            }
        )
        log(
            f"  {kv_format}: temperature {temperature:g}, {rows[-1]['acceptance_rate']:.4f} of {proposed} drafts accepted, {new / seconds:.1f} tokens/s"
        )
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--pair", help=f"one of {', '.join(PAIRS)}")
    which.add_argument("--target", help="folder or hub id of the target")
    parser.add_argument("--draft", help="another draft than the pair's own; with --target none unless given")
    parser.add_argument("--text", nargs="+", required=True, help="test text as for bench_codec.py: files, folders, or an .npz of token ids")
    parser.add_argument("--formats", default=",".join(KV_CACHE_DTYPES))
    parser.add_argument("--tokens", type=int, default=24576, help="test tokens, in whole windows")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=24, help="prompts of the speculation runs; 0: none")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json-out", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    args.formats = args.formats.split(",")
    unknown = [name for name in args.formats if name not in KV_CACHE_DTYPES]
    if unknown:
        raise InvalidOption(f"unknown KV cache dtype {unknown[0]!r}", f"choose from {', '.join(KV_CACHE_DTYPES)}")
    if args.prompt_tokens < 1 or args.prompts < 0 or args.new_tokens < 1 or args.draft_length < 1:
        raise InvalidOption("prompts have at least one token, new tokens and drafts are at least 1", "check the options")
    if args.context < 8:
        raise InvalidOption(f"a context of {args.context} tokens leaves nothing to score", "give at least 8")
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    engine = load(args)
    assert engine.tokenizer is not None
    windows = split_tokens(
        args.text, [], args.context, args.tokens, 0, lambda text: engine.tokenizer.encode(text, add_special_tokens=False)
    ).test
    prompts = [window[: args.prompt_tokens] for window in windows[: args.prompts]] if engine.core.source is not None else []
    config = engine.core.target.config
    device = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu"
    document: dict[str, Any] = {
        "pair": args.pair or args.target,
        "context": args.context,
        "prefix": args.context * 3 // 4,
        "test_sequences": len(windows),
        "test_digest": digest(windows),
        "device": device,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "drafter": engine.drafter_name,
        "command": command_line("eval_hot.py", args.arguments),
        "versions": versions(),
        "rows": [],
    }
    for kv_format in args.formats:
        row: dict[str, Any] = {"hot": kv_format, "bits_per_element": element_bits(kv_format, config.head_dim, engine.dtype)}
        row |= loss(engine, kv_format, windows, args.context)
        row["speculation"] = speculation(engine, kv_format, prompts, args) if prompts else []
        document["rows"].append(row)
        if args.json_out:
            write_json(args.json_out, document)
    return document


def main(arguments: list[str] | None = None) -> int:
    try:
        args = parse(arguments)
        args.arguments = arguments
        quiet_libraries()
        document = run(args)
    except ForetoldError as error:
        return report(error)
    for row in document["rows"]:
        accepted = " ".join(f"{s['acceptance_rate']:.4f}@{s['temperature']:g}" for s in row["speculation"])
        expected = row["running"]["expected_acceptance"]
        print(
            f"{row['hot']:5} {row['bits_per_element']:7.3f} bits  KL {row['kl']:.5f}  running {row['running']['kl']:.5f}  NLL {row['nll']:.4f}  "
            f"top-1 {row['top1_agreement']:.4f}  expected acceptance {'-' if expected is None else format(expected, '.4f')}  accepted {accepted}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
