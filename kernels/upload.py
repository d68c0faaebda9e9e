"""Small tensors from the host to a device, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def upload(values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """A tensor of (nested) Python numbers on `device`.

    To a CUDA device the copy is queued from page-locked memory: an ordinary copy would wait for all that was queued before it, and so undo that a
    step is launched while the one before it runs.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def upload_arrays(parts: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """As `upload`, of arrays [n] of one dtype that torch knows, joined."""
    if device.type != "cuda":
        return torch.from_numpy(np.concatenate(parts)).to(device)
    host = torch.empty(sum(map(len, parts)), dtype=torch.from_numpy(parts[0][:0].copy()).dtype, pin_memory=True)
    np.concatenate(parts, out=host.numpy())
    return host.to(device, non_blocking=True)


def fill(place: torch.Tensor, values: Sequence[Any]) -> None:
    """As `upload`, into a tensor of the values' shape that stays where it is."""
    place.copy_(torch.tensor(values, dtype=place.dtype, pin_memory=place.is_cuda), non_blocking=True)
