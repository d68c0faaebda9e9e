"""Layers with a window keep pages of their own, which they give back: the same numbers as with all pages, in memory that stops growing."""

from __future__ import annotations

import random

import pytest
import torch

from bench.interpreter import compute_like_hardware
from draft.tree import Leaf, block_positions, leaf_slot
from engine.config import EngineConfig
from engine.errors import PagesNotReserved, PoolExhausted
from engine.kv.pool import LayerAngles, PagedPool
from engine.kv.quantized_pool import QuantizedPool
from engine.kv.windowed_pool import REWIND_TOKENS, WindowedPool, WindowGroup
from engine.model.decoder import Decoder, forward_reserved
from engine.runtime.memory import DeviceMemory, open_pool, plan_memory, step_tokens, token_bytes, window_layers
from kernels.dispatch import triton_importable

WINDOWED = ("mistral-window", "qwen2-window", "gemma2", "gemma3")
DIM, SIZE, WINDOW = 32, 8, 10
LAYERS = {"main": (1,), "windowed": (0, 2)}


def pool_of(decoder, kind="bf16", pages=64, page_size=16, step=40):
    """As an engine opens it."""
    config = EngineConfig(page_size=page_size, prefill_chunk=step)
    c = decoder.config
    means = torch.randn(c.num_layers, 2, c.num_kv_heads, c.head_dim, generator=torch.Generator().manual_seed(2))
    windows = window_layers(decoder, config)
    return open_pool(decoder, kind, pages, page_size, pages, means=means, windows=windows, step_tokens=step_tokens(decoder, config))


def held(sequence):
    return [len(window.pages) for window in sequence.windows]


@pytest.mark.parametrize("family", WINDOWED)
@torch.inference_mode()
def test_logits_are_transformers_and_pages_stop_growing(tiny_model, family):
    """In ragged blocks, of several texts at once, far beyond the windows; drafts that are refused leave nothing behind."""
    model = tiny_model(family)
    pool, generator = pool_of(model.decoder), torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 97, (length,), generator=generator) for length in (450, 300)]
    want = [model.logits(text) for text in texts]
    sequences, draw = [pool.new_sequence() for _ in texts], random.Random(3)
    for sequence in sequences:
        assert held(sequence) == [0] * len(pool.windowed) and len(pool.windowed) == 1
    most = 0
    while running := [n for n, text in enumerate(texts) if sequences[n].length < len(text)]:
        counts = [min(draw.choice([1, 1, 2, 7, 40]), len(texts[n]) - sequences[n].length) for n in running]
        own = [sequences[n] for n in running]
        refused = torch.full((3 * len(own),), 96)
        forward_reserved(model.decoder, refused, own, [3] * len(own))  # never committed
        blocks = [texts[n][sequences[n].length :][:count] for n, count in zip(running, counts, strict=True)]
        found = forward_reserved(model.decoder, torch.cat(blocks), own, counts).logits.split(counts)
        for n, sequence, count, logits in zip(running, own, counts, found, strict=True):
            assert (logits - want[n][sequence.length :][:count]).abs().max() < 1e-4
            sequence.advance(count)
        pool.check_integrity()
        most = max(most, *(pages for sequence in sequences for pages in held(sequence)))
    window = pool.windowed[0].window
    assert most <= -(-(window + REWIND_TOKENS + 16 + 40) // 16) + 1 <= sequences[0].windows[0].most_pages < 450 // 16
    for sequence in sequences:
        assert len(sequence.pages) == -(-sequence.length // 16), "the other layers keep all"
        sequence.free()
    assert all(own.num_free_pages == own.max_pages for own in pool.groups)


@pytest.mark.parametrize("kind", ["bf16", "q4"])
@pytest.mark.parametrize("family", ["mistral-window", "gemma3"])
@torch.inference_mode()
def test_the_same_bits_as_with_all_pages_in_deterministic_mode(tiny_model, family, kind):
    decoder = tiny_model(family, head_dim=32).decoder
    c, ids = decoder.config, torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(1))
    means = torch.randn(c.num_layers, 2, c.num_kv_heads, c.head_dim, generator=torch.Generator().manual_seed(2))

    def logits(pool, sizes):
        sequence, rows = pool.new_sequence(), []
        for block in ids.split(sizes):
            rows.append(forward_reserved(decoder, block, [sequence], [len(block)], deterministic=True).logits)
            sequence.advance(len(block))
        pool.check_integrity()
        return torch.cat(rows)

    want = logits(open_pool(decoder, kind, 24, 16, 24, means=means), [300])
    windowed = pool_of(decoder, kind, 24, step=150)
    assert isinstance(windowed, WindowedPool)
    assert torch.equal(logits(windowed, [150, 1, 9, 64, 76]), want)


@torch.inference_mode()
def test_draft_trees_across_the_edge_of_a_window(tiny_model):
    """Leaves stand behind their positions; an accepted one is moved, in all layers."""
    model = tiny_model("gemma3")
    pool, ids = pool_of(model.decoder), torch.randint(0, 97, (260,), generator=torch.Generator().manual_seed(4))
    want, sequence = model.logits(ids), pool.new_sequence()
    forward_reserved(model.decoder, ids[:40], [sequence], [40])
    sequence.advance(40)
    while sequence.length + 4 < len(ids):
        at = sequence.length
        # the pending token, a right draft, a wrong one, and the right one beside it as a leaf
        block = torch.stack([ids[at], ids[at + 1], (ids[at + 2] + 1) % 97, ids[at + 2]])
        places = block_positions(at + 1, 2, [Leaf(2, int(ids[at + 2]))])
        out = forward_reserved(model.decoder, block, [sequence], [4], tree_positions=[places]).logits
        assert (out[[0, 1, 3]] - want[at : at + 3]).abs().max() < 1e-4
        pool.move(sequence, leaf_slot(at + 1, 0), at + 2)
        sequence.advance(3)
    pool.check_integrity()
    assert sequence.windows[0].first_page > 0


# --- who owns what --------------------------------------------------------------------------------------------------------

BANK = torch.randn(9, 3, 2, 1, DIM, generator=torch.Generator().manual_seed(7))


def small_pool(kind, pages, max_pages=None, step=14):
    def part(layers):
        if kind == "bf16":
            return PagedPool(len(layers), 1, DIM, pages, SIZE, dtype=torch.float32, device="cpu", max_pages=max_pages)
        means = torch.randn(3, 2, 1, DIM, generator=torch.Generator().manual_seed(2))[list(layers)]
        return QuantizedPool(4, means, pages, SIZE, dtype=torch.float32, max_pages=max_pages)

    group = WindowGroup(WINDOW, LAYERS["windowed"], part(LAYERS["windowed"]))
    return WindowedPool(LAYERS["main"], part(LAYERS["main"]), [group], 1, DIM, step)


def still(count):
    return LayerAngles(((torch.ones(count, DIM // 2), torch.zeros(count, DIM // 2)),), (0,) * 3)


def write(sequence, start, numbers):
    sequence.check_writable(start, start + len(numbers))
    sequence.pool.write(sequence, start, BANK[numbers].clone(), 0, still(len(numbers)))


def check_contents(sequence, rows):
    """All rows of the main layer, and those that the windowed ones hold; the others read as zeros."""
    found = sequence.pool.read(sequence, 0, sequence.length, 0, still(sequence.length))
    first = sequence.held_from(0)
    assert torch.equal(found[:, 1], BANK[rows][:, 1])
    windowed = BANK[rows][:, [0, 2]].clone()
    windowed[:first] = 0
    assert torch.equal(found[:, [0, 2]], windowed)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_use_agrees_with_lists_of_rows(seed, monkeypatch):
    """Write, refuse drafts, cut, fork, keep ends for others and begin with them, free in any order, and run out of pages."""
    monkeypatch.setattr("engine.kv.windowed_pool.REWIND_TOKENS", 12)
    draw, pool = random.Random(seed), small_pool("bf16", 10, 36)
    sequences, rows = [pool.new_sequence()], [[]]
    ends = []

    def give_up(asked, count):
        wanted = asked.num_unowned_pages + count
        while ends and asked.num_unowned_pages < wanted:
            pages, beside, _ = ends.pop(0)
            pool.drop(pages)
            pool.drop_beside(beside)

    for own in pool.groups:
        own.reclaim = give_up
    exhausted = lost = resumed = 0
    for _ in range(400):
        which = draw.randrange(len(sequences))
        sequence, own, action = sequences[which], rows[which], draw.choice("wwwwwwwrtfke.")
        if action == "w":
            new = [draw.randrange(len(BANK) - 1) for _ in range(draw.randrange(1, 15))]
            before = [(list(s.pages), s.length) for s in (sequence, *sequence.windows)]
            try:
                sequence.reserve(len(new))
            except PoolExhausted:
                exhausted += 1
                assert [(list(s.pages), s.length) for s in (sequence, *sequence.windows)] == before
            else:
                write(sequence, sequence.length, new)
                sequence.advance(len(new))
                own += new
        elif action == "r":
            try:
                sequence.reserve(5)
            except PoolExhausted:
                continue
            write(sequence, sequence.length, [len(BANK) - 1] * 5)  # never committed
        elif action == "t" and own:
            length = max(0, len(own) - draw.choice([1, 3, 9, 20, 40]))
            sees = sequence.sees(length)
            sequence.truncate(length)
            assert sequence.length == (length if sees else 0)
            lost += not sees
            del own[sequence.length :]
        elif action == "f" and len(sequences) < 6:
            length = draw.randrange(len(own) + 1)
            copy = sequence.fork(length)
            assert copy.length == (length if sequence.sees(length) else 0)
            sequences.append(copy)
            rows.append(own[: copy.length])
        elif action == "k" and len(own) >= SIZE:
            length = len(own) // SIZE * SIZE
            if (beside := pool.beside(sequence, length)) is not None:
                pages = sequence.pages[: length // SIZE]
                pool.keep(pages)
                pool.keep_beside(beside)
                ends.append((pages, beside, own[:length]))
        elif action == "e" and ends and len(sequences) < 6:
            pages, beside, numbers = draw.choice(ends)
            copy = pool.new_sequence()
            copy.share(pages, len(numbers))
            pool.restore_beside(copy, beside)
            resumed += 1
            sequences.append(copy)
            rows.append(list(numbers))
        elif action == "." and len(sequences) > 1:
            sequences.pop(which).free()
            rows.pop(which)
        pool.check_integrity()
        for other, numbers in zip(sequences, rows, strict=True):
            check_contents(other, numbers)
    assert exhausted and lost and resumed, "the walk must meet what it is about"
    for sequence in sequences:
        sequence.free()
    give_up(pool, 36)
    pool.check_integrity()
    assert all(own.num_free_pages == own.max_pages == 36 for own in pool.groups)


def test_so_much_can_be_taken_back():
    pool = small_pool("bf16", 64)
    sequence = pool.new_sequence()
    for _ in range(30):
        sequence.reserve(10)
        sequence.advance(10)
    window = sequence.windows[0]
    first = 300 + 1 - WINDOW - REWIND_TOKENS - SIZE
    assert window.first_token == first and window.first_page == first // SIZE and not sequence.sees(first)
    assert sequence.sees(first + WINDOW - 1) and not sequence.sees(first + WINDOW - 2)
    assert sequence.sees(300 - REWIND_TOKENS), "so much can be taken back"
    sequence.truncate(300 - REWIND_TOKENS)
    assert sequence.length == 300 - REWIND_TOKENS
    sequence.truncate(40)
    assert sequence.length == 0 and sequence.sees(0) and not window.pages


@torch.inference_mode()
def test_a_forward_that_would_attend_to_it_is_refused(tiny_model):
    decoder = tiny_model("gemma3").decoder
    sequence = pool_of(decoder).new_sequence()
    ids = torch.arange(3, 93)
    for _ in range(4):
        forward_reserved(decoder, ids, [sequence], [90])
        sequence.advance(90)
    with pytest.raises(PagesNotReserved, match="hold no longer what a token at 5 attends to"):
        decoder.forward(ids[:2], [sequence], [2], starts=[5])


@pytest.mark.skipif(
    not triton_importable() or torch.cuda.is_available(), reason="needs Triton's interpreter, which a GPU's process has not"
)
@pytest.mark.parametrize("kind", ["bf16", "q4"])
@torch.inference_mode()
def test_interpreted_kernels_read_the_windows_pages(tiny_model, kind, monkeypatch):
    """Pages that nobody owns hold NaN: a kernel that read one would show it."""
    compute_like_hardware()
    decoder: Decoder = tiny_model("mistral-window", head_dim=32, num_hidden_layers=2).decoder
    ids = torch.randint(0, 97, (230,), generator=torch.Generator().manual_seed(1))

    def run(kernels):
        monkeypatch.setenv("FORETOLD_KERNELS", kernels)
        pool = pool_of(decoder, kind, 40)
        sequences = [pool.new_sequence() for _ in range(2)]
        for sequence, count in zip(sequences, (200, 30), strict=True):
            for block in ids[:count].split(40):
                forward_reserved(decoder, block, [sequence], [len(block)])
                sequence.advance(len(block))
        for group in pool.windowed:
            free = [page for page in range(group.pool.num_pages) if group.pool.is_free(page)]
            if kind == "bf16":
                group.pool.kv[:, :, free] = float("nan")
        rows = [forward_reserved(decoder, ids[200:205], sequences, [2, 3]).logits]
        assert sequences[0].windows[0].first_page > 0
        return torch.cat(rows)

    want, got = run("reference"), run("triton")
    assert (want - got).norm() < 2e-2 * want.norm()


# --- how memory is shared out ---------------------------------------------------------------------------------------------


def test_a_gpus_windowed_layers_get_what_running_requests_need(tiny_model):
    """The rest goes to the layers that keep all; without such layers pages cost nothing else, and requests are bounded by the context."""
    gib = 1 << 30
    for family in ("gemma3", "mistral-window"):
        decoder = tiny_model(family, max_position_embeddings=1 << 15).decoder
        config = EngineConfig(max_batch=4, prefill_chunk=256)
        memory = DeviceMemory(gib, gib)
        plan = plan_memory(decoder, None, config, memory, captures=False)
        [(window, tokens, size)] = plan.windows
        [own] = window_layers(decoder, config)
        width = decoder.config.kv_width * 4
        assert window == own.window and tokens == own.most_tokens and size == tokens * len(own.layers) * width
        rest = decoder.config.num_layers - len(own.layers)
        assert plan.pools_bytes == size + plan.pool_tokens * rest * width
        if rest:
            left = gib * 0.9 - plan.workspace_bytes
            assert left - rest * width < plan.pools_bytes <= left
            assert plan.pool_tokens > 2 * left / token_bytes(decoder, None), "three layers in place of one"
        else:
            assert plan.pool_tokens == 4 << 15
        assert f"windows of {window}: {tokens} tokens" in str(plan)
        few = plan_memory(decoder, None, EngineConfig(max_batch=4, pool_tokens=640), memory, captures=False)
        assert few.windows[0][1] == 640 and few.pools_bytes == 640 * token_bytes(decoder, None)
        # running requests' own first, and of the ends that are kept for later ones as many as the other layers' pages can go with
        assert [own.pool_tokens(n) for n in (640, 1 << 13, 1 << 16, 1 << 20)] == [
            640,
            own.running_tokens + (1 << 11),
            own.running_tokens + min(own.cached_tokens, 1 << 14),
            own.most_tokens,
        ]


def test_windows_as_long_as_the_context_are_no_windows(tiny_model):
    assert window_layers(tiny_model("gemma3", sliding_window=480).decoder, EngineConfig()) == ()
    assert isinstance(pool_of(tiny_model("gemma3", sliding_window=480).decoder), PagedPool)
