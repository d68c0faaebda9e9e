"""Known beginnings are shared instead of run: the same text, less work, nothing across namespaces, pages given up when they are needed."""

from __future__ import annotations

import dataclasses
import random
import types

import numpy as np
import pytest
import torch

from engine.engine import Engine
from engine.errors import NonFiniteLogits
from engine.kv import shared_prefixes
from engine.model.decoder import forward_reserved
from engine.runtime.drafters import load_draft_head
from engine.runtime.sampling import SamplingParams
from kernels.quantized_kv import FORMATS

SHAPE = {"num_hidden_layers": 3, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
STEM = [int(t) for t in torch.randint(3, 97, (70,), generator=torch.Generator().manual_seed(4))]
DRAFTS = ["none", "model", "exit", "head", "states"]
MODES = {"greedy": ({}, {}), "seed": ({}, {"seed": 7, "temperature": 0.8}), "deterministic": ({"deterministic": True}, {})}


@pytest.fixture
def engine_of(target, drafts, monkeypatch):
    """`engine_of(draft, **options)` -> an engine of small pages and chunks whose borders fall elsewhere than a prompt's pages."""
    means = torch.randn(3, 2, 1, 32, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr("engine.engine.channel_means", lambda *_: means)

    def make(draft="none", **options):
        return Engine(target, draft=drafts[draft], **({"page_size": 8, "pool_tokens": 2048, "prefill_chunk": 20} | options))

    return make


def hit_tokens(engine):
    return engine.core.shared_prefixes.metrics.hit_tokens


def check(engine):
    """All pages can be had, and all counts agree."""
    core = engine.core
    for pool in (core.pool, core.draft_pool):
        if pool is not None:
            pool.check_integrity()
            assert pool.num_free_pages == pool.max_pages
    core.shared_prefixes.trie.check_integrity()


@pytest.mark.parametrize(  # every draft in two modes, every mode with at least two drafts
    "draft,mode", [(draft, list(MODES)[(n + m) % 3]) for n, draft in enumerate(DRAFTS) for m in range(2)]
)
def test_text_is_the_same_with_and_without(engine_of, draft, mode):
    """A prompt again, a longer one, one that parts inside, one that goes on from an answer."""
    options, params = MODES[mode]
    params = SamplingParams(max_new_tokens=12, draft_length=0 if draft == "none" else 2, ignore_eos=True, **params)
    ours, plain = engine_of(draft, **options), engine_of(draft, prefix_sharing=False, **options)
    assert plain.core.shared_prefixes is None
    prompts = [STEM, STEM, [*STEM, 5, 6, 7], STEM[:50] + [9] * 12]
    answer = plain.generate(STEM, params)[0].token_ids
    prompts.append(STEM + answer + [11, 12])
    reused = []
    for prompt in prompts:
        got, want = ours.generate(prompt, params)[0], plain.generate(prompt, params)[0]
        assert got.token_ids == want.token_ids and want.reused_tokens == 0
        reused.append(got.reused_tokens)
        check(ours)
    # whole pages, at least one token left; the answer's pages are known too. Greedy text goes on from whole chunks of 20 that end with a page of 8
    greedy = mode == "greedy"
    assert reused == ([0, 40, 40, 40, 40] if greedy else [0, 64, 64, 48, 80]) and hit_tokens(ours) == sum(reused)
    batch = ours.generate(prompts, params)
    assert [r.token_ids for r in batch] == [r.token_ids for r in plain.generate(prompts, params)]
    assert [r.reused_tokens for r in batch] == ([40, 40, 40, 40, 80] if greedy else [64, 64, 72, 56, 80])


@pytest.mark.parametrize("draft", ["model", "head", "states"])
def test_the_drafts_pages_are_shared_too(engine_of, draft):
    engine = engine_of(draft)
    params = SamplingParams(max_new_tokens=12, draft_length=2, ignore_eos=True)
    engine.generate(STEM, params)
    seen = []
    share = engine.core.shared_prefixes.share

    def watched(token_ids, namespace, use, sequence, own, *more):
        found = share(token_ids, namespace, use, sequence, own, *more)
        seen.append((found.tokens, own.length))
        return found

    engine.core.shared_prefixes.share = watched
    engine.generate([*STEM, 4], params)
    assert seen == [(40, 40)]
    check(engine)


@pytest.mark.parametrize("params", [{"seed": 3}, {}], ids=["seed", "deterministic"])
@pytest.mark.parametrize("draft", ["none", "exit", "head"])
def test_promised_texts_go_on_from_the_same_bits(random_decoder, make_draft_head, tmp_path, draft, params):
    """In bf16 sums differ with a chunk's length; what a batch-invariant step wrote does not."""
    model = random_decoder(1, **SHAPE).to(torch.bfloat16).pack()
    source = load_draft_head(make_draft_head(tmp_path, model, exit_layer=1), model) if draft == "head" else {"none": None, "exit": 1}[draft]
    found = []
    for sharing in (True, False):
        options = {"page_size": 8, "pool_tokens": 2048, "prefill_chunk": 20, "prefix_sharing": sharing, "deterministic": not params}
        core = Engine(model, draft=source, **options).core
        one = SamplingParams(max_new_tokens=16, draft_length=0 if draft == "none" else 2, ignore_eos=True, **params)
        first, second = core.open_sequence_state(), core.open_sequence_state()
        texts = [core.run(first, STEM, one).token_ids]
        last = core.run(second, STEM[:61] + [8] * 9, one)
        assert last.reused_tokens == (56 if sharing else 0)
        texts.append(last.token_ids)
        found.append((texts, model.read_kv(second.sequence, 0, second.sequence.length)))
        core.pool.check_integrity()
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("draft", ["none", "exit", "head"])
def test_greedy_texts_go_on_from_the_same_bits(random_decoder, make_draft_head, tmp_path, draft):
    """Without a seed sums follow the chunks, so requests share whole ones, which ran alone in their pass beside whatever else was served."""
    model = random_decoder(1, **SHAPE).to(torch.bfloat16).pack()
    source = load_draft_head(make_draft_head(tmp_path, model, exit_layer=1), model) if draft == "head" else {"none": None, "exit": 1}[draft]
    one = SamplingParams(max_new_tokens=16, draft_length=0 if draft == "none" else 2, ignore_eos=True)
    found = []
    for sharing in (True, False):
        core = Engine(model, draft=source, page_size=8, pool_tokens=2048, prefill_chunk=16, prefix_sharing=sharing).core
        if sharing:  # first computed beside others, at other chunk borders of theirs
            drawn = dataclasses.replace(one, temperature=1.0)
            mixed = [(STEM[:45], drawn), (STEM, one), (STEM[:21], drawn), (STEM[:3], one)]
            requests = [core.submit(core.open_sequence_state(), ids, params, owns_cache=True) for ids, params in mixed]
            for request in requests:
                core.finish(request)
        texts, kv = [], []
        for prompt in (STEM, [*STEM, 9, 9], STEM[:50] + [8] * 9):
            state = core.open_sequence_state()
            result = core.run(state, prompt, one)
            assert result.reused_tokens == sharing * (len(prompt) // 16 * 16 if prompt[:60] == STEM[:60] else 48)
            texts.append(result.token_ids)
            kv.append(model.read_kv(state.sequence, 0, len(prompt)))
        found.append((texts, kv))
        core.pool.check_integrity()
    assert found[0][0] == found[1][0]
    assert all(torch.equal(ours, alone) for ours, alone in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_requests_that_come_together_compute_what_they_share_once(engine_of, mode):
    """The first runs, the others wait for its chunks, each until its own text parts."""
    options, params = MODES[mode]
    params = SamplingParams(max_new_tokens=6, ignore_eos=True, **params)
    ours, plain = (engine_of(prefill_chunk=16, prefix_sharing=sharing, **options) for sharing in (True, False))
    prompts = [STEM, STEM, [*STEM[:40], 9, 9, 9], [7, *STEM], STEM[:33], [7, *STEM]]
    passes, forward = [], ours.core.target.forward
    ours.core.scheduler.target.forward = lambda *args, **given: passes.append(list(args[2])) or forward(*args, **given)
    try:
        found = ours.generate(prompts, params)
    finally:
        del ours.core.scheduler.target.forward
    assert [r.token_ids for r in found] == [r.token_ids for r in plain.generate(prompts, params)]
    assert [r.reused_tokens for r in found] == [0, 64, 32, 0, 32, 64]
    assert passes.count([16]) == 4 + 4, "whole chunks of two texts, each alone in its pass"
    check(ours)


def test_who_waits_goes_on_when_the_other_is_cancelled(engine_of):
    engine = engine_of(prefill_chunk=16)
    core, params = engine.core, SamplingParams(max_new_tokens=3, ignore_eos=True)
    first, second = (core.submit(core.open_sequence_state(), [*STEM, tail], params, owns_cache=True) for tail in (5, 6))
    core.step()
    core.step()
    assert (first.sequence.length, second.sequence.length) == (32, 0)
    core.abandon(first)
    assert core.finish(second).reused_tokens == 32
    check(engine)


@pytest.mark.parametrize("hot", [None, next(iter(FORMATS))])
def test_whole_chunks_take_the_place_of_what_others_wrote(engine_of, hot):
    """A drawn text goes on in the middle of a chunk; the first greedy one after it computes that chunk whole, the second shares it."""
    options = {"prefill_chunk": 16} | ({} if hot is None else {"kv_cache_dtype": hot})
    engine, plain = engine_of(**options), engine_of(**options, prefix_sharing=False)
    greedy = SamplingParams(max_new_tokens=6, ignore_eos=True)
    drawn = SamplingParams(max_new_tokens=6, ignore_eos=True, temperature=1.0)
    engine.generate(STEM[:24], drawn)
    reused = [engine.generate(STEM, params)[0].reused_tokens for params in (drawn, greedy)]
    assert reused == [24, 16], "whole pages, and whole chunks"
    before = engine.core.shared_prefixes.num_pages
    again = engine.generate(STEM, greedy)[0]
    assert again.reused_tokens == 64 and again.token_ids == plain.generate(STEM, greedy)[0].token_ids
    assert engine.core.shared_prefixes.num_pages == before
    check(engine)


@pytest.mark.parametrize("hot", FORMATS)
def test_quantised_pages_are_shared_where_their_exact_tokens_are_at_hand(engine_of, hot):
    params = SamplingParams(max_new_tokens=16, ignore_eos=True)
    ours, plain = (engine_of(kv_cache_dtype=hot, prefill_chunk=24, deterministic=True, prefix_sharing=on) for on in (True, False))
    reused = []
    for prompt in (STEM, STEM, [*STEM[:60], 9, 8, 7], STEM[:40] + [2] * 30):
        got, want = ours.generate(prompt, params)[0], plain.generate(prompt, params)[0]
        assert got.token_ids == want.token_ids
        reused.append(got.reused_tokens)
        check(ours)
    assert reused == [0, 64, 48, 24], "ends of chunks and of texts"


def test_namespaces_and_arithmetic_keep_apart(engine_of):
    engine = engine_of()
    core = engine.core

    def run(namespace, **params):
        one = SamplingParams(max_new_tokens=4, ignore_eos=True, **params)
        request = core.submit(core.open_sequence_state(), STEM, one, owns_cache=True)
        request.namespace = namespace
        return core.finish(request).reused_tokens

    assert [run(None), run("a"), run("a"), run("b"), run(None)] == [0, 0, 40, 0, 40]
    assert run("a", seed=1) == 0, "a seed's text may not rest on sums of another order"
    assert [run("a", seed=2), run("a", seed=2, temperature=0.5)] == [64, 64]
    assert [run("b", seed=1), run("c", seed=1), run("c", temperature=0.5)] == [0, 0, 64], (
        "what is promised is good for texts that are drawn"
    )
    assert [run("d", seed=1), run("d")] == [0, 0], "and greedy text is computed as without sharing"
    assert run("invariant:a") == run("plain:a") == 0
    check(engine)


def test_what_was_written_from_outside_is_kept_from_others(engine_of, target):
    engine = engine_of()
    core, params = engine.core, SamplingParams(max_new_tokens=4, ignore_eos=True)
    state = core.open_sequence_state()
    state.token_ids[:] = STEM
    with torch.inference_mode():
        forward_reserved(target, torch.tensor(STEM), [state.sequence], [len(STEM)], logits="none")
        state.sequence.advance(64)
        target.write_kv(state.sequence, 0, 0.9 * target.read_kv(state.sequence, 0, 64))
    core.run(state, [3, 4], params)
    core.close_sequence_state(state)
    assert engine.generate(STEM, params)[0].reused_tokens == 0 and core.shared_prefixes.num_pages == 9
    check(engine)


def test_a_conversation_keeps_its_pages_and_writes_into_its_own(engine_of):
    """Cut back into what others share and go on otherwise: they still read what was there."""
    engine, plain = engine_of("model"), engine_of("model", prefix_sharing=False)
    core, params = engine.core, SamplingParams(max_new_tokens=10, draft_length=2, ignore_eos=True)
    state = core.open_sequence_state()
    first = core.run(state, STEM, params)
    state.sequence.truncate(30)
    state.draft_state.sequence.truncate(30)
    state.token_ids[30:] = []
    second = core.run(state, [5] * 40, params)
    for result, prompt, reused in ((first, STEM, 40), (second, STEM[:30] + [5] * 40, 0)):  # of the second's, 30 tokens lie in whole chunks
        assert result.token_ids == plain.generate(prompt, params)[0].token_ids
        again = engine.generate(prompt, params)[0]
        assert again.token_ids == result.token_ids and again.reused_tokens == reused
    core.close_sequence_state(state)
    check(engine)


@pytest.mark.parametrize("written", ["by itself", "by another", "under a seed", "by a store"])
@torch.inference_mode()
def test_an_interrupted_greedy_request_goes_on_from_its_own_numbers(engine_of, target, written):
    """Whoever else wrote the tokens that it has spoken; what others wrote is altered here, so that its use would show."""
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    found = []
    for sharing in (True, False):
        engine = engine_of(prefill_chunk=16, prefix_sharing=sharing)
        core, shared = engine.core, engine.core.shared_prefixes
        if not sharing:
            wanted = engine.generate(STEM, params)[0].token_ids
        elif written in ("by another", "under a seed"):  # whole chunks up to 80 in either case, and a page of a part of one
            text = [*STEM, *engine_of(prefix_sharing=False).generate(STEM, params)[0].token_ids]
            drawn = {"temperature": 1.0} if written == "by another" else {"seed": 1}
            state = core.open_sequence_state()
            core.run(state, text[:89], SamplingParams(max_new_tokens=1, ignore_eos=True, **drawn))
            core.pool.kv[:, :, state.sequence.pages[10 if written == "by another" else 0 : 11]] *= 0.5
            core.close_sequence_state(state)
        if sharing and written in ("under a seed", "by a store"):
            shared.computed = False  # pages were needed, and its own are gone
        state = core.open_sequence_state()
        request = core.submit(state, STEM, params, owns_cache=True)
        while request.num_new < 21:
            core.step()
        own = target.read_kv(state.sequence, 0, 88)
        if sharing and written == "by a store":
            other = core.pool.new_sequence()
            forward_reserved(target, torch.tensor(request.token_ids[:88]), [other], [88], logits="none")
            other.advance(88)
            target.write_kv(other, 0, 0.5 * target.read_kv(other, 0, 88))
            shared.insert_restored(request.token_ids[:88], "", other, None, [types.SimpleNamespace(start=0, end=88)])
            other.free()
        core.scheduler._preempt(request)
        core.step()
        while request.num_uncomputed:
            core.step()
        found.append((target.read_kv(state.sequence, 0, 88), own))
        result = core.finish(request)
        assert result.reused_tokens == sharing * {"by itself": 88, "by another": 80}.get(written, 0)
        found[-1] += (result.token_ids,)
        core.pool.check_integrity()
    (kv, own, text), (again, _, plain) = found
    assert text == plain == wanted
    assert torch.equal(kv, own if written == "by itself" else again), "its own numbers, else those of whole chunks"


@pytest.mark.parametrize("draft", ["none", "model"])
def test_pages_that_are_known_are_not_made_again(engine_of, draft, monkeypatch):
    """What a request costs its engine's host follows its new pages: a known one is neither described nor given owners anew."""
    engine = engine_of(draft, prefill_chunk=8)
    params = SamplingParams(max_new_tokens=9, draft_length=0 if draft == "none" else 2, ignore_eos=True, temperature=1.0)
    engine.generate(STEM, params)
    made, kept, real = [], [], type(engine.core.pool).keep
    described = shared_prefixes.CachedPage
    monkeypatch.setattr(shared_prefixes, "CachedPage", lambda *args: made.append(described(*args)) or made[-1])
    monkeypatch.setattr(type(engine.core.pool), "keep", lambda pool, pages: kept.append((pool, *pages)) or real(pool, pages))
    result = engine.generate([*STEM, 5, 6, 7, 8], params)[0]
    assert result.reused_tokens == 64
    # 74 + 8 tokens are written, in ten whole pages, of which eight were known
    assert [page for pool, *pages in kept if pool is engine.core.pool for page in pages] == [page.target for page in made]
    assert len(made) == 2
    check(engine)


@pytest.mark.parametrize("given", [False, True])
def test_the_row_of_ids_follows_the_text(engine_of, given):
    core, params = engine_of().core, SamplingParams(max_new_tokens=40, ignore_eos=True)
    request = core.submit(core.open_sequence_state(), STEM, params, owns_cache=True, row=core.check_tokens(STEM) if given else None)
    early = request.id_row
    while request.finish_reason is None:
        core.step()
        assert request.id_row.tolist() == request.token_ids and request.id_row.dtype == np.int32
    assert early.tolist() == STEM


def test_logits_that_are_no_numbers_leave_nothing_behind(random_decoder):
    broken = random_decoder(1, **SHAPE)
    engine = Engine(broken, page_size=8, pool_tokens=512)
    broken.final_norm.data.fill_(float("nan"))
    with pytest.raises(NonFiniteLogits):
        engine.generate(STEM, SamplingParams(max_new_tokens=4))
    assert engine.core.shared_prefixes.num_pages == 0
    check(engine)


@pytest.mark.parametrize(("draft", "seed"), [("model", 0), ("head", 1), ("none", 2)])
def test_random_requests_over_a_small_pool(engine_of, draft, seed):
    """Requests that begin alike, in batches, with pages scarce: texts as without sharing, pages evicted, nothing lost."""
    draw = random.Random(seed)
    ours = engine_of(draft, pool_tokens=288, max_batch=3, prefill_chunk=8)
    plain = engine_of(draft, prefix_sharing=False, prefill_chunk=8)
    stems = [[draw.randrange(3, 97) for _ in range(60)] for _ in range(4)]
    for _ in range(7):
        prompts = [draw.choice(stems)[: draw.randrange(1, 61)] + [draw.randrange(3, 97)] * draw.randrange(1, 9) for _ in range(3)]
        params = [
            SamplingParams(
                max_new_tokens=draw.randrange(1, 20),
                draft_length=0 if draft == "none" else draw.choice([0, 2]),
                ignore_eos=True,
                seed=draw.choice([None, 5]),
            )
            for _ in prompts
        ]
        assert [r.token_ids for r in ours.generate(prompts, params)] == [r.token_ids for r in plain.generate(prompts, params)]
        check(ours)
    metrics = ours.core.shared_prefixes.metrics
    assert metrics.hits > 3 and metrics.evicted_pages > 10
    ours.core.shared_prefixes.clear()
    assert ours.core.pool.num_unowned_pages == ours.core.pool.max_pages
