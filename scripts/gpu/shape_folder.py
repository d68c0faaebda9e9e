"""A folder for engines that make their own random weights: the configuration of a named shape, and prompts as token ids.

    PYTHONPATH=.:scripts python scripts/gpu/shape_folder.py --shape qwen2.5-1.5b --prompts 128 --out DIR

DIR/config.json is transformers' own; DIR/prompts.json is a JSON list of token-id lists, the prompts of bench/decode_profile.py. Takes a second.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import transformers

from bench.decode_profile import SHAPES, prompts_of

_CLASSES = {"Qwen2Config": "Qwen2ForCausalLM", "LlamaConfig": "LlamaForCausalLM", "MistralConfig": "MistralForCausalLM"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, choices=sorted(name for name, (kind, _) in SHAPES.items() if kind in _CLASSES))
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(arguments)
    kind, sizes = SHAPES[args.shape]
    config = getattr(transformers, kind)(**sizes, max_position_embeddings=32768, rms_norm_eps=1e-6, architectures=[_CLASSES[kind]])
    config.dtype = "bfloat16"
    config.save_pretrained(args.out)
    prompts = prompts_of(args.prompts, args.prompt_tokens, config.vocab_size)
    (args.out / "prompts.json").write_text(json.dumps(prompts) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
