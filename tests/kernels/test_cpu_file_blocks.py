"""Blocks of GGUF files put into tiles: the gguf package's numbers, products of each format, and what stays in blocks or becomes bf16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize

from kernels.cpu_decode import file_blocks, tiles
from kernels.cpu_decode.blocks import NAMES, BlockWeight
from kernels.cpu_decode.file_blocks import formats, in_tiles, laid_out, row_bytes
from kernels.cpu_decode.tiles import TileWeight

SCALES = {"Q8_0": [0], "Q5_0": [0], "Q6_K": [208]}  # where a block has float16 numbers; of the others the first two
ROUNDED = ("Q4_K", "Q5_K", "Q6_K")  # scales are products, rounded to float16


@pytest.fixture(autouse=True)
def multiplies_tiles(monkeypatch):
    monkeypatch.setattr(file_blocks, "has_flag", lambda name: True)


def raw_blocks(name, outputs, inputs, scale=0.02):
    """Rows of blocks, every code among them, as a file has them."""
    kind, random = formats()[name], np.random.default_rng(zlib_of(name))
    raw = random.integers(0, 256, (outputs, row_bytes(kind, inputs)), dtype=np.uint8)
    size = row_bytes(kind, 256) // (1 if name.endswith("_K") else 8)
    blocks = raw.reshape(outputs, -1, size)
    for at in SCALES.get(name, [0, 2] if name != "Q4_0" else [0]):
        numbers = random.uniform(0.1, 1.0, blocks.shape[:2]) * scale
        blocks[..., at : at + 2] = numbers.astype(np.float16)[..., None].view(np.uint8)
    return raw


def zlib_of(name):
    return sum(map(ord, name))


def numbers_of(raw, name):
    return torch.from_numpy(np.ascontiguousarray(dequantize(raw, GGMLQuantizationType[name]), dtype=np.float32)).view(len(raw), -1)


@pytest.mark.parametrize("name", sorted(formats() | file_blocks._NAMES))
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 256), (48, 512), (528, 768)])
def test_every_format_keeps_its_weights(name, outputs, inputs):
    raw = raw_blocks(name, outputs, inputs)
    weight, wanted = laid_out(torch.from_numpy(raw), formats()[name], torch.bfloat16), numbers_of(raw, name)
    assert isinstance(weight, TileWeight) and weight.shape == (outputs, inputs)
    error = (weight.unpacked() - wanted).norm() / wanted.norm()
    rounding = (wanted.bfloat16().float() - wanted).norm() / wanted.norm()
    assert error == 0 if name not in ROUNDED else 0 < error < rounding / 5
    assert weight.nbytes * 8 <= 9 * outputs * inputs


@pytest.mark.parametrize("name", sorted(formats() | file_blocks._NAMES))
def test_rows_are_put_into_tiles_some_at_a_time(name, monkeypatch):
    """In little memory beside the tiles, whatever the weight's size; a scale that does not fit is seen in the last rows, too."""
    raw, rows, coded = torch.from_numpy(raw_blocks(name, 80, 512)), [], file_blocks._coded
    whole = in_tiles(raw, formats()[name], torch.bfloat16)
    monkeypatch.setattr(file_blocks, "_BYTES_AT_ONCE", 1)
    monkeypatch.setattr(file_blocks, "_coded", lambda blocks, kind: rows.append(len(blocks)) or coded(blocks, kind))
    assert torch.equal(in_tiles(raw, formats()[name], torch.bfloat16).tiles, whole.tiles) and rows == [16] * 5
    if name in ROUNDED:
        raw[64:] = torch.from_numpy(raw_blocks(name, 16, 512, 1e4))
        assert in_tiles(raw, formats()[name], torch.bfloat16) is None


@pytest.mark.parametrize("name", sorted(file_blocks._NAMES))
@pytest.mark.parametrize("rows", [1, 4, 14])
def test_products_with_every_format(name, rows):
    pytest.importorskip("llvmlite")
    from kernels.cpu_decode import step

    weight = laid_out(torch.from_numpy(raw_blocks(name, 48, 512)), formats()[name], torch.bfloat16)
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(rows)) * torch.logspace(-1, 1, 512)
    found, wanted = step.linear(x, weight), x @ weight.unpacked().T
    assert (found - wanted).norm() < 1e-4 * wanted.norm() and (found - tiles.linear(x, weight)).norm() < 1e-5 * found.norm()
    assert torch.equal(step.linear(x[-1:], weight), found[-1:]), "a row's bits are its own"
    assert torch.equal(step.unpack(weight), weight.to_dense())


def test_what_makes_no_tiles_stays_in_blocks_or_becomes_plain(monkeypatch):
    for name, kept in (("Q8_0", BlockWeight), ("Q5_0", type(None)), ("Q4_K", type(None))):
        raw = torch.from_numpy(raw_blocks(name, 24, 256))
        assert type(laid_out(raw, formats()[name], torch.bfloat16)) is kept, "24 outputs are no whole tiles"
    assert laid_out(torch.from_numpy(raw_blocks("Q6_K", 16, 256, 1000.0)), formats()["Q6_K"], torch.bfloat16) is None, "beyond float16"
    monkeypatch.setattr(file_blocks, "has_flag", lambda name: False)
    assert formats() == NAMES
    assert isinstance(laid_out(torch.from_numpy(raw_blocks("Q8_0", 32, 256)), NAMES["Q8_0"], torch.bfloat16), BlockWeight)
