"""Where models are put, and in which number format."""

from __future__ import annotations

import torch

from engine.errors import InvalidOption

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


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
