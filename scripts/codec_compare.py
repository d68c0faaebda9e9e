"""How many times smaller our codec is than each baseline at equal divergence, read off the curves of bench_codec; joins the files of several runs.

    python scripts/codec_compare.py ours.json peers.json --json-out codec.json --plot codec.png

Runs of bench_codec with the same settings may go side by side, each with its own --json-out; of rows with the same name the last file's counts.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from engine.cli.options import Parser
from engine.errors import ForetoldError, InvalidOption
from engine.files import write_atomically
from eval.codec_plot import plot

LEVELS = (0.0075, 0.014, 0.021, 0.03)
OURS = "foretold"


def bits_at(points: Sequence[tuple[float, float]], kl: float) -> float | None:
    """Bits of a curve of (KL, bits) points at a KL: log bits run straight between neighbours on the log of KL. None outside of the points.

    Points that another one beats in both are left out: nobody would use them.
    """
    best = sorted(p for p in points if p[0] > 0 and not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points))
    for (x0, y0), (x1, y1) in pairwise(best):
        if x0 <= kl <= x1:
            share = (math.log(kl) - math.log(x0)) / (math.log(x1) - math.log(x0))
            return math.exp((1 - share) * math.log(y0) + share * math.log(y1))
    return None


def comparisons(rows: Sequence[dict[str, Any]], levels: Sequence[float] = LEVELS) -> list[dict[str, Any]]:
    """For each KL and baseline: our bits per element, the baseline's, and their ratio; None where a curve does not reach that KL.

    bits_without_sinks leave the exact first tokens out, which baselines store in 16 bits and we run again.
    """
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        curves.setdefault(row["method"], []).append(row)

    def bits(method: str, kl: float, less: float) -> float | None:
        return bits_at([(r["kl"], r["bits_per_element"] - less * r["sink_bits_per_element"]) for r in curves[method]], kl)

    found = []
    for kl in levels if OURS in curves else ():
        ours = bits(OURS, kl, 0)
        for method in curves:
            if method != OURS:
                theirs, coded = bits(method, kl, 0), bits(method, kl, 1)
                found.append(
                    {
                        "kl": kl,
                        "method": method,
                        "our_bits": ours,
                        "bits": theirs,
                        "bits_without_sinks": coded,
                        "times_smaller": _over(theirs, ours),
                        "times_smaller_without_sinks": _over(coded, ours),
                    }
                )
    return found


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def print_comparisons(found: Sequence[dict[str, Any]]) -> None:
    """One line a baseline, one column a KL."""
    if not found:
        return
    levels, methods = (list(dict.fromkeys(one[key] for one in found)) for key in ("kl", "method"))
    at = {(one["kl"], one["method"]): one for one in found}
    print("times smaller than the baseline at equal KL, everything stored (in brackets without the exact first tokens)")
    print(f"{'KL':20s}" + "".join(f"{kl:>18g}" for kl in levels))
    print(f"{'our bits':20s}" + "".join(f"{_number(at[kl, methods[0]]['our_bits'], 4):>18s}" for kl in levels))
    for method in methods:
        cells = [
            f"{_number(at[kl, method]['times_smaller'], 1)} ({_number(at[kl, method]['times_smaller_without_sinks'], 1)})" for kl in levels
        ]
        print(f"{method:20s}" + "".join(f"{cell:>18s}" for cell in cells))


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes the whole file or none."""
    write_atomically(path, json.dumps(document, indent=1) + "\n")


def join(paths: Sequence[Path]) -> dict[str, Any]:
    """One document from those of several runs. Raises InvalidOption when one is no benchmark, or of other settings or another device."""
    documents = []
    for path in paths:
        try:
            document = json.loads(path.read_text())
            documents.append((document["settings"], document["device"], document["rows"], document))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidOption(f"{path} is not a codec benchmark", "give files that bench_codec.py wrote") from error
    for path, (settings, device, _, _) in zip(paths, documents, strict=True):
        if settings != documents[0][0] or device != documents[0][1]:
            raise InvalidOption(
                f"{path} is of other settings or another device than {paths[0]}", "join runs on the same text with the same options"
            )
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for _, _, own, _ in documents:
        rows |= {(row["method"], row["quality"]): row for row in own}
    whole = documents[0][3] | {"rows": list(rows.values()), "command": [d["command"] for *_, d in documents]}
    return whole | {"comparisons": comparisons(whole["rows"])}


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="what bench_codec.py wrote")
    parser.add_argument("--json-out", type=Path, help="the joined document")
    parser.add_argument("--plot", type=Path, help="PNG of all rows")
    parser.add_argument("--plot-without-sinks", action="store_true", help="leave the four exact tokens out of the picture")
    try:
        options = parser.parse_args(arguments)
        document = join(options.files)
        if options.json_out:
            write_json(options.json_out, document)
        if options.plot:
            plot(document, options.plot, options.plot_without_sinks)
    except (ForetoldError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_comparisons(document["comparisons"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
