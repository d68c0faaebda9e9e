"""Compiled dequantisation against the gguf package's, bit for bit, on blocks of any bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

pytest.importorskip("llvmlite")
from kernels.dequantize import BLOCKS, dequantize_available, dequantize_to_bf16

SCALES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}


def blocks(kind: str, count: int, seed: int) -> np.ndarray:
    """Random bytes, but for float16 scales that are finite."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (count, BLOCKS[kind][1]), dtype=np.uint8)
    for at in SCALES[kind]:
        raw[:, at : at + 2] = rng.normal(0, 10.0 ** rng.integers(-6, 3, count), count).astype(np.float16).view(np.uint8).reshape(count, 2)
    return raw


def twin(raw: np.ndarray, kind: str) -> np.ndarray:
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", list(BLOCKS))
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_bits_are_those_of_the_gguf_package_rounded_to_bf16(kind, count):
    assert dequantize_available(kind)
    raw = blocks(kind, count, seed=count)
    wanted = twin(raw, kind)
    found, greatest = dequantize_to_bf16(raw, kind)
    assert found.tobytes() == torch.from_numpy(wanted.copy()).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert greatest == np.abs(wanted).max()


def test_formats_are_the_gguf_package_s():
    assert {gguf.GGMLQuantizationType[kind]: sizes for kind, sizes in BLOCKS.items()}.items() <= gguf.GGML_QUANT_SIZES.items()


@pytest.mark.parametrize("kind", list(BLOCKS))
@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_told(kind, scale):
    raw = blocks(kind, 5, seed=1)
    raw[3, SCALES[kind][-1] :][:2] = np.array([scale], np.float16).view(np.uint8)
    with np.errstate(all="ignore"):
        wanted = np.abs(twin(raw, kind)).max()
    _, greatest = dequantize_to_bf16(raw, kind)
    assert not np.isfinite(greatest) and not np.isfinite(wanted)


def test_no_blocks_and_what_is_no_blocks():
    assert dequantize_to_bf16(np.empty((0, 18), np.uint8), "Q4_0")[0].size == 0
    with pytest.raises(ValueError, match="contiguous"):
        dequantize_to_bf16(np.zeros((4, 36), np.uint8)[:, :18], "Q4_0")
    with pytest.raises(ValueError, match="contiguous"):
        dequantize_to_bf16(np.zeros(17, np.uint8), "Q4_0")
    with pytest.raises(KeyError):
        dequantize_to_bf16(np.zeros(18, np.uint8), "Q2_K")


def test_nothing_is_written_outside_of_the_numbers(monkeypatch):
    """Between poisoned neighbours: the output is a part of a larger array."""
    room, real = np.full(64 + 7 * 256 + 64, 0x5A5A, np.uint16), np.empty
    monkeypatch.setattr(np, "empty", lambda shape, dtype: room[64:-64] if shape == 7 * 256 else real(shape, dtype))
    raw = blocks("Q4_K", 7, seed=3)
    found, _ = dequantize_to_bf16(raw, "Q4_K")
    monkeypatch.undo()
    assert np.shares_memory(found, room) and (room[:64] == 0x5A5A).all() and (room[-64:] == 0x5A5A).all()
    assert found.tobytes() == torch.from_numpy(twin(raw, "Q4_K").copy()).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()


def test_what_is_available(monkeypatch):
    assert not dequantize_available("Q2_K") and not dequantize_available("F32")
    monkeypatch.setenv("FORETOLD_KERNELS", "reference")
    assert not dequantize_available("Q4_K")
