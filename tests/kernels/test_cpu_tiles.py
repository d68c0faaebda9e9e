"""Weights in tiles: what they mean, their products against plain PyTorch, with and without a processor's instruction for four bytes; bad shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.cpu_decode import blocks, tiles
from kernels.cpu_decode.blocks import BLOCK_BYTES, NAMES, Q4_1, BlockWeight
from kernels.cpu_decode.file_blocks import FILE_FORMATS, in_tiles
from kernels.cpu_decode.tiles import OF_FILES, TILES_4, TILES_8, TileWeight

KINDS = [TILES_8, TILES_4]


def weight_of(outputs, inputs, seed=0):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 1, outputs)[:, None]


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_within_half_a_step(kind, monkeypatch):
    weight = weight_of(48, 96)
    weight[3], weight[20, :32] = 0.0, 0.0
    whole = TileWeight.of(weight, kind)
    monkeypatch.setattr(tiles, "_ROWS", 16)
    assert torch.equal(TileWeight.of(weight, kind).tiles, whole.tiles), "some rows at a time"
    assert (
        whole.shape == (48, 96)
        and whole.nbytes == TileWeight.num_bytes(weight.shape, kind) == 48 * 96 * (8 if kind == TILES_8 else 4) // 8 + 9 * 32
    )
    groups = weight.unflatten(1, (-1, 32))
    error = (whole.unpacked() - weight).unflatten(1, (-1, 32))
    steps = groups.abs().amax(-1) / (127 if kind == TILES_8 else 8)
    assert bool((error.abs().amax(-1) <= (0.52 if kind == TILES_8 else 1.3) * steps + 1e-6).all()), "four bits may cut the farthest off"
    assert error.norm() < (0.006 if kind == TILES_8 else 0.1) * weight.norm()
    assert not whole.unpacked()[3].any() and torch.equal(whole.to_dense(), whole.unpacked())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (48, 96), (528, 576)])
def test_compiled_code_makes_the_tiles_of_plain_pytorch(kind, outputs, inputs):
    pytest.importorskip("llvmlite")
    from kernels.cpu_decode.step import tiled

    weight = weight_of(outputs, inputs).bfloat16()
    weight[3], weight[5, :32], weight[7] = 0.0, 0.0, weight[7] * 1e-9
    weight[9, :32] = torch.tensor([1.0, -1.0] * 16)  # as far below 0 as above it
    room = torch.empty(TileWeight.num_bytes(weight.shape, kind), dtype=torch.uint8)
    compiled, plain = tiled(weight, kind, room), TileWeight.of(weight, kind)
    unequal = (compiled.tiles != plain.tiles).view(-1, tiles.GROUP_BYTES[kind]).any(1).sum()
    assert unequal <= len(compiled.tiles) // 100, "sums in another order decide between two scales hardly ever"
    error, wanted = ((own.unpacked() - weight.float()).norm() for own in (compiled, plain))
    assert abs(error - wanted) <= 1e-6 * wanted and compiled.dtype == torch.bfloat16 and compiled.shape == weight.shape
    with pytest.raises(ValueError, match="no room for the tiles"):
        tiled(weight, kind, room[1:])
    assert torch.equal(tiled(weight.float(), kind, room).tiles, plain.tiles), "other numbers by plain PyTorch"


def test_a_byte_is_where_the_layout_says():
    weight = torch.zeros(16, 64)
    weight[5, 32 + 4 * 3 + 2] = 127.0  # group 1, q 3, byte 2
    whole = TileWeight.of(weight, TILES_8)
    groups = whole.tiles.view(2, tiles.GROUP_BYTES[TILES_8])
    assert int((groups[:, 32:] != 128).sum()) == 1 and int(groups[1, 32 + 3 * 64 + 5 * 4 + 2]) == 255
    weight[5] = 0.0
    weight[5, 4 * 6 + 1] = -8.0  # q 6: the high half of the byte of q 2
    groups = TileWeight.of(weight, TILES_4).tiles.view(2, tiles.GROUP_BYTES[TILES_4])
    assert int((groups[:, 32:] != 0x88).sum()) == 1 and int(groups[0, 32 + 2 * 64 + 5 * 4 + 1]) == 0x08


def random_blocks(outputs, inputs, name, seed=0):
    """Blocks of a file, every code among them."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randint(0, 256, (outputs, inputs // 32, BLOCK_BYTES[NAMES[name]]), generator=generator, dtype=torch.uint8)
    heads = torch.rand(2, outputs, inputs // 32, 1, generator=generator) * torch.logspace(-3, 0, outputs)[:, None, None]
    parts[..., :2] = (heads[0] - 0.2).half().view(torch.uint8)
    if NAMES[name] == Q4_1:
        parts[..., 2:4] = (-8 * heads[1]).half().view(torch.uint8)
    return BlockWeight(parts.flatten(1), NAMES[name], torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (48, 96), (528, 576)])
def test_tiles_of_a_file_s_blocks_hold_the_same_weights(name, outputs, inputs):
    own = random_blocks(outputs, inputs, name)
    weight = in_tiles(own.blocks, own.kind, own.dtype)
    assert weight.kind == FILE_FORMATS[own.kind] and weight.shape == own.shape and weight.nbytes == own.nbytes
    assert torch.equal(weight.unpacked(), blocks.unpack_blocks(own.blocks, own.kind))
    numbers = torch.tensor([3, outputs - 1, 0, 3])
    assert torch.equal(weight.rows(numbers), weight.unpacked()[numbers])
    assert torch.equal(weight.of_outputs(slice(outputs - 16, outputs + 16)).unpacked(), weight.unpacked()[-16:])
    assert in_tiles(own.blocks[:15], own.kind, own.dtype) is None, "no whole tiles"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (48, 96), (80, 1536)])
def test_products_with_a_file_s_blocks(name, outputs, inputs, without_instruction, monkeypatch):
    """As near to the product in float32 as its order of sums lets one be, a row's own whatever rows stand beside it, and weights come back."""
    from kernels.cpu_decode import step

    own = random_blocks(outputs, inputs, name)
    weight = in_tiles(own.blocks, own.kind, own.dtype)
    x = torch.randn(14, inputs, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 2, inputs)
    x[2] = 0.0
    whole, exact = step.linear(x, weight), (x.double() @ weight.unpacked().double().T).float()
    assert (whole - exact).norm() < 1e-4 * exact.norm(), "an input of bf16 would cost thirty times as much"
    assert (whole - tiles.linear(x, weight)).norm() < 1e-5 * whole.norm() and not whole[2].any()
    for start, count in ((0, 1), (1, 2), (4, 3), (2, 4), (5, 9)):
        assert torch.equal(step.linear(x[start : start + count], weight), whole[start : start + count]), "a row's bits are its own"
    monkeypatch.setattr(step, "_FUNCTIONS", without_instruction)
    assert torch.equal(step.linear(x, weight), whole), "the same sums of whole numbers"
    monkeypatch.undo()
    assert torch.equal(step.unpack(weight), weight.to_dense())
    other = TileWeight(weight.tiles, weight.kind, torch.float32)
    assert torch.equal(step.unpack(other), other.to_dense())


@pytest.fixture(scope="module")
def without_instruction():
    """The compiled products of a processor that has no instruction for four bytes."""
    pytest.importorskip("llvmlite")
    import llvmlite.binding as llvm

    from kernels.cpu_decode import machine_code, program

    write, patch = program.write_program, pytest.MonkeyPatch()
    patch.setattr(program, "write_program", lambda **has: write(**(has | {"quads": False})))
    addresses, kept = machine_code._compiled_here()
    patch.undo()
    assert llvm is not None
    return machine_code._functions(addresses, kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (48, 96), (80, 576)])
def test_products_equal_those_of_plain_pytorch(kind, outputs, inputs, without_instruction, monkeypatch):
    from kernels.cpu_decode import step

    weight = TileWeight.of(weight_of(outputs, inputs), kind)
    assert step.fits(weight)
    x = torch.randn(11, inputs, generator=torch.Generator().manual_seed(2))
    x[2], x[4, :32] = 0.0, 0.0
    whole = step.linear(x, weight)
    assert whole.shape == (11, outputs) and whole.dtype == torch.float32
    assert (whole - tiles.linear(x, weight)).norm() < 1e-6 * whole.norm()
    assert (whole - x @ weight.unpacked().T).norm() < 0.01 * whole.norm(), "rounding the inputs to 8 bits costs little"
    for start, count in ((0, 1), (1, 2), (4, 3), (2, 4), (5, 6)):
        assert torch.equal(step.linear(x[start : start + count], weight), whole[start : start + count]), "a row's bits are its own"
    x[3, 5] = float("nan")
    others = [row for row in range(11) if row != 3]
    assert torch.equal(step.linear(x, weight)[others], whole[others])
    x[3, 5] = 1.0
    wanted = step.linear(x, weight)
    monkeypatch.setattr(step, "_FUNCTIONS", without_instruction)
    assert torch.equal(step.linear(x, weight), wanted), "the same sums of whole numbers"


@pytest.mark.parametrize("kind", [*KINDS, *OF_FILES])
def test_an_input_that_is_no_number_shows_in_its_row_alone(kind):
    from kernels.cpu_decode import step

    weight = weight_of_kind(kind, 32, 64)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(4))
    wanted = step.linear(x, weight)
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in range(64):
            broken = x.clone()
            broken[1, place] = bad
            found = step.linear(broken, weight)
            assert not found[1].isfinite().any() and torch.equal(found[[0, 2]], wanted[[0, 2]]), f"{bad} at {place}"


def weight_of_kind(kind, outputs, inputs):
    """A weight in tiles, of random codes where the format is a file's."""
    if kind in KINDS:
        return TileWeight.of(weight_of(outputs, inputs), kind)
    generator, numbers = torch.Generator().manual_seed(5), outputs // 16 * (inputs // 32)
    groups = torch.randint(0, 256, (numbers, tiles.GROUP_BYTES[kind]), generator=generator, dtype=torch.uint8)
    heads = torch.rand(numbers, tiles.HEAD_BYTES[kind] // 2, generator=generator) - 0.2
    groups[:, : tiles.HEAD_BYTES[kind]] = heads.half().view(torch.uint8)
    return TileWeight(groups.view(outputs // 16, -1), kind, torch.bfloat16)


@pytest.mark.parametrize("kind", [*KINDS, *OF_FILES])
@pytest.mark.parametrize("rows", [1, 3, 14, 15, 28, 29])
def test_nothing_beside_the_outputs_is_written(kind, rows):
    pytest.importorskip("llvmlite")
    from kernels.cpu_decode import step

    weight = weight_of_kind(kind, 32, 64)
    x, room = np.ones((rows, 64), np.float32), step.whole_rows(rows)
    packed, out = np.full((room + 2, 64), 7, np.uint16), np.full((rows + 2, 32), np.nan, np.float32)
    step._FUNCTIONS["linear"](*step._place(weight), 32, 64, x.ctypes.data, rows, packed[1:].ctypes.data, out[1:].ctypes.data)
    assert np.isnan(out[[0, -1]]).all() and np.isfinite(out[1:-1]).all() and (packed[[0, -1]] == 7).all()


def test_what_has_no_whole_tiles_is_refused():
    for shape in ((15, 32), (16, 33), (0, 32), (16,)):
        assert not TileWeight.fits(torch.Size(shape))
    with pytest.raises(ValueError, match="no whole tiles"):
        TileWeight.of(torch.zeros(24, 32), TILES_8)
    with pytest.raises(ValueError, match="whole groups"):
        TileWeight(torch.zeros(1, 100, dtype=torch.uint8), TILES_4, torch.bfloat16)
