"""Attention backends: the same numbers whichever of them runs, planned afresh or replayed over tensors that stay where they are."""

from __future__ import annotations

import pytest
import torch

from draft.tree import Leaf, TreePosition, block_positions
from engine.errors import InvalidOption
from engine.kv.quantized_pool import QuantizedPool
from engine.model.attention import AttentionBatch, DeviceBatch, QuantizedBackend, ReferenceBackend, TritonBackend, open_backend
from engine.model.decoder import forward_reserved
from engine.model.layers import FAST, dense_attention, layer_forward, rope_of
from kernels.paged_attention.reference import TREE_SPAN

KINDS = [ReferenceBackend, TritonBackend, QuantizedBackend]


@pytest.fixture(scope="module")
def decoder(random_decoder):
    return random_decoder(0, head_dim=32)


def pool_of(decoder, kind):
    c = decoder.config
    if kind is QuantizedBackend:
        return QuantizedPool(4, torch.zeros(c.num_layers, 2, c.num_kv_heads, c.head_dim), 12, 8, dtype=torch.float32)
    return decoder.new_pool(12, 8)


def random_ids(*shape, seed=0):
    return torch.randint(0, 90, shape, generator=torch.Generator().manual_seed(seed))


def prompted(decoder, kind, lengths):
    """A pool of the backend's kind and a sequence for each length, filled with the same tokens every time."""
    pool = pool_of(decoder, kind)
    sequences = [pool.new_sequence() for _ in lengths]
    for number, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        if length:
            forward_reserved(decoder, random_ids(length, seed=number), [sequence], [length])
            sequence.advance(length)
    return pool, sequences


def static_tensors(backend):
    found = [backend.batch.slots, backend.batch.page_table, backend.batch.context_lens, backend.batch.angles[0][0]]
    if isinstance(backend, QuantizedBackend):
        found += [backend._exact.rows, backend._exact.since, backend._exact.sinks[1], backend._exact.recent[1]]
    return found


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_replayed_steps_equal_planned_ones(decoder, kind):
    """Two requests and, as padding, a scratch sequence that takes the places of a third; the first request's first tokens are exact ones."""
    pool, sequences = prompted(decoder, kind, [2, 19])
    _, expected = prompted(decoder, kind, [2, 19])
    scratch = pool.new_sequence()
    backend = kind(pool, decoder.config, decoder.rope, deterministic=False)
    backend.prepare_for_capture(num_requests=3, num_rows=6, max_query_len=4, max_context=40)
    before = [] if kind is ReferenceBackend else [t.data_ptr() for t in static_tensors(backend)]
    for step, counts in enumerate([(2, 3), (1, 1), (1, 4), (3, 1)]):
        ids = random_ids(6, seed=9 + step)
        rest = 6 - sum(counts)
        batch = AttentionBatch([*sequences, scratch], [*counts, rest], [s.length for s in sequences] + [0])
        reserve(batch)
        backend.prepare_for_replay(batch)
        got = decoder.decode(ids, backend)[: sum(counts)]
        want = forward_reserved(decoder, ids[: sum(counts)], expected, list(counts)).logits
        assert torch.allclose(got, want, atol=1e-5)
        for sequence, other, count in zip(sequences, expected, counts, strict=True):
            sequence.advance(count)
            other.advance(count)
    if before:
        assert [t.data_ptr() for t in static_tensors(backend)] == before
    for sequence, other in zip(sequences, expected, strict=True):
        assert torch.allclose(decoder.read_kv(sequence, 0, sequence.length), decoder.read_kv(other, 0, other.length), atol=1e-5)
    pool.check_integrity()


@pytest.mark.parametrize("kind", KINDS)
def test_replays_of_other_sizes_are_refused(decoder, kind):
    pool, sequences = prompted(decoder, kind, [3, 5])
    backend = kind(pool, decoder.config, decoder.rope, deterministic=False)
    backend.prepare_for_capture(num_requests=2, num_rows=3, max_query_len=2, max_context=16)
    for lens, starts, what in [
        ([1, 1], [3, 5], "2 requests of 2 new tokens"),
        ([3, 0], [3, 5], "longer than the step"),
        ([2, 1], [3, 16], "longer than the step"),
    ]:
        with pytest.raises(InvalidOption, match=what):
            backend.prepare_for_replay(AttentionBatch(sequences, lens, starts))
    with pytest.raises(InvalidOption, match="1 requests of 3"):
        backend.prepare_for_replay(AttentionBatch(sequences[:1], [3], [3]))
    with pytest.raises(InvalidOption, match="takes no tree_positions"):
        backend.prepare_for_replay(AttentionBatch(sequences, [1, 2], [3, 5], [TreePosition([3], [3]), TreePosition([5, 5], [5, 6])]))


def reserve(batch):
    for sequence, start, context in zip(batch.sequences, batch.starts, batch.contexts, strict=True):
        sequence.ensure(context, start)


@torch.inference_mode()
def test_a_plan_allocates_nothing(decoder):
    pool, (sequence,) = prompted(decoder, ReferenceBackend, [8])
    free = pool.num_free_pages
    for kind in (ReferenceBackend, TritonBackend):
        with pytest.raises(AssertionError, match="pages are owned"):
            kind(pool, decoder.config, decoder.rope).plan(AttentionBatch([sequence], [1], [8]))
    assert pool.num_free_pages == free and sequence.length == sequence.capacity == 8


@torch.inference_mode()
def test_every_backend_sees_the_same_tree(decoder):
    """A block with leaves beside its drafts, in a batch with one that has none."""
    _, sequences = prompted(decoder, ReferenceBackend, [6, 9])
    leaves = [Leaf(1, 40), Leaf(2, 41), Leaf(2, 42)]
    tree_positions = [block_positions(7, 2, leaves), block_positions(10, 3, [])]
    counts, ids = [6, 4], random_ids(10, seed=3)
    batch = AttentionBatch(sequences, counts, [6, 9], tree_positions)
    reserve(batch)
    found = []
    for kind in (ReferenceBackend, TritonBackend):
        backend = kind(sequences[0].pool, decoder.config, decoder.rope)
        backend.plan(batch)
        found.append(decoder.decode(ids, backend))
    assert torch.allclose(found[0], found[1], atol=1e-5)
    visible, windows = batch.tree()
    # a leaf sees what stands before its position, and itself: behind the longest chain
    assert windows == [6, 7, 8, 7, 8, 8, 9, 10, 11, 12]
    assert visible == [1, 1, 1, 1 << 12, 1 << 12, 1 << 13, 1, 1, 1, 1]


def test_trees_wider_than_their_masks_are_refused(decoder):
    sequence = decoder.new_pool(12, 8).new_sequence()
    wide = TreePosition([0, 0], [0, TREE_SPAN])
    with pytest.raises(InvalidOption, match=f"0 to {TREE_SPAN} behind"):
        forward_reserved(decoder, torch.tensor([1, 2]), [sequence], [2], tree_positions=[wide])
    with pytest.raises(InvalidOption, match="-1 to 0 behind"):
        forward_reserved(decoder, torch.tensor([1, 2]), [sequence], [2], tree_positions=[TreePosition([0, 1], [0, 0])])
    edge = forward_reserved(decoder, torch.tensor([1, 2]), [sequence], [2], tree_positions=[TreePosition([0, 0], [0, TREE_SPAN - 1])])
    alone = forward_reserved(decoder, torch.tensor([2]), [sequence], [1])
    assert torch.allclose(edge.logits[1], alone.logits[0], atol=1e-5)


@torch.inference_mode()
def test_chains_beside_a_tree_may_be_longer_than_a_mask(decoder):
    ids, count = random_ids(TREE_SPAN + 7), TREE_SPAN + 7
    pool = decoder.new_pool(40, 8)
    want = forward_reserved(decoder, ids, [pool.new_sequence()], [count]).logits
    for kind in (ReferenceBackend, TritonBackend):
        batch = AttentionBatch([pool.new_sequence()], [count], [0], [block_positions(1, count - 1, [])])
        reserve(batch)
        backend = kind(pool, decoder.config, decoder.rope)
        backend.plan(batch)
        assert torch.allclose(decoder.decode(ids, backend), want, atol=1e-5)


def test_pools_choose_their_backends(decoder, monkeypatch):
    for kind, forced in [(ReferenceBackend, ""), (TritonBackend, "triton"), (QuantizedBackend, "")]:
        monkeypatch.setenv("FORETOLD_KERNELS", forced)
        backend = open_backend(pool_of(decoder, kind), decoder.config, decoder.rope, deterministic=True)
        assert type(backend) is kind and backend.deterministic


def test_static_tensors_hold_the_longest_context(decoder):
    pool, (sequence,) = prompted(decoder, TritonBackend, [5])
    backend = TritonBackend(pool, decoder.config, decoder.rope)
    backend.prepare_for_capture(1, 1, 1, max_context=64)
    assert backend.batch.page_table.shape == (1, 8)
    backend.prepare_for_replay(AttentionBatch([sequence], [1], [5]))
    fresh = DeviceBatch.of(AttentionBatch([sequence], [1], [5]), [decoder.rope], decoder.device)
    assert torch.equal(backend.batch.page_table[:, :1], fresh.page_table) and torch.equal(backend.batch.slots, fresh.slots)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.inference_mode()
def test_the_layer_forward_is_the_decoders_with_any_attention(tiny_model, family):
    """Dense attention over a whole text gives what the decoder gets from its pages."""
    decoder = tiny_model(family).decoder
    count, shape = 12, decoder.layer_shapes[0]
    ids = random_ids(count)
    want = forward_reserved(decoder, ids, [decoder.new_pool(2, 8).new_sequence()], [count], taps=(0, 1, decoder.config.num_layers)).taps
    rope = rope_of(*decoder.rope.slice(0, count), shape.num_heads)
    stream, update = decoder.embed(ids), None
    for number, w in enumerate(decoder.layer_weights()):
        out = layer_forward(
            w.plain(), stream, rope, lambda q, k, v: dense_attention(q[None], k[None], v[None], shape)[0], shape, FAST, update
        )
        if number in want:
            assert torch.allclose(out.entered, want[number], atol=1e-5)
        stream, update = out.stream, out.update
    assert torch.allclose(stream + update, want[decoder.config.num_layers], atol=1e-5)


def test_slots_of_a_long_pass_are_those_of_its_list(decoder):
    """Worked out on the device, for requests whose pages do not follow one another."""
    pool = decoder.new_pool(120, 8)
    first, second = pool.new_sequence(), pool.new_sequence()
    for end in range(8, 409, 8):  # pages by turns
        first.ensure(end)
        second.ensure(end)
    batch = AttentionBatch([first, second], [401, 150], [3, 250])
    assert len(batch.slots) > 512 and len(set(batch.slots)) == 551
    assert batch.slots_on(pool.device).tolist() == batch.slots
