"""The fused kernels of a decode step against their twins, and a whole step of a small model against plain float32 arithmetic."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")

from kernels.decode_attention import reference as attention_reference
from kernels.decode_attention import triton as attention_triton
from kernels.decode_attention.config import DecodeAttentionConfig, decode_attention_parts
from kernels.decode_layer import reference as step_reference
from kernels.decode_layer import triton as step_triton
from kernels.decode_layer.plans import DecodePlan, choose_plan
from kernels.decode_layer.tensors import DecodeBuffers, DecodeShape, DecodeWeights
from kernels.embed_rows import reference as embed_reference
from kernels.embed_rows import triton as embed_triton
from kernels.greedy_head import reference as head_reference
from kernels.greedy_head import triton as head_triton
from kernels.norm_gate_up import reference as gate_reference
from kernels.norm_gate_up import triton as gate_triton
from kernels.norm_qkv import reference as qkv_reference
from kernels.norm_qkv import triton as qkv_triton
from kernels.skinny_linear import reference as linear_reference
from kernels.skinny_linear import triton as linear_triton
from kernels.skinny_linear.tiles import Tile
from tests.kernels.cases import in_turn

pytestmark = pytest.mark.usefixtures("poisoned")
BOUND = {torch.float32: 3e-5, torch.bfloat16: 8e-3}
DTYPES = [torch.float32, torch.bfloat16]
EARLY = torch.cuda.is_available()
TILES = {
    "slices": Tile(block_n=16, block_k=16, slices=4, stages=2, lines=2, held=2),
    "split": Tile(block_n=16, block_k=16, slices=2, splits=3, stages=2),
    "whole": Tile(block_n=16, block_k=32, slices=1, stages=2, warps=1, held=3),
    "scalar": Tile(block_n=8, block_k=32, slices=1, stages=2, scalar=True, held=1),
    "scalar-split": Tile(block_n=8, block_k=16, slices=2, splits=2, stages=2, scalar=True),
}


@pytest.fixture
def draw(device):
    """Random tensors, the same for the same test."""
    generator = torch.Generator().manual_seed(5)
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator).to(device, dtype)


def scratch(device, floats=200_000):
    return {"part": torch.full((floats,), float("nan"), device=device), "tickets": torch.zeros(4096, dtype=torch.int32, device=device)}


def prepared(draw, rows, width, dtype):
    """Rows as the kernel before leaves them, their squares in three parts."""
    stream = draw(rows, width, dtype=dtype) * 2
    scaled = (stream.float() * (1 + draw(width) / 4)).to(dtype)
    squares = torch.full((5, rows), float("nan"), device=stream.device)
    for part, columns in enumerate(stream.float().square().tensor_split(3, dim=1)):
        squares[part] = columns.sum(1)
    return scaled, squares


def at_rest(space):
    return not bool(space["tickets"].any())


@pytest.mark.parametrize("dtype,tile,shape,with_bias", in_turn(DTYPES, list(TILES), [(1, 40, 64), (5, 33, 200), (1, 7, 90), (9, 16, 72)]))
def test_linear_residual(shape, tile, dtype, with_bias, device, draw, assert_close):
    tokens, rows, width = shape
    x, weight = draw(tokens, width, dtype=dtype), draw(rows, width, dtype=dtype) / width**0.5
    bias = draw(rows, dtype=dtype) if with_bias else None
    before, norm = draw(tokens, rows, dtype=dtype), draw(rows, dtype=dtype)
    outputs = []
    space = scratch(device)
    for run in (linear_triton.linear_residual, linear_reference.linear_residual):
        stream, scaled, squares = before.clone(), torch.empty_like(before), torch.empty(rows, tokens, device=device)
        extra = {"tile": TILES[tile], "early": EARLY, **space} if run is linear_triton.linear_residual else {}
        parts = run(x, weight, bias, stream, norm, scaled, squares, **extra)
        outputs.append((stream, scaled, squares[:parts].sum(0)))
    for got, want in zip(*outputs, strict=True):
        assert_close(got, want, BOUND[dtype])
    assert at_rest(space)


@pytest.mark.parametrize(
    "tile,shape,half", in_turn(list(TILES), [(1, 2, 1, 32, 64, False), (5, 3, 1, 48, 90, True), (2, 4, 2, 16, 40, True)])
)
def test_norm_qkv(shape, tile, half, device, draw, assert_close):
    tokens, heads, groups, head_dim, width, with_norm = shape
    dtype = DTYPES[half]
    scaled, squares = prepared(draw, tokens, width, dtype)
    rows = (heads + 2 * groups) * head_dim
    weight, bias = draw(rows, width, dtype=dtype) / width**0.5, draw(rows, dtype=dtype)
    qk_norm = draw(2, head_dim, dtype=dtype) if with_norm else None
    angle = torch.arange(50, device=device)[:, None] * 0.7 ** torch.arange(head_dim // 2, device=device)
    positions = torch.arange(tokens, device=device) * 3 + 4
    slots = (torch.arange(tokens, device=device) * 5 + 2) % 24
    if tokens > 1:
        slots[1] = -1
    pool = draw(2, 3, 8, groups, head_dim, dtype=dtype)
    space = scratch(device)
    fixed = (scaled, squares, 3, 1e-5, weight, bias, qk_norm, angle.cos(), angle.sin(), positions, slots)
    got_pool, want_pool, got, want = pool.clone(), pool.clone(), *(torch.empty(2, tokens, heads, head_dim, device=device).to(dtype))
    qkv_triton.norm_qkv(*fixed, got_pool[0], got_pool[1], got, tile=TILES[tile], early=EARLY, **space)
    qkv_reference.norm_qkv(*fixed, want_pool[0], want_pool[1], want)
    assert_close(got, want, BOUND[dtype])
    assert_close(got_pool, want_pool, BOUND[dtype])
    untouched = torch.ones(24, dtype=torch.bool, device=device)
    untouched[slots[slots >= 0]] = False
    assert torch.equal(got_pool.flatten(1, 2)[:, untouched], pool.flatten(1, 2)[:, untouched])
    assert at_rest(space)


def test_norm_qkv_refuses_a_tile_that_does_not_divide_a_head(device, draw):
    q, pages = draw(1, 1, 24), draw(1, 4, 1, 24)
    table, ints = draw(4, 12), torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="divides it"):
        qkv_triton.norm_qkv(
            draw(1, 8),
            draw(1, 1),
            1,
            1e-5,
            draw(72, 8),
            None,
            None,
            table,
            table,
            ints,
            ints,
            pages,
            pages,
            q,
            tile=Tile(),
            **scratch(device),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize("tile", ["slices", "whole", "scalar"])
@pytest.mark.parametrize("tokens,inner,width", [(1, 40, 64), (5, 33, 200), (1, 7, 90)])
def test_norm_gate_up(tokens, inner, width, tile, dtype, device, draw, assert_close):
    scaled, squares = prepared(draw, tokens, width, dtype)
    weight = draw(2 * inner, width, dtype=dtype) / width**0.5
    got, want = (torch.empty(tokens, inner, dtype=dtype, device=device) for _ in range(2))
    gate_triton.norm_gate_up(scaled, squares, 3, 1e-5, weight, got, tile=TILES[tile], early=EARLY)
    gate_reference.norm_gate_up(scaled, squares, 3, 1e-5, weight, want)
    assert_close(got, want, 2 * BOUND[dtype])


@pytest.mark.parametrize("dtype,tile,shape,with_logits", in_turn(DTYPES, ["slices", "whole", "scalar"], [(1, 400, 64), (5, 333, 40)]))
def test_greedy_head(shape, tile, dtype, with_logits, device, draw, assert_close):
    tokens, vocab, width = shape
    scaled, squares = prepared(draw, tokens, width, dtype)
    weight = draw(vocab, width, dtype=dtype) / width**0.5
    weight[vocab // 2] = weight[7]  # equals must go to the first
    space = scratch(device)
    logits = torch.empty(tokens, vocab, device=device) if with_logits else None
    want_logits = torch.empty(tokens, vocab, device=device)
    got, want = (torch.empty(tokens, dtype=torch.int64, device=device) for _ in range(2))
    head_triton.greedy_head(scaled, squares, 3, 1e-5, weight, logits, got, tile=TILES[tile], early=EARLY, **space)
    head_reference.greedy_head(scaled, squares, 3, 1e-5, weight, want_logits, want)
    if logits is not None:
        assert_close(logits, want_logits, BOUND[dtype])
        assert torch.equal(got, (logits == logits.amax(1, keepdim=True)).int().argmax(1))
    best = want_logits.gather(1, want[:, None])
    assert ((best - want_logits.gather(1, got[:, None])) <= 2 * BOUND[dtype] * best.abs()).all()
    assert at_rest(space)


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_logit_that_is_not_finite_leaves_no_choice(spoiled, device, draw):
    scaled, squares = prepared(draw, 3, 64, torch.float32)
    weight = draw(333, 64) / 8
    scaled[1], weight[:] = 0.0, weight.abs()
    scaled[1, 5] = spoiled
    for module, options in ((head_reference, {}), (head_triton, {"tile": TILES["slices"], "early": EARLY, **scratch(device)})):
        got = torch.empty(3, dtype=torch.int64, device=device)
        module.greedy_head(scaled, squares, 3, 1e-5, weight, None, got, **options)
        assert got[1] == -1 and got[0] >= 0 and got[2] >= 0


@pytest.mark.parametrize("embed", [False, True])
def test_embed_rows(embed, device, draw):
    table, norm, ids = draw(9, 70, dtype=torch.bfloat16), draw(70, dtype=torch.bfloat16), torch.tensor([8, -1, 3], device=device)
    before = draw(3, 70, dtype=torch.bfloat16)
    outputs = []
    for run in (embed_triton.embed_rows, embed_reference.embed_rows):
        stream, scaled, squares = before.clone(), torch.empty_like(before), torch.empty(2, 3, device=device)
        assert run(ids if embed else None, table, norm, stream, scaled, squares) == 1
        outputs.append((stream, scaled, squares[0]))
    for got, want in zip(*outputs, strict=True):
        torch.testing.assert_close(got, want)


def paged_case(draw, device, contexts, length, heads, groups, head_dim, size, dtype):
    """Queries and pages whose unused rows hold NaN."""
    counts = [-(-c // size) for c in contexts]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(1)).tolist()
    table = torch.full((len(contexts), max(counts) + 2), 10**6, dtype=torch.int32)
    pool = torch.full((2, len(order), size, groups, head_dim), float("nan"), device=device).to(dtype)
    for b, context in enumerate(contexts):
        pages = [order.pop() for _ in range(counts[b])]
        table[b, : counts[b]] = torch.tensor(pages, dtype=torch.int32)
        pool.view(2, -1, groups, head_dim)[:, [pages[t // size] * size + t % size for t in range(context)]] = draw(
            2, context, groups, head_dim, dtype=dtype
        )
    positions = torch.cat([torch.arange(c - length, c) for c in contexts]).to(device)
    q = draw(len(contexts) * length, heads, head_dim, dtype=dtype)
    return q, pool, table.to(device), positions, torch.tensor(contexts, dtype=torch.int32, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize("whole_block", [False, True], ids=["each", "block"])
@pytest.mark.parametrize(
    "contexts,length,heads,groups,head_dim,size",
    [([1], 1, 2, 1, 16, 16), ([70, 3, 131], 3, 6, 2, 32, 16), ([40, 300], 2, 3, 1, 48, 5)],
    ids=str,
)
def test_decode_attention(contexts, length, heads, groups, head_dim, size, whole_block, dtype, device, draw, assert_close):
    q, pool, table, positions, lens = paged_case(draw, device, contexts, length, heads, groups, head_dim, size, dtype)
    want, got = torch.empty_like(q), torch.empty_like(q)
    attention_reference.decode_attention(q, pool[0], pool[1], table, positions, lens, head_dim**-0.5, want)
    for split, programs, spread in ((32, 2, False), (64, 64, False), (16, 3, True), (32, 64, True)):
        config = DecodeAttentionConfig(split=split, block_n=16, programs=programs, whole_block=whole_block, spread=spread)
        space = scratch(device, decode_attention_parts(*q.shape, table.shape[1] * size, config))
        got.fill_(float("nan"))
        attention_triton.decode_attention(
            q, pool[0], pool[1], table, positions, lens, head_dim**-0.5, got, config=config, early=EARLY, **space
        )
        assert_close(got, want, BOUND[dtype])
        assert at_rest(space)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
def test_tokens_of_one_text_as_requests_of_their_own(dtype, device, draw, assert_close):
    """Rows 1 to 4 are a prompt's tokens behind 37 keys, all of its page table; the others are other texts."""
    q, pool, table, positions, lens = paged_case(draw, device, [70, 41, 41, 41, 41, 3], 1, 6, 2, 32, 16, dtype)
    table[2:5] = table[1]
    positions[1:5], lens[1:5] = torch.arange(37, 41, device=device), torch.arange(38, 42, dtype=torch.int32, device=device)
    want, got = torch.empty_like(q), torch.full_like(q, float("nan"))
    attention_reference.decode_attention(q, pool[0], pool[1], table, positions, lens, 0.25, want)
    config = DecodeAttentionConfig(split=32, block_n=16, programs=2)
    unsettled = torch.tensor([0, 0, 1, 2, 3, 0], device=device)
    space = scratch(device, decode_attention_parts(*q.shape, table.shape[1] * 16, config))
    arguments = q, pool[0], pool[1], table, positions, lens, 0.25, got
    attention_triton.decode_attention(*arguments, config=config, unsettled=unsettled, early=EARLY, **space)
    assert_close(got, want, BOUND[dtype])
    assert at_rest(space)


def test_padding_attends_to_nothing(device, draw):
    q, pool, table, positions, lens = paged_case(draw, device, [20], 2, 2, 1, 16, 16, torch.float32)
    positions[1] = -1
    config = DecodeAttentionConfig(split=16, block_n=16)
    want, got = torch.empty_like(q), torch.empty_like(q)
    attention_reference.decode_attention(q, pool[0], pool[1], table, positions, lens, 0.25, want)
    attention_triton.decode_attention(q, pool[0], pool[1], table, positions, lens, 0.25, got, config=config, **scratch(device))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not got[1].any()


class Layer(NamedTuple):
    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


SHAPE = DecodeShape(hidden=72, heads=4, kv_heads=2, head_dim=16, intermediate=100, vocab=300, eps=1e-5)
PLANS = {
    "matrix": DecodePlan(
        TILES["slices"],
        TILES["slices"],
        TILES["slices"],
        TILES["split"],
        TILES["slices"],
        DecodeAttentionConfig(split=16, block_n=16, whole_block=False),
        early=EARLY,
    ),
    "scalar": DecodePlan(
        TILES["scalar"],
        TILES["scalar"],
        TILES["scalar"],
        TILES["scalar-split"],
        TILES["scalar"],
        DecodeAttentionConfig(split=16, block_n=16),
        early=EARLY,
    ),
}


def small_model(draw, device, dtype, qk_norm, s=SHAPE, num_layers=2):

    def matrix(rows, width):
        return draw(rows, width, dtype=dtype) / width**0.5

    layers = [
        Layer(
            1 + draw(s.hidden, dtype=dtype) / 8,
            matrix(s.qkv_rows, s.hidden),
            draw(s.qkv_rows, dtype=dtype),
            draw(2, s.head_dim, dtype=dtype) if qk_norm else None,
            matrix(s.hidden, s.heads * s.head_dim),
            None,
            1 + draw(s.hidden, dtype=dtype) / 8,
            matrix(2 * s.intermediate, s.hidden),
            matrix(s.hidden, s.intermediate),
        )
        for _ in range(num_layers)
    ]
    pages = [tuple(draw(2, 12, 8, s.kv_heads, s.head_dim, dtype=dtype)) for _ in layers]
    angle = torch.arange(90, device=device)[:, None] * 0.6 ** torch.arange(s.head_dim // 2, device=device)
    final_norm, tables = 1 + draw(s.hidden, dtype=dtype) / 8, (angle.cos(), angle.sin())
    return DecodeWeights(layers, pages, matrix(s.vocab, s.hidden), final_norm, matrix(s.vocab, s.hidden), *tables)


def fill(buffers, contexts, length):
    """Inputs of a step: a request's new tokens stand at the end of its context."""
    device = buffers.stream.device
    positions = torch.cat([torch.arange(c - length, c) for c in contexts])
    table = torch.arange(buffers.page_table.numel(), dtype=torch.int32).view(buffers.page_table.shape)
    requests = torch.arange(len(contexts)).repeat_interleave(length)
    buffers.token_ids.copy_(torch.arange(len(positions)) * 37 % SHAPE.vocab)
    buffers.positions.copy_(positions)
    buffers.slots.copy_(table[requests, positions // 8].long() * 8 + positions % 8)
    buffers.page_table.copy_(table)
    buffers.context_lens.copy_(torch.tensor(contexts, dtype=torch.int32))
    return device


def step(module, weights, buffers):
    module.decode_embed(weights, buffers)
    module.decode_layers(weights, buffers, SHAPE, range(0, 1))
    module.decode_layers(weights, buffers, SHAPE, range(1, 2))
    module.decode_head(weights, buffers, SHAPE)


@pytest.mark.parametrize("dtype,shape,qk_norm", in_turn(DTYPES, [("matrix", [33, 5], 3), ("scalar", [20], 1), ("matrix", [40], 1)]))
def test_a_step_matches_its_twin(shape, qk_norm, dtype, device, draw, assert_close):
    plan, contexts, length = shape
    weights = small_model(draw, device, dtype, qk_norm)
    results = []
    for module in (step_triton, step_reference):
        pages = [tuple(x.clone() for x in pair) for pair in weights.pages]
        own = weights._replace(pages=pages)
        buffers = DecodeBuffers.allocate(SHAPE, len(contexts), length, 6, 8, dtype=dtype, device=device, plan=PLANS[plan])
        for tensor in (
            buffers.stream,
            buffers.scaled,
            buffers.squares,
            buffers.queries,
            buffers.attended,
            buffers.gated,
            buffers.logits,
            buffers.part,
        ):
            tensor.fill_(float("nan"))
        fill(buffers, contexts, length)
        step(module, own, buffers)
        results.append((buffers.stream, buffers.logits, torch.stack([torch.stack(pair) for pair in pages])))
        assert not buffers.tickets.any()
    for got, want in zip(*results, strict=True):
        assert_close(got, want, 3 * BOUND[dtype])


@pytest.mark.parametrize("batch,length", [(1, 1), (1, 3), (2, 4), (8, 3), (32, 3), (32, 5)])
def test_the_plans_match_the_twin(batch, length, device, draw, assert_close):
    """A draft head's layer with heads of 128 channels, queries in groups and biases, at the numbers of rows that drafting and verification run."""
    shape, dtype = DecodeShape(hidden=200, heads=3, kv_heads=1, head_dim=128, intermediate=280, vocab=330, eps=1e-6), torch.bfloat16
    weights, results = small_model(draw, device, dtype, False, shape, 1), []
    plan = dataclasses.replace(choose_plan(shape, batch * length, batch=batch), early=EARLY)
    table = torch.arange(batch, dtype=torch.int32)[:, None] % 12
    for module in (step_triton, step_reference):
        pages = [tuple(x.clone() for x in pair) for pair in weights.pages]
        buffers = DecodeBuffers.allocate(shape, batch, length, 1, 8, dtype=dtype, device=device, plan=plan)
        positions = torch.arange(8 - length, 8).repeat(batch)
        buffers.stream.copy_(weights.embedding[torch.arange(batch * length) * 37 % shape.vocab])
        buffers.positions.copy_(positions)
        # requests beyond the pool's pages read others' and write nothing
        slots = torch.where(torch.arange(batch).repeat_interleave(length) < 12, table[:, 0].repeat_interleave(length) * 8 + positions, -1)
        buffers.slots.copy_(slots)
        buffers.page_table.copy_(table)
        buffers.context_lens.fill_(8)
        own = weights._replace(pages=pages)
        module.decode_embed(own, buffers, embed=False)
        module.decode_layers(own, buffers, shape)
        module.decode_head(own, buffers, shape)
        results.append((buffers.stream, buffers.logits, torch.stack(list(pages[0]))))
        assert bool((buffers.next_tokens == buffers.logits.argmax(1)).all())
    rows = min(batch, 12) * length  # the others' keys are written meanwhile
    for number, (got, want) in enumerate(zip(*results, strict=True)):
        assert_close(got if number == 2 else got[:rows], want if number == 2 else want[:rows], 3 * BOUND[dtype])


def test_the_twin_is_a_llama_layer(device, draw, assert_close):
    """The step's arithmetic, normalisation in two parts included, against the textbook's order of operations."""
    weights = small_model(draw, device, torch.float32, False)
    buffers = DecodeBuffers.allocate(SHAPE, 1, 9, 6, 8, dtype=torch.float32, device=device, plan=PLANS["matrix"])
    fill(buffers, [9], 9)
    step(step_reference, weights, buffers)
    s, x = SHAPE, weights.embedding[buffers.token_ids]
    cos, sin = (t[:9].repeat(1, 2)[:, None] for t in (weights.cos, weights.sin))

    def turn(y):
        low, high = y.chunk(2, -1)
        return y * cos + torch.cat((-high, low), -1) * sin

    for w in weights.layers:
        qkv = F.linear(F.rms_norm(x, (s.hidden,), w.input_norm, s.eps), w.qkv, w.qkv_bias).unflatten(1, (-1, s.head_dim))
        q, k, v = qkv.split((s.heads, s.kv_heads, s.kv_heads), 1)
        q, k, v = (y.transpose(0, 1).repeat_interleave(s.heads // y.shape[1], 0) for y in (turn(q), turn(k), v))
        x = x + F.linear(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1), w.o)
        gate, up = F.linear(F.rms_norm(x, (s.hidden,), w.post_norm, s.eps), w.gate_up).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, w.down)
    logits = F.linear(F.rms_norm(x, (s.hidden,), weights.final_norm, s.eps), weights.head)
    assert_close(buffers.stream, x, 1e-5)
    assert_close(buffers.logits, logits, 1e-5)
    assert torch.equal(buffers.next_tokens, logits.argmax(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
def test_a_token_has_the_same_bits_alone_and_in_a_block(dtype, device, draw):
    weights = small_model(draw, device, dtype, False)
    alone = DecodeBuffers.allocate(SHAPE, 1, 1, 6, 8, dtype=dtype, device=device, plan=PLANS["matrix"])
    block = DecodeBuffers.allocate(SHAPE, 2, 4, 6, 8, dtype=dtype, device=device, plan=PLANS["matrix"])
    fill(block, [30, 21], 4)
    step(step_triton, weights, block)
    for row in (0, 3):
        fill(alone, [27 + row], 1)
        alone.token_ids.copy_(block.token_ids[row : row + 1])
        step(step_triton, weights, alone)
        assert torch.equal(alone.logits[0], block.logits[row])


def test_layers_in_pieces_give_the_same_bits(device, draw):
    """An early exit runs the first layers, and verification goes on from their states."""
    weights = small_model(draw, device, torch.bfloat16, False)
    plan = dataclasses.replace(PLANS["matrix"], in_pieces=True)
    whole, first, rest = (DecodeBuffers.allocate(SHAPE, 1, n, 6, 8, dtype=torch.bfloat16, device=device, plan=plan) for n in (1, 1, 1))
    for buffers in (whole, first, rest):
        fill(buffers, [20], 1)
    step(step_triton, weights, whole)
    step_triton.decode_embed(weights, first)
    step_triton.decode_layers(weights, first, SHAPE, range(1))
    rest.stream.copy_(first.stream)
    step_triton.decode_embed(weights, rest, first_layer=1, embed=False)
    step_triton.decode_layers(weights, rest, SHAPE, range(1, len(weights.layers)))
    step_triton.decode_head(weights, rest, SHAPE)
    assert torch.equal(rest.stream, whole.stream) and torch.equal(rest.logits, whole.logits)


def test_plans_suit_heads_of_all_sizes():
    for head_dim in (16, 48, 64, 80, 128):
        shape = DecodeShape(64, 4, 2, head_dim, 100, 300)
        for rows in (1, 5, 32, 40, 100):
            assert head_dim % choose_plan(shape, rows).qkv.block_n == 0
    assert choose_plan(shape, 1, deterministic=True) == choose_plan(shape, 8, deterministic=True)
    with pytest.raises(ValueError, match="up to 8 rows"):
        choose_plan(shape, 9, deterministic=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_is_captured_and_replayed(device, draw):
    weights = small_model(draw, device, torch.bfloat16, True)
    buffers = DecodeBuffers.allocate(SHAPE, 2, 2, 6, 8, dtype=torch.bfloat16, device=device, plan=PLANS["matrix"])
    fill(buffers, [9, 4], 2)
    step(step_triton, weights, buffers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(step_triton, weights, buffers)
    for contexts in ([12, 40], [33, 2]):
        fill(buffers, contexts, 2)
        graph.replay()
        got = buffers.logits.clone()
        step(step_triton, weights, buffers)
        assert torch.equal(got, buffers.logits)
