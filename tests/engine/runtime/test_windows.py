"""Engines of models with windows: the text is the same as with all pages, while the pages of windowed layers stay few."""

from __future__ import annotations

import pytest
import torch

from engine.engine import Engine
from engine.kv.text_ends import ENDS_OF_A_TEXT
from engine.kv.windowed_pool import REWIND_TOKENS, WindowedPool
from engine.runtime.drafters import load_draft_head
from engine.runtime.sampling import SamplingParams

STEM = [int(t) for t in torch.randint(3, 97, (230,), generator=torch.Generator().manual_seed(4))]
OPTIONS = {"page_size": 8, "prefill_chunk": 20, "pool_tokens": 4096}
MODES = {"greedy": ({}, {}), "seed": ({}, {"seed": 7, "temperature": 0.8}), "deterministic": ({"deterministic": True}, {})}


@pytest.fixture(params=["gemma3", "mistral-window"])
def model(request, tiny_model):
    return tiny_model(request.param, max_position_embeddings=1024, head_dim=32)


@pytest.fixture
def engine_of(model, make_draft_head, tmp_path, monkeypatch):
    """`engine_of(draft, windows=True, **options)`; without windows all layers keep all of a text, as the oracle does."""
    decoder = model.decoder
    c = decoder.config
    means = torch.randn(c.num_layers, 2, c.num_kv_heads, 32, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr("engine.engine.channel_means", lambda *_: means)
    sources = {"none": None, "exit": 1, "model": decoder}

    def make(draft="none", windows=True, **options):
        if draft == "head" and draft not in sources:
            sources[draft] = load_draft_head(make_draft_head(tmp_path / "head", decoder, exit_layer=1, layers=1), decoder)
        if draft == "states" and draft not in sources:
            sources[draft] = load_draft_head(make_draft_head(tmp_path / "states", decoder, state_layers=(c.num_layers,)), decoder)
        with monkeypatch.context() as patch:
            if not windows:
                patch.setattr("engine.runtime.core.window_layers", lambda *_: ())
            engine = Engine(decoder, draft=sources[draft], **(OPTIONS | options))
        assert isinstance(engine.core.pool, WindowedPool) == windows
        return engine

    return make


def check(engine):
    """All pages can be had, and all counts agree."""
    core = engine.core
    core.pool.check_integrity()
    assert all(pool.num_free_pages == pool.max_pages for pool in core.pool.groups)
    if core.shared_prefixes is not None:
        core.shared_prefixes.trie.check_integrity()


def most_pages(engine):
    """Wraps the scheduler: a list of the most pages that windowed layers owned, of running texts alone, after each step."""
    core, found = engine.core, []

    def watched(step=core.scheduler.step):
        finished = step()
        found.append(max((len(w.pages) for r in core.scheduler.running for w in r.sequence.windows), default=0))
        core.pool.check_integrity()
        return finished

    core.scheduler.step = watched
    return found


@pytest.mark.parametrize(
    ("draft", "options"), [("none", {}), ("exit", {}), ("head", {}), ("states", {}), ("model", {}), ("none", {"kv_cache_dtype": "q4"})]
)
def test_long_texts_are_the_same_and_their_windows_stay_short(engine_of, draft, options):
    """Several at once, with drafts that are accepted and refused across the windows' edges."""
    params = SamplingParams(max_new_tokens=330, ignore_eos=True, draft_length=0 if draft == "none" else 3)
    prompts = [STEM, [5] * 9, STEM[:100]]
    engine = engine_of(draft, **options)
    pages = most_pages(engine)
    results = engine.generate(prompts, params)
    assert [r.token_ids for r in results] == [r.token_ids for r in engine_of(draft, windows=False, **options).generate(prompts, params)]
    if draft != "none":
        assert sum(r.speculation.accepted for r in results) > 0
    [group] = engine.core.pool.windowed
    half = len(pages) // 2
    assert max(pages[half:]) <= max(pages[:half]) <= -(-(group.window + REWIND_TOKENS + 8 + 20) // 8) + 1 < 560 // 8 // 2
    check(engine)


@pytest.mark.parametrize("draft", ["none", "exit", "head", "states"])
@pytest.mark.parametrize("mode", MODES)
def test_shared_beginnings(engine_of, draft, mode):
    """A prompt again, a longer one, one that parts far before the end and another that parts there too, one that goes on from an answer."""
    options, params = MODES[mode]
    params = SamplingParams(max_new_tokens=12, draft_length=0 if draft == "none" else 2, ignore_eos=True, **params)
    ours, plain = engine_of(draft, **options), engine_of(draft, prefix_sharing=False, **options)
    prompts = [STEM, STEM, [*STEM, 5, 6, 7], STEM[:90] + [9] * 30, STEM[:90] + [8] * 30]
    prompts.append(STEM + plain.generate(STEM, params)[0].token_ids + [11, 12])
    reused = []
    for prompt in prompts:
        got, want = ours.generate(prompt, params)[0], plain.generate(prompt, params)[0]
        assert got.token_ids == want.token_ids and want.reused_tokens == 0
        reused.append(got.reused_tokens)
        check(ours)
    # whole chunks of 20 that end with a page of 8 for greedy text; ends of chunks and of texts otherwise
    near = 200 if mode == "greedy" else 224
    assert reused[:3] == [0, near, near]
    assert reused[3] == 0 and reused[4] in (80, 88), "nobody had gone on from there before; now somebody has"
    assert reused[5] >= near
    results = ours.generate(prompts, params)
    assert [r.token_ids for r in results] == [r.token_ids for r in plain.generate(prompts, params)]
    check(ours)


def test_few_ends_of_a_text_are_kept(engine_of):
    """A long prompt leaves its last ones, so what the pool keeps for others does not grow with it."""
    kept = []
    for tokens in (400, 800):
        engine = engine_of()
        engine.generate([3 + n % 90 for n in range(tokens)], SamplingParams(max_new_tokens=3, ignore_eos=True))
        [group] = engine.core.pool.windowed
        kept.append(sum(not group.pool.is_free(page) for page in range(group.pool.num_pages)))
        assert engine.core.shared_prefixes.num_pages == tokens // 8
        ends = sum(page is not None for page in engine.core.shared_prefixes._ends._new.values())
        assert ends == 2 * ENDS_OF_A_TEXT
        check(engine)
    assert kept[0] == kept[1] < 400 // 8


@pytest.mark.parametrize("draft", ["none", "exit"])
def test_interrupted_requests_go_on_with_the_same_text(engine_of, draft):
    params = SamplingParams(max_new_tokens=150, ignore_eos=True, draft_length=0 if draft == "none" else 2)
    prompts = [STEM[: 10 + 5 * n] for n in range(5)]
    wanted = engine_of(draft).generate(prompts, params)
    engine = engine_of(draft, pool_tokens=560, max_batch=5)
    engine.core.scheduler.headroom = 8
    results = engine.generate(prompts, params)
    assert engine.core.scheduler.preemptions >= 2
    assert [r.token_ids for r in results] == [r.token_ids for r in wanted]
    check(engine)


@pytest.mark.parametrize("draft", ["none", "exit", "head", "states"])
@pytest.mark.parametrize("back", [2, 40, REWIND_TOKENS, 300])
def test_a_conversation_that_is_taken_back_goes_on_exactly(engine_of, draft, back):
    """By a few tokens from what is held, by many from its beginning."""
    params = SamplingParams(max_new_tokens=200, ignore_eos=True, draft_length=0 if draft == "none" else 2)
    core = engine_of(draft, prefix_sharing=False).core
    conversation = core.open_sequence_state()
    core.run(conversation, STEM, params)
    del conversation.token_ids[len(conversation.token_ids) - back :]
    ids = list(conversation.token_ids)
    conversation.sequence.truncate(len(ids))
    if not conversation.sequence.length:
        conversation.emptied()
    result = core.run(conversation, [9, 8, 7], params)
    assert result.token_ids == engine_of(draft, prefix_sharing=False).generate([*ids, 9, 8, 7], params)[0].token_ids
    assert (result.reused_tokens == 0) == (back == 300)
    core.pool.check_integrity()
    core.close_sequence_state(conversation)
    assert all(pool.num_free_pages == pool.max_pages for pool in core.pool.groups)
