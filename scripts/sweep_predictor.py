"""What a predictor is worth: bits per element of the residual against the predictor's bytes, for many feature sets and ranks.

One pass over the text gathers second moments of all features at once; every set's predictor comes from a part of that one matrix. Figures are of
held-out tokens: R2 of keys and values, and ideal bits per element at one step (discretised Laplace with calibrated scales, one transform over all
layers of the residual's covariance in the attention metric, no step or gain of a token's own), with the factors rounded as they are stored. Layers
that are run again at a resume are exact, cost no bits, and count among the elements.

    python scripts/sweep_predictor.py --pair qwen2.5-coder --text TEXTS --tokens 200000 --json-out sweep.json --plot sweep.png
    python scripts/sweep_predictor.py --pair smollm2 --text TEXTS --tokens 12000 --context 512 --ranks 256,full --json-out sweep.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.document import command_line
from codec.predictor.features import FeatureSpec
from codec.predictor.fit import RidgeMoments
from codec.spec import QUALITIES
from codec_compare import write_json
from draft.early_exit import default_exit_layer
from engine.calibrate.budget import PACK_BUDGET, bf16_bytes
from engine.calibrate.corpus import documents, library_texts, read_texts, text_files
from engine.calibrate.search import FeatureSet, Whole
from engine.calibrate.stream import PairStream, QueryStatistics, diagonal_blocks
from engine.cli.options import Parser
from engine.errors import ForetoldError, InvalidOption
from engine.hub.pairs import PAIRS, SELF_DRAFT
from engine.hub.resolve import resolve_model, resolve_pair
from engine.model.decoder import Decoder
from engine.text.tokenizer import load_tokenizer
from eval.sweep_fits import FULL, early_exit_sets, separate_sets, sweep

DEFAULT_RANKS = "64,128,256,512,1024,2048,full"
_started = time.monotonic()


def log(message: str) -> None:
    print(f"[{time.monotonic() - _started:5.0f} s] {message}", file=sys.stderr, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--pair", choices=sorted(PAIRS))
    which.add_argument("--target", help="folder or hub id of the target")
    parser.add_argument("--draft", default=SELF_DRAFT, help="with --target: folder or hub id of the draft, or trunk")
    parser.add_argument(
        "--recomputed-layers", default="2,4,8", help="with a separate draft: first layers that sets with the target's states recompute"
    )
    parser.add_argument("--again", dest="recomputed_layers", default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # earlier name
    parser.add_argument("--exit-layer", type=int, help="of an early exit (default: what the engine uses)")
    parser.add_argument("--trunk-layers", type=int, dest="exit_layer", default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # earlier name
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE|DIR", help="default: the interpreter's library")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--held-out-tokens", type=int, default=6144)
    parser.add_argument("--context", type=int, default=1024, help="tokens a document")
    parser.add_argument("--ranks", default=DEFAULT_RANKS, help="comma-separated; `full` is all directions, in 4 and in 8 bits")
    parser.add_argument("--sets", default="", help="comma-separated parts of set names: only those (default: all)")
    parser.add_argument("--quality", choices=list(QUALITIES), default="balanced", help="whose step the bits are at")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json-out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="PNG of bits against predictor bytes")
    return parser.parse_args(arguments)


def numbers(option: str, words: str, also: Sequence[str] = ()) -> list[int | str]:
    """A list such as 64,128,full. Raises InvalidOption."""
    found: list[int | str] = [word if word in also else int(word) if word.isdecimal() else -1 for word in words.split(",") if word]
    if any(isinstance(n, int) and n < 1 for n in found):
        raise InvalidOption(f"{option} {words}", "give whole numbers above 0" + "".join(f", or {word}" for word in also))
    return found


def gather(
    target: Decoder, draft: Decoder | None, sets: Sequence[FeatureSet], docs: Sequence[Sequence[int]], held_out: int, per_batch: int
) -> tuple[Whole, int]:
    """Moments over all documents but some held-out ones, of every feature that a set asks for; and their tokens."""
    first = min(one.first_layer for one in sets)
    spec = FeatureSpec(
        tuple(sorted({tap for one in sets for tap in one.taps})), tuple(sorted({tap for one in sets for tap in one.target_taps}))
    )
    stream = PairStream(target, draft, spec, first)
    held = [d for n, d in enumerate(docs) if n % 8 == 3][: max(1, held_out // max(map(len, docs)))]
    rest = [d for d in docs if not any(d is other for other in held)]
    if not held or not rest:
        raise InvalidOption(f"{len(docs)} documents of text", "give more text, or a smaller --context")
    moments, queries = RidgeMoments(stream.num_features, stream.layout.dim, target.device), QueryStatistics()
    done, total = 0, sum(map(len, rest))
    for group in stream.batches(rest, per_batch):
        batch = stream.run(group, None if queries.complete else queries)
        moments.add(batch.features, batch.y)
        done += sum(map(len, group))
        log(f"{done:,} of {total:,} tokens")
    apart = [stream.run(group) for group in stream.batches(held, per_batch)]
    m = moments.finish()
    weighting = queries.weighting(target, stream.layout, diagonal_blocks(m.yy, stream.layout.head_dim))
    sizes = (stream.draft_size, target.config.hidden_size)
    whole = Whole(
        spec.taps,
        spec.target_taps,
        sizes,
        m,
        torch.cat([b.features for b in apart]),
        torch.cat([b.y for b in apart]),
        weighting,
        stream.layout.layer_dim,
        first,
    )
    return whole, done


@torch.inference_mode()
def run(options: argparse.Namespace) -> dict[str, Any]:
    """The sweep: returns the document that it also wrote to --json-out, row by row."""
    ranks = numbers("--ranks", options.ranks, (FULL,))
    recomputed = [int(m) for m in numbers("--recomputed-layers", options.recomputed_layers)]
    if options.tokens < 256 or options.context < 32:
        raise InvalidOption(f"{options.tokens} tokens in documents of {options.context}", "use at least 256 tokens, and 32 a document")
    if options.pair:
        paths = resolve_pair(options.pair)
        target_dir, draft_dir = paths.target_dir, None if paths.draft == SELF_DRAFT else Path(paths.draft)
    else:
        target_dir, draft_dir = resolve_model(options.target), None if options.draft == SELF_DRAFT else resolve_model(options.draft)
    device = torch.device("cuda" if options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available()) else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.backends.cuda.matmul.allow_tf32 = False
    target = Decoder.from_pretrained(target_dir, dtype=dtype, device=device)
    draft = None if draft_dir is None else Decoder.from_pretrained(draft_dir, dtype=dtype, device=device)
    layers = target.config.num_layers
    if draft is None:
        sets = early_exit_sets(options.exit_layer or default_exit_layer(layers))
    else:
        sets = separate_sets(draft.config.num_layers, recomputed)
    sets = [one for one in sets if not options.sets or any(word.strip() in one.name for word in options.sets.split(","))]
    if not sets or any(one.first_layer >= layers for one in sets):
        raise InvalidOption(
            f"--sets {options.sets} --recomputed-layers {options.recomputed_layers}",
            f"name a set, and fewer than the target's {layers} layers",
        )
    texts = read_texts(text_files(options.text)) if options.text else library_texts()
    docs, digest = documents(texts, load_tokenizer(target_dir), options.tokens + options.held_out_tokens, options.context)
    whole, done = gather(target, draft, sets, docs, options.held_out_tokens, 16_384 if device.type == "cuda" else 2048)
    elements = layers * target.config.kv_width
    document: dict[str, Any] = {
        "pair": options.pair or target_dir.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "command": command_line("sweep_predictor.py", None),
        "tokens": done,
        "held_out_tokens": len(whole.y),
        "text": digest,
        "quality": options.quality,
        "target_bytes": bf16_bytes(target),
        "versions": {"torch": importlib.metadata.version("torch")},
        "rows": [],
    }
    for one in sets:
        for row in sweep(whole, one, ranks, QUALITIES[options.quality], elements):
            row["predictor_share"] = row["predictor_bytes"] / document["target_bytes"]
            document["rows"].append(row)
            write_json(options.json_out, document)
            log(
                f"{row['features']:32s} rank {row['rank']!s:>5s} {row['storage_bits']} bits  {row['predictor_bytes'] / 1e6:7.1f} MB  "
                f"R2 {row['r2_k']:.3f} / {row['r2_v']:.3f}  {row['ideal_bits_per_element']:.4f} bits"
            )
    if options.plot:
        plot(document, options.plot)
    return document


def plot(document: dict[str, Any], path: Path) -> None:
    """Bits per element against predictor bytes, one line a feature set; hollow: all directions in 4 and 8 bits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 6.5))
    names = list(dict.fromkeys(row["features"] for row in document["rows"]))
    colours = plt.get_cmap("viridis")
    for n, name in enumerate(names):
        colour = colours(0.92 * n / max(1, len(names) - 1))
        rows = [row for row in document["rows"] if row["features"] == name]
        low = [row for row in rows if row["rank"] != FULL]
        axes.plot(
            [r["predictor_bytes"] / 1e6 for r in low], [r["ideal_bits_per_element"] for r in low], "-o", color=colour, ms=5, label=name
        )
        full = [row for row in rows if row["rank"] == FULL]
        axes.plot(
            [r["predictor_bytes"] / 1e6 for r in full],
            [r["ideal_bits_per_element"] for r in full],
            "--s",
            color=colour,
            ms=6,
            mfc="white",
            label=None if low else name,
        )
    limit = PACK_BUDGET * document["target_bytes"] / 1e6
    axes.axvline(limit, color="#c0182b", lw=1)
    axes.annotate(
        f"{PACK_BUDGET:.0%} of the target, the whole pack's budget",
        (limit, axes.get_ylim()[1]),
        xytext=(-4, -4),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="top",
        fontsize=8,
        color="#c0182b",
    )
    axes.set_xscale("log")
    axes.set_xlabel("predictor, MB (circles: low rank in 8 bits; squares: all directions in 4 and in 8 bits)")
    axes.set_ylabel(f"ideal bits per KV element at `{document['quality']}`")
    axes.set_title(f"{document['pair']}: features and ranks of the predictor, {document['tokens']:,} tokens", loc="left", fontsize=11)
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    try:
        run(parse(arguments))
    except (ForetoldError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
