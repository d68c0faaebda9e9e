"""Where models and pools are put: device, number format, and how many tokens of KV the memory is given to."""

from __future__ import annotations

import torch

from engine.calibrate.channel_means import PLAIN, check_format, element_bits
from engine.errors import InvalidOption
from engine.model.decoder import Decoder

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
POOL_TOKENS_CPU = 1 << 17
START_TOKENS = 4096  # what a pool begins with; it doubles on demand


def device_named(name: str) -> torch.device:
    """The device for "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1".

    Raises:
        InvalidOption: another name, or no GPU where one was asked for.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidOption(f"unknown device {name!r}", "use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise InvalidOption(f"device {name!r} is not supported", "use auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidOption(f"there is no CUDA device for {name!r}", "use --device cpu, or install a CUDA build of torch")
    return device


def dtype_named(name: str) -> torch.dtype:
    """The number format for "auto" (bfloat16, as the weights are stored), "bfloat16" or "float32".

    Raises:
        InvalidOption: another name.
    """
    if name != "auto" and name not in DTYPES:
        raise InvalidOption(f"unknown dtype {name!r}", f"use auto, {' or '.join(DTYPES)}")
    return DTYPES.get(name, torch.bfloat16)


def default_pool_tokens(target: Decoder, draft: Decoder | None, hot: str = PLAIN) -> int:
    """Most tokens each pool may hold: half of a GPU's free memory, over the bytes a token takes in both pools; a fixed number on a CPU.

    hot: format of the target's pool. Raises InvalidOption when the target cannot have it.
    """
    check_format(hot, target)
    if target.device.type != "cuda":
        return POOL_TOKENS_CPU
    models = [(target, hot)] + ([] if draft is None else [(draft, PLAIN)])
    per_token = sum(
        m.config.num_layers * m.config.kv_width * element_bits(format_, m.config.head_dim, m.dtype) / 8 for m, format_ in models
    )
    return max(START_TOKENS, int(torch.cuda.mem_get_info(target.device)[0] / 2 / per_token))
