"""Bits per KV element against loss, for our codec and its baselines, on the same tokens, in real bytes.

Protocol: the first three quarters of every sequence's cache are encoded, decoded from the bytes alone and put back; the last quarter is
scored against the untouched target (codec_quality.py). Test and calibration text: text_tokens.py. Every finished row is written at once;
a restart with the same --json-out skips it, and codec_compare.py joins the files of runs side by side. Bits are everything a decoder needs
beyond model, pack and calibration, exact tokens included.

    python scripts/bench_codec.py --pair smollm2 --pack smollm2.pack --text docs/ src/ --tokens 12288 --context 512
        --methods foretold,kvtc,turboquant-mean,fp8 --json-out codec.json --plot codec.png
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from baselines import Calibration, CalibrationAccumulator
from bench.document import command_line
from codec.pack import CodecPack
from codec.spec import NUM_SINKS, KvLayout
from codec_compare import comparisons, print_comparisons, write_json
from engine.cli.options import Parser
from engine.errors import ForetoldError, InvalidOption
from engine.hub.pairs import PAIRS
from engine.hub.resolve import resolve_model, resolve_pair
from engine.loading import choose_draft
from engine.model.decoder import Decoder
from engine.text.tokenizer import load_tokenizer
from eval.codec_breakdown import merged
from eval.codec_methods import BaselineMethod, ForetoldMethod, Method, PairCodec, select_methods
from eval.codec_plot import plot
from eval.codec_quality import Quality, Scores
from eval.text_tokens import TokenSplit, digest, split_tokens

DEFAULT_METHODS = (
    "foretold,foretold-nopred,kvtc,aqua-kv,turboquant-mean,turboquant,kivi,kivi-nowindow,cachegen,cachegen-anchors,fp8,bf16+zstd"
)


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class LazyCalibration:
    """Runs the calibration text through the target when the first baseline needs it."""

    def __init__(self, quality: Quality, layout: KvLayout, sequences: list[list[int]], sample_tokens: int, covariances: bool):
        self.digest = digest(sequences) if sequences else ""
        self._quality, self._layout, self._sequences, self._sample_tokens = quality, layout, sequences, sample_tokens
        self._covariances = covariances
        self._calibration: Calibration | None = None

    def get(self) -> Calibration:
        if self._calibration is None:
            if not self._sequences:
                raise InvalidOption("there is no calibration text for the baselines", "give more --text, or --calibration-text")
            start, shown = time.perf_counter(), 0.0
            stream = CalibrationAccumulator(
                self._layout,
                sample_tokens=self._sample_tokens,
                covariances=self._covariances,
                expected_tokens=sum(map(len, self._sequences)) - NUM_SINKS * len(self._sequences),
            )
            for n, rows in enumerate(self._quality.calibration_rows(self._sequences, NUM_SINKS), 1):
                stream.update(rows)
                if time.perf_counter() - shown > 10 or n == len(self._sequences):
                    shown = time.perf_counter()
                    log(f"calibration: {n} of {len(self._sequences)} sequences, {shown - start:.0f} s")
            self._calibration = stream.finish()
        return self._calibration


def measure(method: Method, quality: Quality, cases: list[Any], full_dim: int, group: int = 1) -> dict[str, Any]:
    """One row of the contract: everything summed over the test sequences, which are coded `group` at a time."""
    scores, num_bytes, encode_s, decode_s, ideal = Scores(), 0, 0.0, 0.0, 0.0
    has_ideal, shown, parts, expected = True, time.perf_counter(), [], 0.0
    for start in range(0, len(cases), group):
        some = cases[start : start + group]
        result = method.run(some)
        quality.score(some, result.decoded, scores)
        num_bytes, encode_s, decode_s = num_bytes + result.num_bytes, encode_s + result.encode_s, decode_s + result.decode_s
        has_ideal = has_ideal and result.ideal_bits is not None
        ideal += result.ideal_bits or 0.0
        parts += [] if result.breakdown is None else [result.breakdown]
        expected += float("nan") if result.expected_kl is None else result.expected_kl * sum(case.prefix for case in some)
        if time.perf_counter() - shown > 10:
            shown = time.perf_counter()
            log(f"  {method.method} {method.quality}: {start + len(some)} of {len(cases)} sequences")
    tokens = sum(case.prefix for case in cases)
    row = {
        "method": method.method,
        "quality": method.quality,
        "bits_per_element": 8 * num_bytes / (tokens * full_dim),
        "ideal_bits_per_element": ideal / (tokens * full_dim) if has_ideal else None,
        "sink_bits_per_element": 16 * NUM_SINKS * len(cases) * method.sink_dim / (tokens * full_dim),
        "kl": scores.kl,
        "expected_kl": None if math.isnan(expected) else expected / tokens,
        "kl_standard_error": scores.kl_standard_error,
        "nll": scores.nll / scores.predictions,
        "nll_untouched": scores.nll_untouched / scores.predictions,
        "top1_agreement": scores.agree / scores.positions,
        "encode_tokens_per_s": tokens / encode_s if encode_s else None,
        "decode_tokens_per_s": tokens / decode_s,
        "tokens": tokens,
        "inputs": method.inputs,
    }
    return row | ({"breakdown": merged(parts)} if parts else {})


def load_rows(path: Path, settings: dict[str, Any], restart: bool) -> list[dict[str, Any]]:
    """Rows of an earlier run with the same settings; InvalidOption when the file is of another run."""
    if restart or not path.exists():
        return []
    try:
        document = json.loads(path.read_text())
        earlier, rows = document["settings"], document["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidOption(f"{path} is not a codec benchmark", "choose another --json-out, or --restart to overwrite it") from error
    changed = [key for key in settings if settings[key] != earlier.get(key)]
    if changed:
        raise InvalidOption(
            f"{path} holds rows of other settings ({', '.join(changed)})", "choose another --json-out, or --restart to overwrite it"
        )
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--pair", help=f"one of {', '.join(PAIRS)}")
    which.add_argument("--target", help="folder or hub id of the target (with --draft for our own methods)")
    parser.add_argument(
        "--draft", help="folder or hub id of the draft, folder of a draft head, or trunk (default: the pair's own, or trunk)"
    )
    parser.add_argument("--pack", help="codec pack of the pair (needed by the foretold methods)")
    parser.add_argument("--text", nargs="+", required=True, help="test text: files, folders, or one .npz with `train` and `test` token ids")
    parser.add_argument(
        "--calibration-text", nargs="+", default=[], help="text for the baselines' calibration; default: the other part of --text"
    )
    parser.add_argument("--tokens", type=int, default=12_288, help="test tokens (whole sequences)")
    parser.add_argument("--calibration-tokens", type=int, default=49_152)
    parser.add_argument(
        "--sample-tokens", type=int, default=4096, help="calibration tokens kept for predictors, histograms and bit allocation"
    )
    parser.add_argument("--context", type=int, default=512, help="tokens of a sequence; three quarters are replaced")
    parser.add_argument("--methods", default=DEFAULT_METHODS, help="comma-separated families or points; default all")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU"
    )
    parser.add_argument("--json-out", required=True, type=Path)
    parser.add_argument("--plot", type=Path, help="PNG; drawn from all rows of --json-out")
    parser.add_argument(
        "--plot-without-sinks", action="store_true", help="leave the four exact tokens, which every method stores, out of the picture"
    )
    parser.add_argument("--breakdown", action="store_true", help="our rows also say where their bytes went (row key `breakdown`)")
    parser.add_argument("--restart", action="store_true", help="forget the rows of --json-out")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The benchmark: returns the document that it also wrote to --json-out."""
    wanted = select_methods([word for word in options.methods.split(",") if word])
    if options.context < 32:
        raise InvalidOption(f"a context of {options.context} tokens", "use 32 or more")
    ours = [point for point in wanted if point[0] != "baseline"]
    if ours and not options.pack:
        raise InvalidOption("the foretold methods need a codec pack", "give --pack, or leave them out of --methods")
    device = torch.device("cuda" if options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available()) else "cpu")
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32, "auto": torch.bfloat16 if device.type == "cuda" else torch.float32}[
        options.dtype
    ]
    if options.pair:
        paths = resolve_pair(options.pair)
        target_dir, source = paths.target_dir, options.draft or paths.draft
    else:
        target_dir, source = resolve_model(options.target), options.draft or "trunk"
    target = Decoder.from_pretrained(target_dir, dtype=dtype, device=device)
    c = target.config
    layout = KvLayout(c.num_layers, c.num_kv_heads, c.head_dim)
    tokenizer = load_tokenizer(target_dir)
    split: TokenSplit = split_tokens(
        options.text,
        options.calibration_text,
        options.context,
        options.tokens,
        options.calibration_tokens,
        lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
    )
    pack = CodecPack.load(options.pack) if ours else None
    pair = options.pair or f"{target_dir.name}+{Path(source).name}"
    settings = {
        "pair": pair,
        "context": options.context,
        "prefix": options.context * 3 // 4,
        "test_sequences": len(split.test),
        "test_digest": digest(split.test),
        "dtype": str(dtype).removeprefix("torch."),
    }
    rows = load_rows(options.json_out, settings, options.restart)
    document = {
        "pair": pair,
        "context": options.context,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "command": command_line("bench_codec.py", None),
        "settings": settings,
        "rows": rows,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "numpy", "zstandard")},
    }
    quality = Quality(target, options.context, "cpu" if device.type == "cpu" else device)
    group = 32 if device.type == "cuda" else 4
    needs_covariances = any(point.startswith("kvtc") for _, point in wanted)
    calibration = LazyCalibration(quality, layout, split.calibration, options.sample_tokens, needs_covariances)
    ours_with: PairCodec | None = None
    if pack is not None:
        ours_with = PairCodec(pack, target, choose_draft(source, target.config).load(target))
    log(f"{pair} on {document['device']}: {len(split.test)} test and {len(split.calibration)} calibration sequences of {options.context}")
    cases = None
    for family, point in wanted:
        if family == "baseline":
            method: Method = BaselineMethod(point, layout, calibration, device)
        else:
            assert ours_with is not None
            method = ForetoldMethod(point, ours_with, family == "foretold", options.breakdown)
        same = [r for r in rows if (r["method"], r["quality"]) == (method.method, method.quality)]
        if same and same[0]["inputs"] == method.inputs and (family == "baseline" or not options.breakdown or "breakdown" in same[0]):
            log(f"{method.method} {method.quality}: kept from {options.json_out}")
            continue
        if cases is None:
            cases = quality.untouched(split.test)
        start = time.perf_counter()
        row = measure(method, quality, cases, layout.dim, group)
        rows[:] = [r for r in rows if r not in same] + [row]
        document["comparisons"] = comparisons(rows)
        write_json(options.json_out, document)
        log(
            f"{row['method']:17s} {row['quality']:14s} {row['bits_per_element']:8.4f} bits  KL {row['kl']:.5f}  NLL {row['nll']:.4f} "
            f"({row['nll_untouched']:.4f})  top-1 {row['top1_agreement']:.4f}  {time.perf_counter() - start:.0f} s"
        )
    document["comparisons"] = comparisons(rows)
    print_comparisons(document["comparisons"])
    if options.plot:
        plot(document, options.plot, options.plot_without_sinks)
    return document


def main(arguments: list[str] | None = None) -> int:
    try:
        run(parse(arguments))
    except (ForetoldError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
