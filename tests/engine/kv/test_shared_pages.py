"""Sequences that share pages: nobody sees what another writes, pages go with their last owner, what is exact beside codes is each one's own."""

from __future__ import annotations

import random

import pytest
import torch

from bench.interpreter import compute_like_hardware
from engine.errors import PagesNotReserved, PoolExhausted
from engine.kv.pool import LayerAngles, PagedPool
from engine.kv.quantized_pool import QuantizedPool
from engine.model.decoder import Decoder, DecoderConfig, forward_reserved
from engine.model.rope import RopeConfig
from engine.runtime.model_runner import GraphedDecoder
from kernels.dispatch import triton_importable
from kernels.quantized_kv import FORMATS, NUM_SINKS

LAYERS, HEADS, DIM, SIZE = 2, 1, 32, 8
KINDS = ["bf16", *FORMATS]
SHAPE = {"hidden_size": 48, "head_dim": DIM, "num_attention_heads": 2, "num_key_value_heads": HEADS, "num_hidden_layers": LAYERS}
BANK = torch.randn(9, LAYERS, 2, HEADS, DIM, generator=torch.Generator().manual_seed(7))  # rows that are written; the last one is poison


def open_pool(kind, pages, max_pages=None):
    if kind == "bf16":
        return PagedPool(LAYERS, HEADS, DIM, pages, SIZE, dtype=torch.float32, device="cpu", max_pages=max_pages)
    means = torch.randn(LAYERS, 2, HEADS, DIM, generator=torch.Generator().manual_seed(2))
    return QuantizedPool(FORMATS[kind], means, pages, SIZE, dtype=torch.float32, max_pages=max_pages)


def still(count):
    """Angles of tokens that are not turned."""
    return LayerAngles(((torch.ones(count, DIM // 2), torch.zeros(count, DIM // 2)),), (0,) * LAYERS)


def write(sequence, start, numbers):
    """Write rows of BANK as tokens from `start` on, into pages that must have been reserved."""
    sequence.check_writable(start, start + len(numbers))
    sequence.pool.write(sequence, start, BANK[numbers].clone(), 0, still(len(numbers)))


def contents(sequence):
    return sequence.pool.read(sequence, 0, sequence.length, 0, still(sequence.length))


def readings(kind):
    """What each row of BANK reads as: among the first tokens, and later."""
    sequence = open_pool(kind, 4).new_sequence(NUM_SINKS + len(BANK))
    write(sequence, 0, [0] * NUM_SINKS + list(range(len(BANK))))
    sequence.advance(NUM_SINKS + len(BANK))
    return BANK, contents(sequence)[NUM_SINKS:]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_random_use_agrees_with_lists_of_rows(kind, seed):
    """Write, refuse drafts, cut, fork anywhere, free in any order, and run out of pages; a list of row numbers says what each sequence holds."""
    draw, pool = random.Random(seed), open_pool(kind, 4, 10)
    first, later = readings(kind)
    sequences, held = [pool.new_sequence()], [[]]
    exhausted = forks_inside = 0
    for _ in range(120):
        which = draw.randrange(len(sequences))
        sequence, rows, action = sequences[which], held[which], draw.choice("wwwrtff.")
        if action == "w":
            new = [draw.randrange(len(BANK) - 1) for _ in range(draw.randrange(1, 14))]
            before = list(sequence.pages), sequence.length, pool.num_free_pages
            try:
                sequence.reserve(len(new))
            except PoolExhausted:
                exhausted += 1
                assert (sequence.pages, sequence.length, pool.num_free_pages) == before
            else:
                write(sequence, sequence.length, new)
                sequence.advance(len(new))
                rows += new
        elif action == "r" and (spare := min(6, sequence.capacity - sequence.length)):
            try:
                sequence.reserve(spare)
            except PoolExhausted:
                continue
            write(sequence, sequence.length, [len(BANK) - 1] * spare)  # never committed
        elif action == "t":
            del rows[draw.randrange(len(rows) + 1) :]
            sequence.truncate(len(rows))
        elif action == "f" and len(sequences) < 5:
            length = draw.randrange(len(rows) + 1)
            forks_inside += length % SIZE > 0
            sequences.append(sequence.fork(length))
            held.append(rows[:length])
        elif action == "." and len(sequences) > 1:
            sequences.pop(which).free()
            held.pop(which)
        pool.check_integrity()
        for other, numbers in zip(sequences, held, strict=True):
            want = torch.cat([first[numbers[:NUM_SINKS]], later[numbers[NUM_SINKS:]]])
            assert torch.equal(contents(other), want)
    assert exhausted and forks_inside > 3, "the walk must meet what it is about"
    for sequence in sequences:
        sequence.free()
    pool.check_integrity()
    assert pool.num_free_pages == pool.max_pages == 10


@pytest.mark.parametrize("kind", KINDS)
def test_only_pages_that_are_written_are_copied(kind):
    pool = open_pool(kind, 16)
    pool.settle = lambda sequence: None  # on a CPU it would copy shared pages too, for a run of neighbours
    source = pool.new_sequence(20)
    write(source, 0, [1] * 20)
    source.advance(20)
    inside, border = source.fork(), source.fork(16)
    assert pool.num_free_pages == 13 and inside.pages == source.pages and border.pages == source.pages[:2]
    with pytest.raises(PagesNotReserved, match="another sequence owns too"):
        inside.check_writable(20, 21)
    inside.reserve(1)
    assert pool.num_free_pages == 12 and inside.pages[:2] == source.pages[:2] and inside.pages[2] != source.pages[2]
    border.reserve(1)  # a page of its own: nothing to copy
    assert pool.num_free_pages == 11 and border.pages[:2] == source.pages[:2]
    assert source.missing_pages(21) == 0, "its last page is its own again"
    assert source.missing_pages(21, 0) == 2
    source.ensure(21, 0)
    assert not {*source.pages} & {*inside.pages} and pool.num_free_pages == 9
    for sequence in (source, inside, border):
        sequence.free()
    assert pool.num_free_pages == 16
    pool.check_integrity()


def logits_after(decoder, sequence, ids):
    found = []
    for block in ids.split([1, 6, len(ids) - 7]):
        found.append(forward_reserved(decoder, block, [sequence], [len(block)], deterministic=True).logits)
        sequence.advance(len(block))
    return torch.cat(found)


@pytest.mark.parametrize("length", [40, 45], ids=["page border", "inside a page"])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_forks_go_on_as_if_alone(random_decoder, kind, length):
    """Bit by bit, with exact last tokens in reach; drafts that a sequence refuses stay unseen by the other."""
    decoder, generator = random_decoder(1, **SHAPE), torch.Generator().manual_seed(3)
    pool = open_pool(kind, 40)
    prompt, wrong = torch.randint(0, 97, (2, length), generator=generator)
    ends = torch.randint(0, 97, (2, 30), generator=generator)
    want = []
    for end in ends:
        alone = pool.new_sequence()
        forward_reserved(decoder, prompt, [alone], [length], deterministic=True)
        alone.advance(length)
        want.append(logits_after(decoder, alone, end))
        alone.free()
    source = pool.new_sequence()
    forward_reserved(decoder, prompt, [source], [length], deterministic=True)
    source.advance(length)
    forward_reserved(decoder, wrong[:20], [source], [20], deterministic=True)
    copy = source.fork()
    forward_reserved(decoder, wrong[20:38], [copy], [18], deterministic=True)
    assert torch.equal(logits_after(decoder, source, ends[0]), want[0])
    assert torch.equal(logits_after(decoder, copy, ends[1]), want[1])
    source.free()
    again = copy.fork(length)
    assert torch.equal(decoder.read_kv(again, 0, length), decoder.read_kv(copy, 0, length))
    pool.check_integrity()


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_forward_over_pages_that_are_not_reserved_is_refused(random_decoder, kind):
    decoder = random_decoder(1, **SHAPE)
    pool = open_pool(kind, 8)
    sequence, ids = pool.new_sequence(), torch.tensor([3, 4, 5])
    models = [decoder, GraphedDecoder(decoder, pool, capture=False)] if kind == "bf16" else [decoder]
    for model in models:
        with pytest.raises(PagesNotReserved, match="3 tokens do not fit the 0 pages"):
            model.forward(ids, [sequence], [3])
    sequence.reserve(3)
    decoder(ids, [sequence], [3])
    sequence.advance(3)
    fork = sequence.fork()
    for model in models:
        with pytest.raises(PagesNotReserved, match="tokens 3 to 6 lie in pages that another"):
            model.forward(ids, [fork], [3])
    with pytest.raises(PagesNotReserved):
        decoder.write_kv(fork, 0, torch.zeros(2, decoder.config.num_layers * decoder.config.kv_width))
    assert pool.num_free_pages == 7 and fork.length == 3


def test_a_full_pool_copies_nothing_and_changes_nothing():
    pool = open_pool("bf16", 2)
    source = pool.new_sequence(10)
    write(source, 0, [1] * 10)
    source.advance(10)
    fork = source.fork()
    with pytest.raises(PoolExhausted, match="needs 1 more"):
        fork.reserve(1)
    assert fork.pages == source.pages and torch.equal(contents(fork), contents(source))
    source.free()
    fork.reserve(1)  # now alone
    pool.check_integrity()


@pytest.mark.skipif(
    not triton_importable() or torch.cuda.is_available(), reason="needs Triton's interpreter, which a GPU's process has not"
)
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_interpreted_kernels_agree_over_shared_pages(kind, monkeypatch):
    compute_like_hardware()
    config = DecoderConfig("llama", 1, 48, 2, 1, 32, 64, 97, 1e-5, RopeConfig("default", 1e4), False, False, True, 512, (5,))
    decoder = Decoder.from_config(config, dtype=torch.float32, seed=1)
    for p in decoder.parameters():
        p.mul_(15.0 if p.dim() > 1 else 1.0)
    decoder.pack()
    ids = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(1))
    means = torch.randn(1, 2, 1, 32, generator=torch.Generator().manual_seed(2))

    def run(kernels):
        monkeypatch.setenv("FORETOLD_KERNELS", kernels)
        pool = decoder.new_pool(5, 8) if kind == "bf16" else QuantizedPool(FORMATS[kind], means, 5, 8, dtype=torch.float32)
        a = pool.new_sequence()
        forward_reserved(decoder, ids[:11], [a], [11])
        a.advance(11)
        b, c = a.fork(), a.fork(8)
        rows = [forward_reserved(decoder, ids[11:17], [a, b, c], [1, 2, 3]).logits]
        for sequence, count in ((a, 1), (b, 2), (c, 3)):
            sequence.advance(count)
        rows.append(forward_reserved(decoder, ids[17:21], [c, a, b], [1, 1, 2]).logits)
        assert a.pages[0] == b.pages[0] == c.pages[0] and len({a.pages[1], b.pages[1], c.pages[1]}) == 3
        pool.check_integrity()
        return torch.cat(rows)

    want, got = run("reference"), run("triton")
    assert (want - got).norm() < 2e-2 * want.norm()  # a code half way between two levels may fall to either side
