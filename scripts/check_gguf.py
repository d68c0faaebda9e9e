"""Does the engine continue a text from a GGUF file as transformers does from the same dequantised weights?

`python scripts/check_gguf.py FILE.gguf [--tokens 200] [--prompt TEXT] [--one-pass] [--json-out FILE]`: greedy, float32, on the CPU. transformers reads
the file with its own loader; its weights are rounded to the dtype that the converted folder stores, and every tensor is compared with the folder's.
`--one-pass` lets transformers read the engine's text at once instead of generating its own: the texts are equal if each token is its most probable
one after those before, and a large model is checked in a fraction of the time.
Exit status 0 when all tensors and all token ids are equal, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from engine import Engine, SamplingParams
from engine.files import write_atomically
from engine.hub.resolve import resolve_model
from engine.text.templates import has_template

PROMPT = "Write a short story about a lighthouse keeper who finds a message in a bottle."


def reference_model(path: Path) -> Any:
    """The file through transformers' own reader, dequantised to float32: some versions keep it packed unless they are told."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32}
    try:
        from transformers import GgufConfig
    except ImportError:
        pass
    else:
        options["quantization_config"] = GgufConfig(dequantize=True, gguf_file=path.name)
    return AutoModelForCausalLM.from_pretrained(str(path.parent), **options).eval()


def rounded_as_stored(model: Any, folder: Path) -> list[str]:
    """Round the reference's weights to the dtypes that the folder stores; names of tensors that are not the folder's then."""
    own, wrong = model.state_dict(), []
    with safe_open(folder / "model.safetensors", "pt") as stored:
        for name in stored.keys():  # noqa: SIM118
            tensor = stored.get_tensor(name)
            if name not in own:
                wrong.append(name)
                continue
            own[name].copy_(own[name].to(tensor.dtype))
            if not torch.equal(own[name], tensor.float()):
                wrong.append(name)
    return wrong


def generated(model: Any, ids: list[int], count: int) -> list[int]:
    """The reference's own greedy continuation of a prompt."""
    model.generation_config.eos_token_id = None
    given = torch.tensor([ids])
    made = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return made[0, len(ids) :].tolist()


def next_tokens(model: Any, ids: list[int], text: list[int]) -> list[int]:
    """The reference's most probable token in the place of each token of a text that follows a prompt."""
    logits = model(torch.tensor([ids + text]), use_cache=False).logits[0]
    return logits[len(ids) - 1 : -1].argmax(-1).tolist()


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokens", type=int, default=200, metavar="N")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--one-pass", action="store_true", help="transformers reads the engine's text instead of generating one")
    parser.add_argument("--json-out", type=Path, help="list of reports, one a file; this file's is added or replaced")
    args = parser.parse_args()

    began, began_cpu = time.perf_counter(), time.process_time()
    folder = resolve_model(args.file)
    converted_s, converted_cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    engine = Engine.from_pretrained(folder, device="cpu", dtype="float32")
    prompt = [{"role": "user", "content": args.prompt}] if has_template(engine.tokenizer) else args.prompt
    ids = engine.encode(prompt)
    ours = engine.generate([ids], SamplingParams(max_new_tokens=args.tokens, ignore_eos=True))[0].token_ids
    del engine

    model = reference_model(args.file)
    with torch.no_grad():
        wrong = rounded_as_stored(model, folder)
        theirs = next_tokens(model, ids, ours) if args.one_pass else generated(model, ids, args.tokens)
    equal = next((i for i, (own, other) in enumerate(zip(ours, theirs, strict=True)) if own != other), len(ours))
    report = {
        "file": args.file.name,
        "architecture": model.config.model_type,
        "tensors_that_differ": wrong,
        "prompt_tokens": len(ids),
        "new_tokens": args.tokens,
        "one_pass": args.one_pass,
        "equal_tokens": equal,
        "file_bytes": args.file.stat().st_size,
        "resolve_s": round(converted_s, 2),
        "resolve_cpu_s": round(converted_cpu_s, 2),
        "dtype": "float32",
    }
    text = json.dumps(report)
    if args.json_out is not None:
        others = json.loads(args.json_out.read_text(encoding="utf-8")) if args.json_out.exists() else []
        reports = [other for other in others if other["file"] != report["file"]] + [report]
        write_atomically(args.json_out, json.dumps(reports, indent=1) + "\n")
    print(text)
    return 0 if not wrong and equal == args.tokens else 1


if __name__ == "__main__":
    sys.exit(main())
