"""A returning prompt inside vLLM after a restart: computed, restored raw by vLLM's own connector to disk, restored by ours.

    VLLM_CPU_KVCACHE_SPACE=2 OMP_NUM_THREADS=1 python scripts/bench_vllm.py --model FOLDER [--tokens 2048,4096,8000] [--modes plain,raw,foretold]
        [--quality balanced] [--draft trunk] [--pack FILE] [--text FILE...] [--json-out FILE]

Needs vLLM (docs/vllm.md). Every measurement is a process of its own: one fills the store, the next one, started after it, answers the same prompts,
each behind another short prompt that warms everything up. Prints one JSON object
`{"device", "versions", "model", "command", "rows": [{"mode", "tokens", "cached_tokens", "ttft_s", "ttft_cpu_s", "stored_bytes", "raw_bytes", "ratio",
"first_s", "behind_s", "extra_weight_bytes", "peak_bytes"}]}`: ttft_s of the restarted process, first_s of the one that computed and kept the prompt,
behind_s what coding took it behind all answers, stored_bytes of all files divided among the prompts by their tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODES = ("plain", "raw", "foretold")
ROOT = Path(__file__).resolve().parents[1]
_WARM_TOKENS = 200


def folder_bytes(folder: Path) -> int:
    """Of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def prompt_ids(model: str, texts: list[Path], tokens: list[int]) -> list[list[int]]:
    """Token ids of a short prompt, and of one of each length, from text that they share nothing of."""
    from transformers import AutoTokenizer

    text = "\n\n".join(path.read_text(encoding="utf-8", errors="replace") for path in texts)
    ids = AutoTokenizer.from_pretrained(model)(text).input_ids
    wanted = [_WARM_TOKENS, *tokens]
    if len(ids) < sum(wanted):
        raise SystemExit(f"error: the text has {len(ids)} tokens, {sum(wanted)} are needed (name more with --text)")
    at = [sum(wanted[:n]) for n in range(len(wanted))]
    return [ids[a : a + n] for a, n in zip(at, wanted, strict=True)]


def transfer_config(options: argparse.Namespace, folder: Path) -> Any:
    """vLLM's connector of a mode; None without."""
    from vllm.config import KVTransferConfig

    if options.mode == "plain":
        return None
    if options.mode == "raw":
        return KVTransferConfig(
            kv_connector="ExampleConnector", kv_role="kv_both", kv_connector_extra_config={"shared_storage_path": str(folder)}
        )
    extra = {"store": str(folder), "quality": options.quality, "draft": options.draft}
    return KVTransferConfig(
        kv_connector="ForetoldConnector",
        kv_connector_module_path="engine.connectors.vllm",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=extra | ({} if options.pack is None else {"pack": options.pack}),
    )


def answer(options: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: figures of every prompt, in order."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    import torch
    from vllm import LLM, SamplingParams
    from vllm import __version__ as vllm_version
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    prompts = prompt_ids(options.model, options.text, options.tokens)
    llm = LLM(
        options.model,
        enforce_eager=True,
        max_model_len=max(options.tokens) + 64,
        max_num_batched_tokens=2048,
        kv_transfer_config=transfer_config(options, Path(options.folder)),
        disable_log_stats=True,
    )
    one = SamplingParams(max_tokens=1, temperature=0)
    rows = []
    for ids in prompts:
        began, before = time.perf_counter(), time.process_time()
        out = llm.generate([{"prompt_token_ids": ids}], one, use_tqdm=False)[0]
        rows.append(
            {"ttft_s": time.perf_counter() - began, "ttft_cpu_s": time.process_time() - before, "cached": out.num_cached_tokens or 0}
        )
    found: dict[str, Any] = {"rows": rows[1:], "behind_s": 0.0, "extra_weight_bytes": 0}
    if options.mode == "foretold":
        worker = get_kv_transfer_group().worker
        worker.wait(300.0)
        found |= {"behind_s": worker.metrics.save_s, "extra_weight_bytes": worker.passes.weight_bytes, "failures": worker.metrics.failures}
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["versions"] = {"vllm": vllm_version, "torch": torch.__version__, "python": platform.python_version()}
    found["device"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    llm.llm_engine.engine_core.shutdown()
    return found


def in_process(arguments: list[str], mode: str, folder: Path) -> dict[str, Any]:
    """`answer` in a new process."""
    out = folder.parent / f"{folder.name}.json"
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--mode", mode, "--folder", str(folder), "--answer-to", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode or not out.exists():
        raise SystemExit(f"error: a process failed: {(done.stderr or done.stdout)[-2000:]}")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def rows_of(
    mode: str, tokens: list[int], first: dict[str, Any], later: dict[str, Any], stored: int, raw_token_bytes: int
) -> list[dict[str, Any]]:
    """A row a prompt. first, later: what the process before and after the restart found."""
    rows = []
    for n, (count, found) in enumerate(zip(tokens, later["rows"], strict=True)):
        share = stored * count // sum(tokens)
        raw = count * raw_token_bytes
        rows.append(
            {
                "mode": mode,
                "tokens": count,
                "cached_tokens": found["cached"],
                "ttft_s": found["ttft_s"],
                "ttft_cpu_s": found["ttft_cpu_s"],
                "stored_bytes": share,
                "raw_bytes": raw,
                "ratio": raw / share if share else None,
                "first_s": first["rows"][n]["ttft_s"],
                "behind_s": first["behind_s"],
                "extra_weight_bytes": later["extra_weight_bytes"],
                "peak_bytes": later["peak_bytes"],
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure a returning prompt inside vLLM after a restart.")
    parser.add_argument("--model", required=True, help="a model's folder")
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=[2048, 4096], help="lengths, with commas")
    parser.add_argument("--modes", type=lambda text: text.split(","), default=list(MODES))
    parser.add_argument("--quality", default="balanced")
    parser.add_argument("--draft", default="trunk")
    parser.add_argument("--pack", default=None)
    parser.add_argument(
        "--text", type=Path, nargs="*", default=sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "engine").rglob("*.py"))
    )
    parser.add_argument("--json-out", type=Path)
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--answer-to", type=Path, help=argparse.SUPPRESS)
    given = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(given)
    if unknown := set(options.modes) - set(MODES):
        parser.error(f"unknown mode {sorted(unknown)[0]!r} (choose from {', '.join(MODES)})")
    if min(options.tokens) < 256:
        parser.error("prompts of fewer than 256 tokens are not restored (give longer ones)")
    if options.answer_to is not None:
        options.answer_to.write_text(json.dumps(answer(options)))
        return 0
    config = json.loads((Path(options.model) / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    raw_token_bytes = 2 * 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", config["num_attention_heads"]) * head_dim
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-vllm-") as scratch:
        for mode in options.modes:
            folder = Path(scratch) / mode
            folder.mkdir()
            first = later = in_process(given, mode, folder)
            if mode != "plain":
                later = in_process(given, mode, folder)
            rows += rows_of(mode, options.tokens, first, later, folder_bytes(folder), raw_token_bytes)
            found = later
            for row in rows[-len(options.tokens) :]:
                print(f"{row['mode']}: {row['tokens']} tokens, {row['ttft_s']:.2f} s to the first token", file=sys.stderr)
    document = {
        "device": found["device"],
        "versions": found["versions"],
        "model": Path(options.model).name,
        "command": " ".join(["python scripts/bench_vllm.py", *given]),
        "rows": rows,
    }
    text = json.dumps(document)
    if options.json_out is not None:
        options.json_out.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
