"""Where models are put, and in which number format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from engine.errors import InvalidOption
from engine.inputs import shown

QUANTIZED = "quantized"
WEIGHTS = ("auto", QUANTIZED)
"""How a target's weights are held: in the dtype, or in the blocks of its GGUF file."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def own_torch_modes() -> AbstractContextManager[None]:
    """Context, to be entered at once: autocast and a default device of the caller's do not reach into the arithmetic of the block. Both belong to the
    thread alone."""
    autocast = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    elsewhere = torch.get_default_device().type != "cpu"
    return _without(autocast, elsewhere) if autocast or elsewhere else nullcontext()  # in most steps nothing is set


@contextmanager
def _without(autocast: list[str], elsewhere: bool) -> Iterator[None]:
    with ExitStack() as stack:
        for kind in autocast:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if elsewhere:
            stack.enter_context(torch.device("cpu"))
        yield


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Context: kernels are launched on this device. Nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def device_named(name: str | torch.device) -> torch.device:
    """The device for "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1", or a device as it is.

    Raises:
        InvalidOption: another name, or no GPU where one was asked for.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise InvalidOption(f"unknown device {shown(name)}", "use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise InvalidOption(f"device {name!r} is not supported", "use auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidOption(f"there is no CUDA device for {name!r}", "use --device cpu, or install a CUDA build of torch")
    return device


def dtype_named(name: str | torch.dtype) -> torch.dtype:
    """The number format for "auto" (bfloat16, as the weights are stored), "bfloat16" or "float32", or one of these as torch names it.

    Raises:
        InvalidOption: another name.
    """
    known: dict[object, torch.dtype] = {"auto": torch.bfloat16} | DTYPES | {kind: kind for kind in DTYPES.values()}
    found = known.get(name) if isinstance(name, (str, torch.dtype)) else None
    if found is None:
        raise InvalidOption(f"unknown dtype {shown(name)}", f"use auto, {' or '.join(DTYPES)}")
    return found
