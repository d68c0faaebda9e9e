"""Chooses between an operation's Triton kernel and its plain PyTorch twin."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

VARIABLE = "FORETOLD_KERNELS"  # "reference", "triton", or unset for "whatever suits the tensors"


@functools.cache
def triton_importable() -> bool:
    """True when the triton package is installed (it is not imported to find out)."""
    return importlib.util.find_spec("triton") is not None


def use_triton(*tensors: torch.Tensor) -> bool:
    """True when the Triton kernel should run on these tensors.

    CUDA tensors run the kernel if triton is installed; CPU tensors run the twin. `FORETOLD_KERNELS=reference` forces the twin,
    `FORETOLD_KERNELS=triton` forces the kernel, on CPU tensors through Triton's interpreter (set `TRITON_INTERPRET=1`).

    Raises:
        ValueError: the variable holds anything else.
        RuntimeError: the kernel is forced but triton is not installed.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced == "reference":
        return False
    if forced == "triton":
        if not triton_importable():
            raise RuntimeError(f"{VARIABLE}=triton, but triton is not installed (install triton, or unset {VARIABLE})")
        return True
    if forced:
        raise ValueError(f"{VARIABLE}={forced!r} (use 'reference', 'triton', or leave it unset)")
    return all(t.is_cuda for t in tensors) and triton_importable()
