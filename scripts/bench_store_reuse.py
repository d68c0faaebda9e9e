"""What a store saves: processes one after the other answer the same long prompt, without a store, with an empty one, and with a filled one.

    python scripts/bench_store_reuse.py --pair smollm2 --characters 16000 [--text FILE...] [--repeats 3] [--quality balanced] [--json-out FILE]

Every answer is a process of its own (`python -m engine.generate --json`). Prints one JSON object
`{"device", "versions", "pair", "command", "speedup", "rows": [{"store", "prompt_tokens", "restored_tokens", "ttft_s", "restore_s", "wall_s", "cpu_s",
"text"}]}`; speedup is the median time to the first token without a store over that with a filled one, cpu_s is of the whole process, loading included.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.document import command_line, print_document

ROOT = Path(__file__).resolve().parents[1]


def answer(options: list[str], store: Path | None, quality: str) -> dict[str, Any]:
    """One process's figures."""
    command = [sys.executable, "-m", "engine.generate", *options, "--raw", "--json"]
    if store is not None:
        command += ["--store", str(store), "--quality", quality]
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    wall_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"the command failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    kept = {name: found[name] for name in ("prompt_tokens", "restored_tokens", "ttft_s", "restore_s", "text")}
    stored = {name: found["store"][name] for name in ("kept_tokens", "kept_bytes", "keep_s")} if "store" in found else {}
    return {
        **kept,
        **stored,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "device": found["device"],
        "versions": found["versions"],
        "pair": found["pair"],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure what a store saves to the next process.")
    parser.add_argument("--pair", default="smollm2")
    parser.add_argument("--text", type=Path, nargs="*", help="what the prompt is taken from; default: this project's own sources")
    parser.add_argument("--characters", type=int, default=16_000, help="of the prompt; about 4 a token")
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quality", default="balanced", help="of the store; auto asks this machine's measured rates")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json-out", type=Path)
    args = parser.parse_args(argv)
    files = args.text or [ROOT / "engine" / "runtime" / name for name in ("core.py", "scheduler.py", "step.py", "request.py")]
    prompt = "\n".join(file.read_text(encoding="utf-8") for file in files)[: args.characters]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "prompt").write_text(prompt, encoding="utf-8")
        options = ["--pair", args.pair, "--prompt-file", f"{folder}/prompt", "--max-new-tokens", str(args.max_new_tokens)]
        options += [] if args.threads is None else ["--threads", str(args.threads)]
        for number in range(args.repeats):
            store = Path(folder) / f"store{number}"
            for kind, used in (("none", None), ("empty", store), ("filled", store)):
                row = {"store": kind, **answer(options, used, args.quality)}
                rows.append(row)
                print(
                    f"{kind:<7} {row['prompt_tokens']} tokens, {row['restored_tokens']} restored: first after {row['ttft_s']:.2f} s "
                    f"(restore {row['restore_s']:.2f} s); process {row['wall_s']:.1f} s, {row['cpu_s']:.1f} CPU s",
                    file=sys.stderr,
                )

    def median(kind: str) -> float:
        return statistics.median(row["ttft_s"] for row in rows if row["store"] == kind)

    about = {name: rows[0][name] for name in ("device", "versions", "pair")}
    for row in rows:
        for name in about:
            del row[name]
    command = command_line("bench_store_reuse.py", argv)
    found = {**about, "command": command, "speedup": median("none") / median("filled"), "rows": rows}
    print_document(found, args.json_out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
