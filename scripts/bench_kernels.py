"""Time every Triton kernel against ceilings measured in the same run and against PyTorch.

    python scripts/bench_kernels.py --json-out scripts/results/kernels-h100.json

One operation that fails is reported and the others go on; after an error that spoils the device's context they go on in a fresh process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from bench.document import command_line


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ops", help="comma-separated groups (default: all); a group:text keeps the cases whose name or shape holds the text"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="time the candidates of one case may take (default 20)")
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds after which no further case is begun")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to try the script itself (with TRITON_INTERPRET=1 without a GPU)")
    parser.add_argument(
        "--compile-only", action="store_true", help="compile every configuration, time none; several such runs may go on at once"
    )
    parser.add_argument("--no-candidates", action="store_true", help="time the launchers' own configurations only")
    parser.add_argument("--ceilings", help=argparse.SUPPRESS)
    parser.add_argument("--json-out", help="write the JSON object to this file, after every case")
    parser.add_argument("--json", action="store_true", help="print the JSON object on the last line")
    return parser.parse_args(argv)


def continued(options: argparse.Namespace, remaining: list[str], ceilings: str, deadline: float) -> list[dict[str, Any]]:
    """The remaining groups' rows, from a fresh process."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, "--ops", ",".join(remaining), "--seconds", str(options.seconds), "--deadline", str(deadline)]
        command += ["--ceilings", ceilings, "--json-out", file.name]
        command += ["--compile-only"] * options.compile_only + ["--tiny"] * options.tiny + ["--no-candidates"] * options.no_candidates
        subprocess.run(command, check=False)
        text = Path(file.name).read_text()
    return json.loads(text)["rows"] if text else []


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    options = arguments(given)
    started = time.perf_counter()
    import torch
    import triton

    on_gpu = torch.cuda.is_available()
    if not on_gpu and not (options.tiny and os.environ.get("TRITON_INTERPRET") == "1"):
        print("error: no CUDA device (to try the script itself: TRITON_INTERPRET=1 and --tiny)", file=sys.stderr)
        return 2
    if not on_gpu:
        from bench.interpreter import compute_like_hardware

        compute_like_hardware()
    from bench.kernel_cases import accepts, kv_writes, rms_norms, ropes, silu_muls
    from bench.kernel_cases_attention import attentions
    from bench.kernel_cases_choices import choices, features
    from bench.kernel_cases_codec import entropy_coders, residuals
    from bench.kernel_timing import Clock, compile_all, line, measure

    groups = {
        "attention": attentions,
        "residual": residuals,
        "rans": entropy_coders,
        "features": features,
        "choices": choices,
        "kv_write": kv_writes,
        "accept": accepts,
        "rms_norm": rms_norms,
        "silu_mul": silu_muls,
        "rope": ropes,
    }

    wanted = options.ops.split(",") if options.ops else list(groups)
    unknown = [w for w in wanted if w.split(":")[0] not in groups]
    if unknown:
        print(f"error: unknown group {unknown[0]!r} (choose among {', '.join(groups)})", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device = torch.device("cuda" if on_gpu else "cpu")
    clock = Clock(device, seconds=options.seconds)
    if options.ceilings:
        clock.copy_gb_per_s, clock.matrix_tflops = map(float, options.ceilings.split(","))
    elif not options.compile_only:
        clock.measure_ceilings(options.tiny)
    ceilings = f"{clock.copy_gb_per_s},{clock.matrix_tflops}"
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "command": command_line("bench_kernels.py", given),
        "copy_gb_per_s": clock.copy_gb_per_s,
        "matrix_tflops": clock.matrix_tflops,
        "rows": [],
    }
    if not options.compile_only:
        print(f"{result['device']}: copy {clock.copy_gb_per_s:.0f} GB/s, bf16 product {clock.matrix_tflops:.0f} TFLOP/s", flush=True)

    def keep(*rows: dict[str, Any]) -> None:
        result["rows"].extend(rows)
        if options.json_out:
            Path(options.json_out).write_text(json.dumps(result, indent=1))

    for index, group in enumerate(wanted):
        name, _, text = group.partition(":")
        cases = groups[name](device, options.tiny)
        while time.perf_counter() - started < options.deadline:
            case = None
            try:
                case = next(cases, None)
                if case is None:
                    break
                if text in f"{case.op} {case.shape}":
                    if options.no_candidates:
                        case.candidates = {}
                    if options.compile_only:
                        compile_all(case)
                        continue
                    row = measure(case, clock)
                    keep(row)
                    print(line(row), flush=True)
            except Exception as failure:
                label = (
                    {"op": case.op, "shape": case.shape, "dtype": case.dtype} if case else {"op": name, "shape": "(inputs)", "dtype": ""}
                )
                row = {**label, "failure": f"{type(failure).__name__}: {failure}".splitlines()[0][:300], "correct": False}
                keep(row)
                print(line(row), flush=True)
                traceback.print_exc(file=sys.stderr)
                if on_gpu and "CUDA error" in str(failure):
                    left = options.deadline - (time.perf_counter() - started)
                    if wanted[index + 1 :]:
                        keep(*continued(options, wanted[index + 1 :], ceilings, left))
                    if options.json:
                        print(json.dumps(result))
                    return 1
                if case is None:
                    break
            del case
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
        else:
            print(f"{group}: stopped at the deadline", flush=True)
    if options.json:
        print(json.dumps(result))
    return 0 if all(row.get("correct") for row in result["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
