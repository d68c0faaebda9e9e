"""deterministic=True: the logits of a token are the same bits alone, in a batch, as single steps and inside a block."""

from __future__ import annotations

import pytest
import torch

from engine.model.batch_invariant import BULK_ROWS, ROWS, StableLinear, stable_silu_mul
from engine.model.decoder import Decoder
from engine.model.linear import Projection, choose_product
from kernels.silu_mul import silu_mul

CASES = [("llama", {}), ("qwen2", {}), ("qwen3", {"hidden_size": 96, "intermediate_size": 250, "num_hidden_layers": 2})]


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def steps(decoder, ids, sizes, pool=None):
    """Logits [T, V] of one sequence fed in blocks of the given sizes."""
    sequence = (pool or decoder.new_pool(16, 16)).new_sequence()
    rows, start = [], 0
    for size in sizes:
        rows.append(decoder(ids[start : start + size], [sequence], [size], deterministic=True).logits)
        sequence.advance(size)
        start += size
    return torch.cat(rows)


@pytest.mark.parametrize(("family", "options"), CASES, ids=["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@torch.inference_mode()
def test_same_bits_however_tokens_are_fed(tiny_model, family, options, dtype, threads):
    decoder = Decoder.from_pretrained(tiny_model(family, **options).folder, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 97, (length,), generator=generator) for length in (41, 60, 33)]
    alone = [steps(decoder, text, [1] * len(text)) for text in texts]
    assert torch.equal(steps(decoder, texts[0], [41]), alone[0]), "prefill"
    assert torch.equal(steps(decoder, texts[0], [20, 1, 5, 5, 10]), alone[0]), "chunks and blocks"
    assert torch.equal(steps(decoder, texts[0], [3] * 13 + [2], pool=decoder.new_pool(40, 4)), alone[0]), "another page size"
    # a ragged batch in interleaved pages: different contexts, different numbers of new tokens
    pool = decoder.new_pool(64, 4)
    sequences = [pool.new_sequence() for _ in texts]
    for lens in [[5, 30, 1], [1, 1, 1], [7, 2, 20], [28, 27, 11]]:
        spans = [(s.length, s.length + n) for s, n in zip(sequences, lens, strict=True)]
        flat = torch.cat([text[a:b] for text, (a, b) in zip(texts, spans, strict=True)])
        got = decoder(flat, sequences, lens, deterministic=True).logits
        want = torch.cat([rows[a:b] for rows, (a, b) in zip(alone, spans, strict=True)])
        assert torch.equal(got, want), f"batch with {lens} new tokens"
        for sequence, n in zip(sequences, lens, strict=True):
            sequence.advance(n)


@torch.inference_mode()
def test_layers_run_in_two_passes_give_the_same_bits(tiny_model):
    decoder = Decoder.from_pretrained(tiny_model("llama").folder, dtype=torch.bfloat16)
    ids = torch.randint(0, 97, (20,), generator=torch.Generator().manual_seed(1))
    whole = steps(decoder, ids, [20])
    sequence = decoder.new_pool(4, 16).new_sequence()
    hidden = []
    for i in range(20):
        hidden.append(decoder(ids[i : i + 1], [sequence], [1], last_layer=1, deterministic=True).hidden)
        sequence.advance(1)
    upper = decoder(None, [sequence], [20], starts=[0], first_layer=1, hidden=torch.cat(hidden), deterministic=True)
    assert torch.equal(upper.logits, whole)


@pytest.mark.parametrize("product", [torch.nn.functional.linear, None], ids=["F.linear", "chosen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("outputs", "inputs"), [(960, 576), (3072, 576), (576, 1536), (1000, 100), (7, 33), (2048, 896)])
@torch.inference_mode()
def test_products_do_not_depend_on_other_rows(dtype, outputs, inputs, product, threads):
    generator = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(outputs, inputs, generator=generator).to(dtype), torch.randn(outputs, generator=generator).to(dtype)
    x = torch.randn(BULK_ROWS + 2 * ROWS + 5, inputs, generator=generator).to(dtype)
    exact = x.double() @ weight.double().T + bias.double()
    if product is None:
        product = choose_product(dtype, weight.device)
        projection = Projection(inputs, outputs, False)
        projection.plain.data = weight
        projection.pack()
        weight = projection.matrix
    linear = StableLinear(product)
    whole = linear(x, weight, bias)
    assert whole.shape == (len(x), outputs)
    for start, count in [(0, 1), (BULK_ROWS, 1), (3, 5), (250, 30), (len(x) - 1, 1), (40, BULK_ROWS + 1)]:
        assert torch.equal(linear(x[start : start + count], weight, bias), whole[start : start + count])
    assert (whole.double() - exact).norm() / exact.norm() < (1e-5 if dtype == torch.float32 else 1e-2)


@torch.inference_mode()
def test_a_shape_that_fails_the_probe_goes_row_by_row():
    """A product whose bits depend on the row's place must not be tiled."""

    def uneven(x, weight, bias=None):
        out = torch.nn.functional.linear(x, weight, bias)
        out[3:] *= 1 + 1e-6
        return out

    weight, x = torch.randn(8, 8), torch.randn(20, 8)
    linear = StableLinear(uneven)
    assert linear.tiles(weight, None) == (1,)
    assert torch.equal(linear(x, weight)[7:9], linear(x[7:9], weight))


@pytest.mark.parametrize("width", [64, 250, 1536, 40000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@torch.inference_mode()
def test_activation_does_not_depend_on_other_rows(width, dtype, threads):
    gate_up = torch.randn(67, 2 * width, generator=torch.Generator().manual_seed(3)).to(dtype)
    whole = stable_silu_mul(gate_up)
    for start, count in [(0, 1), (66, 1), (13, 5), (20, 40)]:
        assert torch.equal(stable_silu_mul(gate_up[start : start + count]), whole[start : start + count])
    assert torch.equal(whole, silu_mul(gate_up)) or (whole.float() - silu_mul(gate_up).float()).abs().max() < 1e-5
