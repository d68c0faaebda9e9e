"""Which device holds which layers of a target that is larger than one.

Layers lie in order on one device after another; the embeddings, the final norm and the head lie on the first, where tokens come from and logits go. A
forward pass hands the residual stream over at each border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.errors import InvalidOption
from engine.inputs import shown
from engine.model.config import DecoderConfig
from engine.model.device import device_named
from engine.model.layers import DecoderLayer

_HALVINGS = 40
_GIB = 2.0**30


@dataclass(frozen=True)
class DeviceMap:
    """main: device of the embeddings, norm and head. parts: (first layer, layer after the last, device), in order, none empty, all layers covered."""

    main: torch.device
    parts: tuple[tuple[int, int, torch.device], ...]

    def of(self, layer: int) -> torch.device:
        """The device of a layer."""
        return next(device for first, end, device in self.parts if first <= layer < end)

    def __str__(self) -> str:
        """Layers by device, for people."""
        return ", ".join(f"layers {first} to {end - 1} on {device}" for first, end, device in self.parts)


def devices_named(names: str | Sequence[str | torch.device]) -> list[torch.device]:
    """Devices of "cuda:0,cuda:1", or of a list of names or devices.

    Raises:
        InvalidOption: none, one that is not there, GPUs and CPUs together, or a GPU twice.
    """
    if not isinstance(names, (str, list, tuple)):
        raise InvalidOption(f"devices cannot be {shown(names)}", 'give "cuda:0,cuda:1", or a list of devices')
    found = [
        device_named(name.strip() if isinstance(name, str) else name) for name in (names.split(",") if isinstance(names, str) else names)
    ]
    if not found:
        raise InvalidOption("devices names none", "give at least one")
    if len({device.type for device in found}) > 1:
        raise InvalidOption(f"devices are of several kinds: {', '.join(map(str, found))}", "give GPUs alone, or CPUs alone")
    numbered = [torch.device(device.type, device.index or 0) if device.type == "cuda" else device for device in found]
    if numbered[0].type == "cuda" and len(set(numbered)) < len(numbered):
        raise InvalidOption("a GPU is named twice among the devices", "name each once")
    return numbered


def weight_bytes(config: DecoderConfig, dtype: torch.dtype) -> tuple[int, list[int]]:
    """Of a model's weights: what is no layer's (embeddings, final norm, head), and each layer's. Nothing is allocated."""
    layers = [sum(p.nbytes for p in DecoderLayer(config, number, dtype, "meta").parameters()) for number in range(config.num_layers)]
    tables = 1 if config.tie_word_embeddings else 2
    return (tables * config.vocab_size + 1) * config.hidden_size * dtype.itemsize, layers


def spread_layers(
    config: DecoderConfig, dtype: torch.dtype, devices: Sequence[torch.device], free_bytes: Sequence[int], *, beside_bytes: int = 0
) -> DeviceMap:
    """Layers over devices, so that the fullest is as empty as can be: what is left is the KV pools'.

    free_bytes: of each device, for weights. beside_bytes: of a draft's weights, which lie on the first.

    Raises:
        InvalidOption: the weights do not fit.
    """
    own, layers = weight_bytes(config, dtype)
    first = own + beside_bytes

    def fill(share: float) -> list[int] | None:
        """Layers of each device where each is filled up to `share` of what is free; None where some are left."""
        counts, at = [], 0
        for number, free in enumerate(free_bytes):
            used, count = (first if number == 0 else 0), 0
            if used > free * share:
                return None
            while at < len(layers) and used + layers[at] <= free * share:
                used, at, count = used + layers[at], at + 1, count + 1
            counts.append(count)
        return counts if at == len(layers) else None

    counts = fill(1.0)
    if counts is None:
        draft = f"its draft's {beside_bytes / _GIB:.2f} GiB, " if beside_bytes else ""
        raise InvalidOption(
            f"the target's weights take {(own + sum(layers)) / _GIB:.2f} GiB in {str(dtype).removeprefix('torch.')}, "
            f"{draft}and the devices have {', '.join(f'{free / _GIB:.2f}' for free in free_bytes)} GiB free",
            "give more devices, or end other programs",
        )
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = fill(middle)
        low, high, counts = (middle, high, counts) if found is None else (low, middle, found)
    parts, at = [], 0
    for device, count in zip(devices, counts, strict=True):
        if count:
            parts.append((at, at + count, device))
        at += count
    return DeviceMap(devices[0], tuple(parts))
