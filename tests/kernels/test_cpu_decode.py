"""Compiled products on a CPU against plain PyTorch, in every weight format; what blocks mean; bad shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.cpu_decode.blocks import BLOCK_BYTES, NAMES, BlockWeight, linear, unpack_blocks

FORMATS = ["BF16", *NAMES]


def random_weight(outputs, inputs, name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if name == "BF16":
        return torch.randn(outputs, inputs, generator=generator).bfloat16()
    kind = NAMES[name]
    blocks = torch.randint(0, 256, (outputs, inputs // 32, BLOCK_BYTES[kind]), generator=generator).to(torch.uint8)
    halves = 2 if name == "Q4_1" else 1
    scales = torch.randn(outputs, inputs // 32, halves, generator=generator).half()
    blocks[..., : 2 * halves] = scales.view(torch.uint8)
    return BlockWeight(blocks.flatten(1), kind, torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_mean_what_the_gguf_package_reads(name):
    import gguf

    weight = random_weight(3, 96, name)
    wanted = gguf.quants.dequantize(weight.blocks.numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(unpack_blocks(weight.blocks, weight.kind).numpy(), wanted)
    assert weight.shape == (3, 96) and torch.equal(weight.to_dense(), torch.from_numpy(wanted).bfloat16())


def test_an_int8_weight_is_within_half_a_step(monkeypatch):
    monkeypatch.setattr("kernels.cpu_decode.blocks._ELEMENTS_AT_ONCE", 128)  # two rows at once
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.0, 1e-3, 1.0, 100.0, 1.0])[:, None]
    pieces = torch.cat([BlockWeight.of_bytes(weight[row : row + 1]).blocks for row in range(5)])
    assert torch.equal(BlockWeight.of_bytes(weight).blocks, pieces)
    error = (unpack_blocks(BlockWeight.of_bytes(weight).blocks, NAMES["Q8_0"]) - weight).abs().unflatten(1, (-1, 32)).amax(-1)
    assert bool((error <= 0.51 * weight.abs().unflatten(1, (-1, 32)).amax(-1) / 127 + 1e-6).all())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 32), (7, 96), (64, 576)])
def test_products_equal_those_of_the_unpacked_weight(name, outputs, inputs):
    pytest.importorskip("llvmlite")
    from kernels.cpu_decode.step import linear as compiled
    from kernels.cpu_decode.step import unpack

    weight = random_weight(outputs, inputs, name)
    x = torch.randn(11, inputs, generator=torch.Generator().manual_seed(2))
    x = x.bfloat16().float() if name == "BF16" else x  # what a processor that multiplies pairs of bf16 rounds to
    whole = compiled(x, weight)
    assert whole.shape == (11, outputs) and whole.dtype == torch.float32
    assert (whole - linear(x.double().float(), weight)).norm() < 1e-6 * inputs**0.5 * whole.norm()
    for start, count in ((0, 1), (1, 2), (4, 3), (2, 4), (5, 6)):
        assert torch.equal(compiled(x[start : start + count], weight), whole[start : start + count]), "a row's bits are its own"
    x[3, 5] = float("nan")
    poisoned = compiled(x, weight)
    assert bool(poisoned[3].isnan().all()) and torch.equal(poisoned[:3], whole[:3])
    if name != "BF16":
        assert torch.equal(unpack(weight), weight.to_dense())


@pytest.fixture(scope="module", params=["as it is", "without matrices", "without pairs"])
def compiled_linear(request):
    """The compiled product of this processor, and of one that lacks some of its instructions; a workspace full of NaN."""
    pytest.importorskip("llvmlite")
    from kernels.cpu_decode import machine_code, program, step

    write, patch = program.write_program, pytest.MonkeyPatch()
    lacks = {"as it is": {}, "without matrices": {"matrices": False}, "without pairs": {"matrices": False, "pairs": False}}[request.param]
    patch.setattr(program, "write_program", lambda **has: write(**(has | lacks)))
    addresses, kept = machine_code._compiled_here()
    patch.undo()
    product = machine_code._functions(addresses, kept)["linear"]

    def linear(x, weight):
        out = torch.full((len(x) + 1, weight.shape[0]), torch.nan)
        packed = torch.full((step.whole_rows(len(x)) + 1, x.shape[1]), torch.nan, dtype=torch.bfloat16)
        product(weight.data_ptr(), 0, *weight.shape, x.data_ptr(), len(x), packed.data_ptr(), out.data_ptr())
        assert bool(out[-1].isnan().all()) and bool(packed[-1].isnan().all()), "nothing is written behind"
        return out[:-1]

    return linear


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 32), (15, 64), (16, 32), (33, 96), (64, 576), (80, 1536)])
def test_products_of_many_rows_are_each_rows_own(outputs, inputs, compiled_linear):
    weight = random_weight(outputs, inputs, "BF16")
    x = torch.randn(70, inputs, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    whole = compiled_linear(x, weight)
    assert (whole - x @ weight.float().T).norm() < 1e-6 * inputs**0.5 * whole.norm()
    for start, count in ((0, 1), (3, 1), (5, 2), (1, 8), (11, 15), (20, 16), (2, 17), (30, 32), (9, 33), (13, 47), (0, 49)):
        assert torch.equal(compiled_linear(x[start : start + count].contiguous(), weight), whole[start : start + count])
    poisoned = x.clone()
    poisoned[17, 3], poisoned[31] = torch.nan, torch.inf
    found = compiled_linear(poisoned, weight)
    others = [row for row in range(70) if row not in (17, 31)]
    assert torch.equal(found[others], whole[others]) and bool(found[17].isnan().all()) and not bool(found[31].isfinite().any())


def test_the_choice_of_instructions_is_this_processors(monkeypatch):
    """Matrices only where the processor has them and the system lets them be used."""
    pytest.importorskip("llvmlite")
    from kernels.cpu_decode import machine_code, most_rows, program

    asked = []
    monkeypatch.setattr(program, "write_program", lambda **has: asked.append(has))
    features = {"avx512bf16", "avx512vnni", "amx-tile", "amx-bf16"}
    for allowed, own in ((True, features), (False, features), (True, features - {"amx-bf16"}), (True, features - {"avx512bf16"})):
        monkeypatch.setattr(machine_code, "allows_tiles", lambda allowed=allowed: allowed)
        machine_code._step(own.__contains__)
    assert [has["matrices"] for has in asked] == [True, False, False, False]
    monkeypatch.setattr(machine_code, "allows_tiles", lambda: True)
    more = most_rows(1)
    assert most_rows(1, plain=False) < more
    monkeypatch.setattr(machine_code, "allows_tiles", lambda: False)
    assert most_rows(1) < more and most_rows(100) == 16


def test_what_does_not_fit_is_refused():
    pytest.importorskip("llvmlite")
    from kernels.cpu_decode.step import fits
    from kernels.cpu_decode.step import linear as compiled

    assert fits(torch.zeros(4, 64, dtype=torch.bfloat16))
    for weight in (torch.zeros(4, 64), torch.zeros(4, 48, dtype=torch.bfloat16), torch.zeros(64, 4, dtype=torch.bfloat16).T):
        assert not fits(weight)
    with pytest.raises(ValueError, match="do not fit"):
        compiled(torch.zeros(2, 32), torch.zeros(4, 64, dtype=torch.bfloat16))
    for blocks, kind in ((torch.zeros(2, 35, dtype=torch.uint8), NAMES["Q8_0"]), (torch.zeros(2, 64, dtype=torch.uint8), 0)):
        with pytest.raises(ValueError, match="whole blocks"):
            BlockWeight(blocks, kind, torch.bfloat16)


@pytest.mark.parametrize("x", [0.0, -1.0, 1e-8, -87.0, 80.0, float("inf"), float("nan")])
def test_numbers_round_to_bf16_as_torch_does_and_exp_is_exact_enough(x):
    pytest.importorskip("llvmlite")
    from kernels.cpu_decode.step import in_place

    values = np.full(32, x, np.float32) * np.tile(np.array([1, 1.00390625, 1.001953125, -1], np.float32), 8)
    rounded, powers = values.copy(), values.copy()
    in_place("rounded", rounded)
    assert np.array_equal(rounded, torch.from_numpy(values).bfloat16().float().numpy(), equal_nan=True)
    in_place("exponentials", powers)
    small = values < 81
    wanted = np.exp(np.maximum(values[small].astype(np.float64), -126 / 1.4426950408889634))
    assert np.all(np.abs(powers[small] / wanted - 1) < 3e-7 + 4e-8 * np.abs(np.maximum(values[small], -90)))
    assert np.all(np.isnan(powers[np.isnan(values)]))
