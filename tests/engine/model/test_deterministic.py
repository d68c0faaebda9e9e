"""deterministic=True: the logits of a token are the same bits alone, in a batch, as single steps and inside a block."""

from __future__ import annotations

import pytest
import torch

from engine.model.batch_invariant import ROWS, batch_invariant, batch_invariant_gate
from engine.model.decoder import Decoder, forward_reserved
from engine.model.linear import Projection, select_gemm
from kernels.silu_mul import silu_mul

CASES = [
    ("llama", {}),
    ("qwen2", {}),
    ("qwen3", {"hidden_size": 96, "intermediate_size": 250, "num_hidden_layers": 2}),
    ("gemma2", {}),
    ("gemma3", {}),
    ("mixtral", {}),
]


@pytest.fixture
def threads(request):
    """So many threads, parametrised indirectly. Two threads wait for each other by spinning, so they meet each kind of case, not each case."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def steps(decoder, ids, sizes, pool=None):
    """Logits [T, V] of one sequence fed in blocks of the given sizes."""
    sequence = (pool or decoder.new_pool(16, 16)).new_sequence()
    rows, start = [], 0
    for size in sizes:
        rows.append(forward_reserved(decoder, ids[start : start + size], [sequence], [size], deterministic=True).logits)
        sequence.advance(size)
        start += size
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("family", "options", "dtype", "threads"),
    [(*case, dtype, 1) for case in CASES for dtype in (torch.float32, torch.bfloat16)] + [("qwen2", {}, torch.bfloat16, 2)],
    indirect=["threads"],
)
@torch.inference_mode()
def test_same_bits_however_tokens_are_fed(tiny_model, family, options, dtype, threads):
    decoder = Decoder.from_pretrained(tiny_model(family, **options).folder, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 97, (length,), generator=generator) for length in (41, 60, 33)]
    # token by token; the others at once, which the first text shows to give the bits of its single tokens
    alone = [steps(decoder, text, [1] * len(text) if text is texts[0] else [len(text)]) for text in texts]
    assert torch.equal(steps(decoder, texts[0], [41]), alone[0]), "prefill"
    assert torch.equal(steps(decoder, texts[0], [20, 1, 5, 5, 10]), alone[0]), "chunks and blocks"
    assert torch.equal(steps(decoder, texts[0], [3] * 13 + [2], pool=decoder.new_pool(40, 4)), alone[0]), "another page size"
    # a ragged batch in interleaved pages: different contexts, different numbers of new tokens
    pool = decoder.new_pool(64, 4)
    sequences = [pool.new_sequence() for _ in texts]
    for lens in [[5, 30, 1], [1, 1, 1], [7, 2, 20], [28, 27, 11]]:
        spans = [(s.length, s.length + n) for s, n in zip(sequences, lens, strict=True)]
        flat = torch.cat([text[a:b] for text, (a, b) in zip(texts, spans, strict=True)])
        got = forward_reserved(decoder, flat, sequences, lens, deterministic=True).logits
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
        hidden.append(forward_reserved(decoder, ids[i : i + 1], [sequence], [1], last_layer=1, deterministic=True).hidden)
        sequence.advance(1)
    upper = forward_reserved(decoder, None, [sequence], [20], starts=[0], first_layer=1, hidden=torch.cat(hidden), deterministic=True)
    assert torch.equal(upper.logits, whole)


def chosen(product, dtype, weight):
    """The product and the weight as a decoder has them."""
    if product is not None:
        return product, weight
    projection = Projection(weight.shape[1], weight.shape[0], False)
    projection.plain.data = weight
    gemm = select_gemm(dtype, weight.device)
    projection.pack(gemm)
    return gemm.linear, projection.matrix


SHAPES = [(960, 576), (3072, 576), (576, 1536), (1000, 100), (7, 33), (2048, 896), (896, 4864)]


@pytest.mark.parametrize(
    ("product", "threads"),
    [(torch.nn.functional.linear, 1), (None, 1), (None, 2)],
    ids=["F.linear-1-thread", "chosen-1-thread", "chosen-2-threads"],
    indirect=["threads"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@torch.inference_mode()
def test_products_do_not_depend_on_other_rows(dtype, outputs, inputs, product, threads):
    generator = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(outputs, inputs, generator=generator).to(dtype), torch.randn(outputs, generator=generator).to(dtype)
    x = torch.randn(7 * ROWS + 5, inputs, generator=generator).to(dtype)
    exact = x.double() @ weight.double().T + bias.double()
    product, weight = chosen(product, dtype, weight)
    linear = batch_invariant(product)
    whole = linear(x, weight, bias)
    assert whole.shape == (len(x), outputs)
    for start, count in [(0, 1), (64, 1), (3, 5), (50, 30), (len(x) - 1, 1), (20, 4 * ROWS + 1)]:
        assert torch.equal(linear(x[start : start + count], weight, bias), whole[start : start + count])
    assert (whole.double() - exact).norm() / exact.norm() < (1e-5 if dtype == torch.float32 else 1e-2)
    assert linear(x[:0], weight, bias).shape == (0, outputs)


@pytest.mark.parametrize("threads", [1, 2], ids=["1-thread", "2-threads"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@torch.inference_mode()
def test_every_place_in_a_tile_sums_in_the_same_order(dtype, outputs, inputs, threads):
    """Sums whose terms cancel: what is left is rounding, which another order of summation changes in almost every output."""
    generator = torch.Generator().manual_seed(3)
    half = inputs // 2
    weight, row = torch.randn(outputs, inputs, generator=generator), torch.randn(inputs, generator=generator)
    order = torch.randperm(2 * half, generator=generator)
    weight, row = weight.to(dtype), row.to(dtype)
    weight[:, order[half:]], row[order[half:]] = weight[:, order[:half]], -row[order[:half]]
    row[2 * half :] = 0
    product, packed = chosen(None, dtype, weight)
    linear = batch_invariant(product)
    alone = linear(row[None], packed, None)
    scale = (row.double().abs() @ weight.double().abs().T).mean()
    assert alone.double().abs().mean() < 1e-4 * scale, "the terms must cancel for the test to mean anything"
    for place in range(ROWS):
        x = torch.randn(ROWS, inputs, generator=generator).to(dtype)
        x[place] = row
        assert torch.equal(linear(x, packed, None)[place], alone[0]), f"place {place}"


@pytest.mark.parametrize(("width", "threads"), [(64, 1), (250, 1), (1536, 1), (40000, 1), (1536, 2)], indirect=["threads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@torch.inference_mode()
def test_activation_does_not_depend_on_other_rows(width, dtype, threads):
    gate_up = torch.randn(67, 2 * width, generator=torch.Generator().manual_seed(3)).to(dtype)
    gate = batch_invariant_gate(silu_mul)
    whole = gate(gate_up)
    for start, count in [(0, 1), (66, 1), (13, 5), (20, 40)]:
        assert torch.equal(gate(gate_up[start : start + count]), whole[start : start + count])
    assert torch.equal(whole, silu_mul(gate_up)) or (whole.float() - silu_mul(gate_up).float()).abs().max() < 1e-5
