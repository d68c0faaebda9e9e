"""Fuzz every door through which files and values of strangers come in, for as long as wanted.

    python scripts/fuzz_doors.py [--inputs 2000] [--doors config.json,GGUF] [--seed 0] [--json-out FILE]

Each door gets whole inputs, changed: JSON by values of other types and sizes, files by flipped, cut, copied and inserted bytes; formats with digests
or checksums get them right again, so that what lies behind is reached. An input is accepted, or named by one of our errors; anything else, or more
than a second (and a second more for every 100 MB), is a finding and is printed with the seed that makes it. Exit status 1 when there are findings.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from codec.errors import CodecError
from draft.errors import DraftError
from engine.errors import ForetoldError
from engine.server.errors import ApiError
from fuzz.doors import DOORS, Door
from fuzz.mutate import describe

NAMED = (ForetoldError, CodecError, DraftError, ApiError)
SECONDS_AN_INPUT = 1.0


@dataclass
class Tally:
    """What a door's inputs came to."""

    inputs: int = 0
    accepted: int = 0
    named: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    slowest_s: float = 0.0


def fuzz(door: Door, inputs: int, seed: int) -> Tally:
    """Try a door with so many inputs; input n depends on the seed, the door's name and n alone."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        attempt = door.prepare(Path(scratch))
        for number in range(inputs):
            rng = random.Random(f"{seed} {door.name} {number}")
            tally.inputs += 1
            began = time.process_time()
            try:
                attempt(rng)
                tally.accepted += 1
            except NAMED as error:
                tally.named[type(error).__name__] += 1
                if not str(error).isprintable():
                    tally.findings.append(f"input {number}: an error with control characters: {describe(str(error))}")
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # panics of Rust libraries are no Exception
                where = traceback.extract_tb(error.__traceback__)[-1]
                tally.findings.append(
                    f"input {number}: {type(error).__name__}: {describe(str(error))} at {Path(where.filename).name}:{where.lineno}"
                )
            spent = time.process_time() - began
            tally.slowest_s = max(tally.slowest_s, spent)
            if spent > SECONDS_AN_INPUT * door.patience:
                tally.findings.append(f"input {number}: {spent:.1f} s of CPU time")
    return tally


def table(tallies: dict[str, Tally]) -> str:
    """One line a door."""
    lines = [f"{'door':<22}{'inputs':>8}{'accepted':>10}{'named':>8}{'findings':>10}{'slowest s':>11}  errors"]
    for name, tally in tallies.items():
        errors = ", ".join(f"{kind} {count}" for kind, count in tally.named.most_common(4))
        named = tally.named.total()
        lines.append(
            f"{name:<22}{tally.inputs:>8}{tally.accepted:>10}{named:>8}{len(tally.findings):>10}{tally.slowest_s:>11.2f}  {errors}"
        )
    return "\n".join(lines)


def main() -> int:
    """Fuzz the doors asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=2000, metavar="N", help="of each door; slow doors get a tenth")
    parser.add_argument("--doors", default="all", metavar="A,B", help=f"of: {', '.join(door.name for door in DOORS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json-out", type=Path, metavar="FILE")
    args = parser.parse_args()
    chosen = {door.name for door in DOORS} if args.doors == "all" else set(args.doors.split(","))
    if unknown := sorted(chosen - {door.name for door in DOORS}):
        parser.error(f"there is no door {unknown[0]!r}")
    if args.inputs < 1:
        parser.error("--inputs must be at least 1")
    tallies: dict[str, Tally] = {}
    for door in DOORS:
        if door.name in chosen:
            tallies[door.name] = fuzz(door, max(1, args.inputs // door.slowness), args.seed)
            for finding in tallies[door.name].findings[:20]:
                print(f"{door.name}: {finding}", file=sys.stderr)
    print(table(tallies))
    if args.json_out is not None:
        rows = [
            {
                "door": name,
                "inputs": t.inputs,
                "accepted": t.accepted,
                "named": dict(t.named),
                "findings": t.findings,
                "slowest_s": t.slowest_s,
            }
            for name, t in tallies.items()
        ]
        args.json_out.write_text(json.dumps({"seed": args.seed, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    return 1 if any(tally.findings for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
