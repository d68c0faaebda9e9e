"""The connector inside vLLM: a returning prompt after a restart, what it costs requests that miss, and damage to its store.

    VLLM_CPU_KVCACHE_SPACE=2 OMP_NUM_THREADS=1 python scripts/bench_vllm.py --model FOLDER [--tokens 2048,4096,7680]
        [--modes plain,raw,disk,cachegen,foretold,auto] [--quality balanced] [--draft trunk] [--pack FILE] [--text FILE...] [--together]
        [--logs DIR] [--json-out FILE]
    ... --model FOLDER --overhead ROUNDS
    ... --damage REQUESTS

Needs vLLM (docs/vllm.md). Every measurement of a returning prompt is a process of its own: one fills the store, the next one, started after it, answers
the same prompts, each behind another short prompt that warms everything up. Modes: plain, vLLM alone; raw, its own ExampleConnector; disk, whole blocks
as they are from a file at --disk-speed (1 GB/s); cachegen, as CacheGen codes them (scripts/baselines/cachegen.py, LMCache's bins); foretold, ours,
which always restores; auto, ours with `load` `auto`. Prints one JSON object
`{"device", "versions", "model", "command", "rows": [{"mode", "tokens", "cached_tokens", "ttft_s", "ttft_cpu_s", "best_ttft_s", "best_ttft_cpu_s",
"stored_bytes", "raw_bytes", "ratio", "first_s", "best_first_s", "behind_s", "extra_weight_bytes", "extra_cache_bytes", "peak_bytes",
"peak_device_bytes", "stages_s", "fresh_equal", "equal_tokens"}]}`: ttft_s of the restarted process (best_ttft_s of --repeats), first_s and best_first_s
of the one that computed and kept the prompt, stages_s of all restores of the process, behind_s what coding took it behind all answers, stored_bytes of
all files divided among all stored tokens. fresh_equal: whether the process that kept the prompts gave the greedy text of the first mode; equal_tokens:
how many tokens the restarted one's begins with. --together starts all processes at once, which take turns once they have imported vLLM.

--overhead: processes without the connector, with one that keeps nothing and with one that keeps everything answer the same fresh prompts in turn (what
is left to be coded is coded before the next one's turn):
`{"device", ..., "overhead": [{"kind", "throughput", "main_thread_throughput", "rounds"}]}`, medians over rounds of throughput relative to vLLM alone,
by the clock and by the CPU seconds of the thread that runs the model.

--damage: a tiny random model; every request finds files of the store changed at random, before vLLM looks or between its look and the restore:
`{"device", ..., "damage": {"requests", "wrong", "restored", "computed", "failures"}}`. A wrong answer is none of those that vLLM alone, the whole store
and its first runs give; the command fails if there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MODES = ("plain", "raw", "disk", "cachegen", "foretold", "auto")
ROOT = Path(__file__).resolve().parents[1]
_WARM_TOKENS = 400


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
    if options.mode == "disk":
        return KVTransferConfig(
            kv_connector="RawConnector",
            kv_connector_module_path="scripts.bench.raw_connector",
            kv_role="kv_both",
            kv_connector_extra_config={"path": str(folder), "bytes_per_s": options.disk_speed * 1e9},
        )
    if options.mode == "cachegen":
        return KVTransferConfig(
            kv_connector="CacheGenConnector",
            kv_connector_module_path="scripts.bench.cachegen_connector",
            kv_role="kv_both",
            kv_connector_extra_config={"path": str(folder)},
        )
    load = "auto" if options.mode == "auto" else "within"
    extra = {"store": str(folder), "quality": options.quality, "draft": options.draft, "load": load}
    return our_connector(extra | ({} if options.pack is None else {"pack": options.pack}))


def our_connector(extra: dict[str, Any]) -> Any:
    """vLLM's configuration of our connector. extra: its options (docs/vllm.md)."""
    from vllm.config import KVTransferConfig

    return KVTransferConfig(
        kv_connector="ForetoldConnector",
        kv_connector_module_path="engine.connectors.vllm",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=extra,
    )


def open_llm(model: str, transfer: Any, **settings: Any) -> Any:
    """vLLM in this process, without compilation."""
    from vllm import LLM

    common: dict[str, Any] = {
        "enforce_eager": True,
        "kv_transfer_config": transfer,
        "disable_log_stats": True,
        "max_num_batched_tokens": 2048,
    }
    return LLM(model, **(common | settings))


def gpu_settings(options: argparse.Namespace) -> dict[str, Any]:
    """vLLM's settings where there is a GPU: several processes share it."""
    import torch

    return {"gpu_memory_utilization": options.gpu_memory} if torch.cuda.is_available() else {}


def set_up() -> None:
    """The environment of a process that runs vLLM."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if find_spec("flashinfer") is None:  # which vLLM's sampler on a GPU asks for otherwise, installed or not
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")


def place() -> dict[str, Any]:
    """Device and versions."""
    import torch
    from vllm import __version__ as vllm_version

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return {"device": device, "versions": {"vllm": vllm_version, "torch": torch.__version__, "python": platform.python_version()}}


def answer(options: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: figures of every prompt, in order."""
    set_up()
    import torch
    from vllm import SamplingParams
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    prompts = prompt_ids(options.model, options.text, options.tokens)
    found: dict[str, Any] = place()
    while options.gate is not None and not options.gate.exists():
        time.sleep(0.05)
    on_gpu, settings = torch.cuda.is_available(), gpu_settings(options)
    llm = open_llm(
        options.model, transfer_config(options, Path(options.folder)), max_model_len=max(_WARM_TOKENS, *options.tokens) + 64, **settings
    )
    base_bytes = torch.cuda.memory_allocated() if on_gpu else 0
    rows = []
    for ids in prompts:
        extra = {"kv_transfer_params": {"restore": False}} if options.compute else None
        one, taken = SamplingParams(max_tokens=1, temperature=0, extra_args=extra), []
        for number in range(options.repeats):
            if number:
                llm.reset_prefix_cache()
            began, before = time.perf_counter(), time.process_time()
            out = llm.generate([{"prompt_token_ids": ids}], one, use_tqdm=False)[0]
            taken.append((time.perf_counter() - began, time.process_time() - before, out.num_cached_tokens or 0))
        row = {"ttft_s": taken[0][0], "ttft_cpu_s": taken[0][1], "best_ttft_s": min(taken)[0], "cached": taken[0][2]}
        row["best_ttft_cpu_s"] = min(cpu for _, cpu, _ in taken)
        more = SamplingParams(max_tokens=options.new_tokens, temperature=0, ignore_eos=True, extra_args=extra)
        rows.append(row | {"text": list(llm.generate([{"prompt_token_ids": ids}], more, use_tqdm=False)[0].outputs[0].token_ids)})
    found |= {"rows": rows[1:], "behind_s": 0.0, "extra_weight_bytes": 0, "extra_cache_bytes": 0, "peak_device_bytes": 0}
    if options.mode in ("foretold", "auto"):
        worker = get_kv_transfer_group().worker
        found["saved_all"] = worker.wait(options.wait_s)
        found |= {"behind_s": worker.metrics.save_s, "failures": worker.metrics.failures, "saved_tokens": worker.metrics.saved_tokens}
        found |= {"extra_weight_bytes": worker.passes.weight_bytes, "extra_cache_bytes": worker.passes.cache_bytes}
        found |= {
            "restore_s": worker.metrics.restore_s,
            "restored_tokens": worker.metrics.restored_tokens,
            "stages_s": worker.metrics.stages_s,
        }
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if on_gpu:
        found |= {"peak_device_bytes": torch.cuda.max_memory_allocated(), "base_device_bytes": base_bytes}
    llm.llm_engine.engine_core.shutdown()
    return found


class Process:
    """`answer` in a new process, which begins when `finish` is called, or has imported vLLM by then."""

    def __init__(self, arguments: list[str], mode: str, kind: str, folder: Path, name: str, logs: Path | None = None) -> None:
        self._out, self._gate = folder.parent / f"{name}.json", folder.parent / f"{name}.go"
        self._command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--mode", mode, "--folder", str(folder)]
        self._command += ["--answer-to", str(self._out), "--gate", str(self._gate), *(["--compute"] if kind == "first" else [])]
        self._log = (logs or folder.parent) / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Import what it takes."""
        if self._process is None:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)

    def finish(self) -> dict[str, Any]:
        """Let it answer."""
        self.start()
        self._gate.touch()
        assert self._process is not None
        if self._process.wait() or not self._out.exists():
            raise SystemExit(f"error: a process failed: {self._log.read_text(errors='replace')[-2000:]}")
        found: dict[str, Any] = json.loads(self._out.read_text())
        return found

    def end(self) -> None:
        """Stop it if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def same_beginning(found: list[int], truth: list[int]) -> int:
    """How many tokens two texts begin with."""
    return next((n for n, (a, b) in enumerate(zip(found, truth, strict=False)) if a != b), min(len(found), len(truth)))


def rows_of(
    mode: str, tokens: list[int], truth: dict[str, Any], first: dict[str, Any], later: dict[str, Any], stored: int, raw_token_bytes: int
) -> list[dict[str, Any]]:
    """A row a prompt. truth: of the first mode; first, later: what the process before and after the restart found."""
    rows = []
    for n, (count, found) in enumerate(zip(tokens, later["rows"], strict=True)):
        share = stored * count // (first.get("saved_tokens") or _WARM_TOKENS + sum(tokens))
        raw = count * raw_token_bytes
        rows.append(
            {
                "mode": mode,
                "tokens": count,
                "cached_tokens": found["cached"],
                "ttft_s": found["ttft_s"],
                "ttft_cpu_s": found["ttft_cpu_s"],
                "best_ttft_s": found["best_ttft_s"],
                "best_ttft_cpu_s": found["best_ttft_cpu_s"],
                "stored_bytes": share,
                "raw_bytes": raw,
                "ratio": raw / share if share else None,
                "first_s": first["rows"][n]["ttft_s"],
                "best_first_s": first["rows"][n]["best_ttft_s"],
                "behind_s": first["behind_s"],
                "extra_weight_bytes": later["extra_weight_bytes"],
                "extra_cache_bytes": later["extra_cache_bytes"],
                "peak_bytes": later["peak_bytes"],
                "peak_device_bytes": later["peak_device_bytes"],
                "stages_s": later.get("stages_s", {}),
                "fresh_equal": first["rows"][n]["text"] == truth["rows"][n]["text"],
                "equal_tokens": same_beginning(found["text"], truth["rows"][n]["text"]),
            }
        )
    return rows


def returning(options: argparse.Namespace, given: list[str]) -> dict[str, Any]:
    """Rows of every mode."""
    config = json.loads((Path(options.model) / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    raw_token_bytes = 2 * 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", config["num_attention_heads"]) * head_dim
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    first: dict[str, Any] = {}
    truth: dict[str, Any] | None = None
    with tempfile.TemporaryDirectory(prefix="bench-vllm-") as scratch:
        kinds = {"plain": ("first",), "auto": ("later",)}
        turns = [(mode, kind) for mode in options.modes for kind in kinds.get(mode, ("first", "later"))]
        folders = {mode: Path(scratch) / ("foretold" if mode == "auto" else mode) for mode in options.modes}
        for folder in folders.values():
            folder.mkdir(exist_ok=True)
        processes = {(mode, kind): Process(given, mode, kind, folders[mode], f"{mode}-{kind}", options.logs) for mode, kind in turns}
        try:
            for process in processes.values() if options.together else ():
                process.start()
            for mode in options.modes:
                if (mode, "first") in processes:
                    first = found = processes[mode, "first"].finish()
                    fresh = ", ".join(f"{row['ttft_s']:.3f} / {row['best_ttft_s']:.3f}" for row in found["rows"])
                    print(f"{mode}: fresh prompts, s to the first token, first and best: {fresh}", file=sys.stderr, flush=True)
                truth = truth or first
                if (mode, "later") in processes:
                    found = processes[mode, "later"].finish()
                rows += rows_of(mode, options.tokens, truth, first, found, folder_bytes(folders[mode]), raw_token_bytes)
                for row in rows[-len(options.tokens) :]:
                    print(f"{row['mode']}: {row['tokens']} tokens, {row['ttft_s']:.3f} s to the first token", file=sys.stderr, flush=True)
                if options.json_out is not None:
                    options.json_out.write_text(json.dumps({"rows": rows, "last": found}) + "\n")
        finally:
            for process in processes.values():
                process.end()
    return {"device": found["device"], "versions": found["versions"], "model": Path(options.model).name, "rows": rows}


KINDS = {"plain": None, "nothing kept": False, "everything kept": True}
"""Of processes whose throughput is compared: whether the connector keeps text; None without it."""


def resident(options: argparse.Namespace) -> None:
    """In a process of its own: answers fresh prompts for every line on the standard input, and says what it took."""
    set_up()
    import numpy as np
    from vllm import SamplingParams
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    kept = KINDS[options.mode]
    transfer = None
    if kept is not None:
        extra = {"store": options.folder, "save": kept, "draft": options.draft} | ({} if options.pack is None else {"pack": options.pack})
        transfer = our_connector(extra)
    llm = open_llm(options.model, transfer, max_model_len=1024, **gpu_settings(options))
    params = SamplingParams(max_tokens=options.new_tokens, temperature=0, ignore_eos=True)
    print(json.dumps(place()), flush=True)
    for line in sys.stdin:
        generator = np.random.default_rng(int(line))
        prompts = [{"prompt_token_ids": generator.integers(5, 250, 384).tolist()} for _ in range(4)]
        began, before = time.perf_counter(), time.thread_time()
        llm.generate(prompts, params, use_tqdm=False)
        took = {"wall_s": time.perf_counter() - began, "thread_s": time.thread_time() - before}
        if kept:  # what waits is coded before the others' turn
            get_kv_transfer_group().worker.wait(120.0)
        print(json.dumps(took), flush=True)
    llm.llm_engine.engine_core.shutdown()


def overhead(options: argparse.Namespace, given: list[str]) -> dict[str, Any]:
    """Throughput with the connector over that without, requests that miss, round by round in turn."""
    import statistics

    processes: dict[str, subprocess.Popen[str]] = {}
    times: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(prefix="bench-vllm-") as scratch:
        try:
            for n, kind in enumerate(KINDS):
                command = [
                    sys.executable,
                    str(Path(__file__).resolve()),
                    *given,
                    "--mode",
                    kind,
                    "--folder",
                    str(Path(scratch) / str(n)),
                    "--resident",
                ]
                processes[kind] = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
                )
            heads = {kind: reply(process) for kind, process in processes.items()}
            for number in range(options.overhead + 1):
                order = list(KINDS) if number % 2 else list(KINDS)[::-1]
                for kind in order:
                    stdin = processes[kind].stdin
                    assert stdin is not None
                    stdin.write(f"{number}\n")
                    stdin.flush()
                    times[kind].append(reply(processes[kind]))
        finally:
            for process in processes.values():
                process.kill()
                process.wait()
    rows = []
    for kind in list(KINDS)[1:]:
        pairs = list(zip(times["plain"], times[kind], strict=True))[1:]  # the first round warms up
        clock, thread = (statistics.median(a[key] / b[key] for a, b in pairs) for key in ("wall_s", "thread_s"))
        rows.append({"kind": kind, "throughput": clock, "main_thread_throughput": thread, "rounds": options.overhead})
    return {**heads["plain"], "model": Path(options.model).name, "overhead": rows}


def reply(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next JSON object that a process prints."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise SystemExit("error: a process ended (run it alone to see why)")


def tiny_codec(folder: Path) -> tuple[Path, Path]:
    """A tiny model whose heads vLLM's CPU attention takes, and its codec parameters."""
    import torch

    from engine.calibrate.recipe import quick_pack
    from engine.hub.fingerprint import fingerprint
    from engine.model.decoder import Decoder
    from engine.text.tokenizer import load_tokenizer
    from scripts.bench.tiny_folder import write_tiny_folder

    model = write_tiny_folder(folder / "model", layers=4, head_dim=32)
    target = Decoder.from_pretrained(model, dtype=torch.float32)
    pack = quick_pack(
        target, None, load_tokenizer(model), recomputed_layers=1, num_tokens=768, context=128, rank=48, log=lambda _: None,
        fingerprints={"target": fingerprint(model), "draft": "none", "tokenizer": "none"},
    )  # fmt: skip
    pack.save(folder / "pack.safetensors")
    return model, folder / "pack.safetensors"


def damaged(data: bytes, generator: random.Random) -> bytes:
    """A file's content after something happened to it: cut, a bit turned, bytes overwritten, another file's end, or nothing left."""
    kind, out = generator.randrange(5), bytearray(data)
    at = generator.randrange(len(out))
    if kind == 0:
        del out[at:]
    elif kind == 1:
        out[at] ^= 1 << generator.randrange(8)
    elif kind == 2:
        out[at : at + 40] = generator.randbytes(len(out[at : at + 40]))
    elif kind == 3:
        out[at:] = out[: len(out) - at]
    else:
        out = bytearray()
    return bytes(out)


def damage(options: argparse.Namespace) -> dict[str, Any]:
    """Requests that meet a damaged store; see the module. No prompt has more than one whole run, and one that is not."""
    set_up()
    import numpy as np
    from vllm import SamplingParams
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from engine.connectors.vllm import shield_compiler
    from engine.store.runs import RUN_TOKENS, Run

    scratch = Path(tempfile.mkdtemp(prefix="bench-vllm-"))
    model, pack = tiny_codec(scratch)
    shield_compiler()  # which making the codec has loaded
    extra = {"store": str(scratch / "store"), "draft": "none", "pack": str(pack), "min_tokens": 64, "quality": "near-lossless"}
    extra |= {"load": "within"}  # for the answers that others are compared with
    transfer = our_connector(extra)
    llm = open_llm(str(model), transfer, max_model_len=512, dtype="float32")
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    generator = np.random.default_rng(7)
    prompts = [generator.integers(0, 250, size).tolist() for size in (290, 320, 350)]
    prompts.append(generator.integers(0, 250, 64).tolist() + prompts[-1][:276])  # whose runs refer to those of the text before

    def run(n: int) -> tuple[list[int], int]:
        llm.reset_prefix_cache()
        out = llm.generate([{"prompt_token_ids": prompts[n]}], params, use_tqdm=False)[0]
        return list(out.outputs[0].token_ids), out.num_cached_tokens or 0

    worker, alone = get_kv_transfer_group().worker, []
    for n in range(len(prompts)):
        alone.append(run(n)[0])
        worker.wait(120)
    worker.index.options = replace(worker.index.options, save=False)
    sides = (worker.index, llm.llm_engine.engine_core.engine_core.scheduler.connector.index)
    whole = [run(n) for n in range(len(prompts))]
    if not all(cached for _, cached in whole):
        raise SystemExit("error: the whole store gave nothing back")
    matched = sides[1].matched
    sides[1].matched = lambda *arguments: min(matched(*arguments), RUN_TOKENS)
    cut = [run(n) for n in range(len(prompts))]
    sides[1].matched = matched
    if any(cached != RUN_TOKENS for _, cached in cut):
        raise SystemExit("error: the first runs alone gave nothing back")
    right = [{tuple(alone[n]), tuple(whole[n][0]), tuple(cut[n][0])} for n in range(len(prompts))]
    files = sorted((scratch / "store" / "runs").rglob("*.run"))
    kept = {path: path.read_bytes() for path in files}
    if not any(Run.from_bytes(content).donors for content in kept.values()):
        raise SystemExit("error: no run refers to another")
    restore = worker.restore
    chance = random.Random(11)
    wrong = restored = computed = 0
    for trial in range(options.damage):
        n, late = chance.randrange(len(prompts)), bool(trial & 1)
        for index in sides:
            index.options = replace(index.options, load="beside" if trial & 2 else "within")

        def harm() -> None:
            for path in chance.sample(files, chance.randint(1, len(files))):
                path.write_bytes(damaged(kept[path], chance))

        def late_restore(*arguments: Any, harm: Any = harm) -> Any:
            harm()
            return restore(*arguments)

        if late:
            worker.restore = late_restore
        else:
            harm()
        before = worker.metrics.failures
        text, cached = run(n)
        worker.restore = restore
        wrong += tuple(text) not in right[n]
        computed += cached == 0 or worker.metrics.failures > before
        restored += cached > 0 and worker.metrics.failures == before
        for path, content in kept.items():
            path.write_bytes(content)
    found = place() | {"model": "tiny random model"}
    counts = {"requests": options.damage, "wrong": wrong, "restored": restored, "computed": computed, "failures": worker.metrics.failures}
    llm.llm_engine.engine_core.shutdown()
    shutil.rmtree(scratch, ignore_errors=True)
    return found | {"damage": counts}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the connector inside vLLM.")
    parser.add_argument("--model", help="a model's folder")
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=[2048, 4096], help="lengths, with commas")
    parser.add_argument("--modes", type=lambda text: text.split(","), default=list(MODES))
    parser.add_argument("--quality", default="balanced")
    parser.add_argument("--draft", default="trunk")
    parser.add_argument("--pack", default=None)
    parser.add_argument("--disk-speed", type=float, default=1.0, metavar="GB_PER_S", help="at which the mode disk reads; 0: no limit")
    parser.add_argument("--new-tokens", type=int, default=16, help="of the greedy texts that are compared")
    parser.add_argument("--repeats", type=int, default=1, help="times that a prompt is answered, vLLM's own cache emptied in between")
    parser.add_argument("--wait-s", type=float, default=300.0, help="how long coding is waited for behind the answers")
    parser.add_argument("--gpu-memory", type=float, default=0.3, help="share of a GPU's memory that vLLM takes")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="an existing folder for what the processes print")
    parser.add_argument("--together", action="store_true", help="start all processes at once; they take turns")
    parser.add_argument("--overhead", type=int, default=0, metavar="ROUNDS", help="compare the throughput of requests that miss")
    parser.add_argument("--damage", type=int, default=0, metavar="REQUESTS", help="answer from a store that is damaged at random")
    parser.add_argument(
        "--text", type=Path, nargs="*", default=sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "engine").rglob("*.py"))
    )
    parser.add_argument("--json-out", type=Path)
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--compute", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--resident", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--gate", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--answer-to", type=Path, help=argparse.SUPPRESS)
    given = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(given)
    if unknown := set(options.modes) - set(MODES):
        parser.error(f"unknown mode {sorted(unknown)[0]!r} (choose from {', '.join(MODES)})")
    if "auto" in options.modes and "foretold" not in options.modes[: options.modes.index("auto")]:
        parser.error("the mode auto reads foretold's store (name foretold before it)")
    if min(options.tokens) < 256:
        parser.error("prompts of fewer than 256 tokens are not restored (give longer ones)")
    if options.overhead < 0 or options.damage < 0 or options.new_tokens < 1 or options.repeats < 1:
        parser.error("--overhead, --damage, --repeats and --new-tokens count something (give numbers above 0)")
    if options.disk_speed < 0:
        parser.error("--disk-speed is a speed (give 0 or more)")
    if options.model is None and not options.damage:
        parser.error("no model (give --model FOLDER)")
    if options.answer_to is not None:
        options.answer_to.write_text(json.dumps(answer(options)))
        return 0
    if options.resident:
        resident(options)
        return 0
    if options.damage:
        document = damage(options)
    elif options.overhead:
        document = overhead(options, given)
    else:
        document = returning(options, given)
    document["command"] = " ".join(["python scripts/bench_vllm.py", *given])
    text = json.dumps(document)
    if options.json_out is not None:
        options.json_out.write_text(text + "\n")
    print(text)
    return 1 if document.get("damage", {}).get("wrong") else 0


if __name__ == "__main__":
    raise SystemExit(main())
