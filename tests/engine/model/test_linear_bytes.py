"""Weights in 8 bits: close to what they stand for, for any number of rows, and only where they can be multiplied."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.model.batch_invariant import ROWS, batch_invariant
from engine.model.decoder import forward_reserved
from engine.model.linear import BYTE_ROWS, SMALL_ELEMENTS, Int8Weight, Projection, select_gemm
from engine.runtime.drafters import load_draft_head

needs_bytes = pytest.mark.skipif(
    not Int8Weight.fits(torch.zeros(64, 64, dtype=torch.bfloat16)), reason="this processor has no use for packed weights"
)


@pytest.fixture(autouse=True)
def without_compiled_products(monkeypatch):
    """What a machine without llvmlite does (tests/engine/runtime/test_compiled_runner.py has the other)."""
    monkeypatch.setenv("FORETOLD_KERNELS", "reference")


def random_weight(outputs, inputs):
    generator = torch.Generator().manual_seed(outputs + inputs)
    # rows of very different size, as each has a scale of its own
    return (torch.randn(outputs, inputs, generator=generator) * torch.rand(outputs, 1, generator=generator) ** 4).bfloat16()


@needs_bytes
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (960, 576), (192, 1536), (3072, 64)])
def test_products_are_close_to_the_weights_own(outputs, inputs):
    weight, bias = random_weight(outputs, inputs), torch.randn(outputs, generator=torch.Generator().manual_seed(0)).bfloat16()
    projection = Projection(inputs, outputs, False)
    projection.plain.data = weight.clone()
    projection.pack(select_gemm(projection.plain.dtype, projection.plain.device), int8=True)
    assert projection.plain is None and projection.matrix.nbytes == outputs * inputs + 2 * outputs
    product = select_gemm(weight.dtype, weight.device).linear
    x = torch.randn(BYTE_ROWS + 5, inputs, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = x.double() @ weight.double().T
    for count in (1, 2, 5, BYTE_ROWS, BYTE_ROWS + 5):
        for own in (None, bias):
            out = product(x[:count], projection.matrix, own)
            wanted = exact[:count] if own is None else exact[:count] + bias.double()
            assert out.shape == (count, outputs) and out.dtype == torch.bfloat16
            assert (out.double() - wanted).norm() < 0.015 * wanted.norm()
    assert (product(x[None, 3, :], projection.matrix, None) - product(x, projection.matrix, None)[3]).norm() < 0.02 * exact[3].norm()
    error = (projection.weight.double() - weight.double()).abs()
    assert bool((error <= 0.51 * weight.double().abs().amax(1, keepdim=True) / 127 + 2.0**-8 * weight.double().abs()).all())
    projection.unpack()
    assert projection.packed is None and projection.plain.shape == weight.shape
    assert (projection.weight.double() - weight.double()).norm() < 0.015 * weight.norm()


@needs_bytes
@torch.inference_mode()
def test_stable_products_do_not_depend_on_other_rows():
    projection = Projection(576, 960, False)
    projection.plain.data = random_weight(960, 576)
    projection.pack(select_gemm(projection.plain.dtype, projection.plain.device), int8=True)
    linear = batch_invariant(select_gemm(torch.bfloat16, torch.device("cpu")).linear)
    x = torch.randn(7 * ROWS + 5, 576, generator=torch.Generator().manual_seed(2)).bfloat16()
    whole = linear(x, projection.matrix)
    for start, count in ((0, 1), (3, 5), (250, 30), (len(x) - 1, 1)):
        assert torch.equal(linear(x[start : start + count], projection.matrix), whole[start : start + count])


def test_only_what_can_be_multiplied_is_put_into_bytes():
    for weight in (torch.zeros(64, 64), torch.zeros(64, 33, dtype=torch.bfloat16), torch.zeros(33, 64, dtype=torch.bfloat16)):
        assert not Int8Weight.fits(weight)
        projection = Projection(weight.shape[1], weight.shape[0], False)
        projection.plain.data = weight
        projection.pack(select_gemm(projection.plain.dtype, projection.plain.device), int8=True)
        assert not isinstance(projection.matrix, Int8Weight)


def test_zeros_stay_zeros():
    matrix = Int8Weight(torch.zeros(4, 64, dtype=torch.bfloat16))
    assert not matrix.to_dense().any() and matrix.to_dense().shape == (4, 64)


@needs_bytes
@torch.inference_mode()
def test_a_stored_draft_head_runs_in_int8_and_takes_half_the_memory(random_decoder, make_draft_head, tmp_path):
    shape = {
        "hidden_size": 64,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 128,
    }
    target = random_decoder(0, num_hidden_layers=4, **shape).to(torch.bfloat16).pack()
    trained = {
        bits: load_draft_head(make_draft_head(tmp_path / str(bits), target, size=64, bits=bits), target).head_layers for bits in (8, 16)
    }
    packed = [isinstance(m.matrix, Int8Weight) for m in trained[8].modules() if isinstance(m, Projection)]
    assert packed and all(packed) and not any(isinstance(m.matrix, Int8Weight) for m in trained[16].modules() if isinstance(m, Projection))
    assert trained[8].weight_bytes < 0.6 * trained[16].weight_bytes
    hidden = torch.randn(9, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    out = {}
    for bits, decoder in trained.items():
        states = forward_reserved(decoder, None, [decoder.new_pool(1).new_sequence()], [9], hidden=hidden, logits="none").hidden
        out[bits] = decoder.head(states)
    assert (out[8] - out[16]).norm() < 0.05 * out[16].norm()
    moved = trained[8].to(torch.float32)
    assert all(m.plain is not None or not isinstance(m.matrix, Int8Weight) for m in moved.modules() if isinstance(m, Projection))


def test_where_compiled_code_cannot_run_the_plain_products_do():
    """A system that makes no memory executable: nothing fails."""
    program = (
        "import torch\n"
        "from kernels.cpu_decode import compiled_available, compiled_loads, machine_code\n"
        "def refuse(*_): raise OSError(13, 'refused')\n"
        "machine_code._executable = machine_code._compiled_here = refuse\n"
        "from engine.model import linear\n"
        "assert compiled_available() and not compiled_loads()\n"
        "assert linear.select_gemm(torch.bfloat16, torch.device('cpu')) is not linear.Gemm.COMPILED\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=root, timeout=300, env=os.environ | {"FORETOLD_KERNELS": ""}
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("outputs,inputs", [(SMALL_ELEMENTS // 64, 64), (SMALL_ELEMENTS // 64 + 1, 64)], ids=["small", "large"])
@torch.inference_mode()
def test_float32_products_of_any_size_are_right(outputs, inputs):
    generator = torch.Generator().manual_seed(1)
    weight, bias, x = (torch.randn(size, generator=generator) for size in ((outputs, inputs), (outputs,), (5, inputs)))
    for given in (None, bias):
        wanted = x.double() @ weight.double().T + (0 if given is None else given.double())
        assert torch.allclose(select_gemm(torch.float32, x.device).linear(x, weight, given).double(), wanted, atol=1e-4)
