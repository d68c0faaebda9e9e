"""Captured steps over pools whose windowed layers keep their window alone: they say what the decoder says, and the text is that of all pages."""

from __future__ import annotations

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv.windowed_pool import REWIND_TOKENS, WindowedPool
from engine.model.decoder import forward_reserved
from engine.runtime.block_runner import BlockDecoding
from engine.runtime.drafters import load_draft_head
from engine.runtime.memory import open_pool, step_tokens, window_layers
from engine.runtime.model_runner import GraphedDecoder, PlainDecoding
from engine.runtime.sampling import SamplingParams

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
STEM = [int(t) for t in torch.randint(3, 97, (230,), generator=torch.Generator().manual_seed(4))]
OPTIONS = {"page_size": 8, "prefill_chunk": 20, "pool_tokens": 4096, "max_batch": 4}
pytestmark = [pytest.mark.gpu] if GPU else []


@pytest.fixture(scope="module", params=["gemma3", "mistral-window"])
def decoder(request, tiny_model):
    return tiny_model(request.param, max_position_embeddings=1024, head_dim=32).decoder.to(DEVICE)


@pytest.fixture
def engine_of(decoder, make_draft_head, tmp_path, as_on_a_gpu, monkeypatch):
    """`engine_of(draft, windows=True, **options)` with captured steps; without windows all layers keep all of a text."""

    def make(draft="none", windows=True, **options):
        source = decoder if draft == "model" else None
        if draft == "head":
            source = load_draft_head(make_draft_head(tmp_path / "head", decoder, exit_layer=1, layers=1), decoder)
        with monkeypatch.context() as patch:
            if not windows:
                patch.setattr("engine.runtime.core.window_layers", lambda *_: ())
            engine = Engine(decoder, draft=source, **(OPTIONS | options))
        assert isinstance(engine.core.pool, WindowedPool) == windows
        return as_on_a_gpu(engine)

    return make


@pytest.fixture
def counted(monkeypatch):
    """Steps launched: {"plain", "blocks"}."""
    found = {"plain": 0, "blocks": 0}
    plain, blocks = PlainDecoding._replay, BlockDecoding._launch

    def count(name):
        found[name] += 1

    monkeypatch.setattr(PlainDecoding, "_replay", lambda self, *given: count("plain") or plain(self, *given))
    monkeypatch.setattr(BlockDecoding, "_launch", lambda self, *given, **named: count("blocks") or blocks(self, *given, **named))
    return found


@pytest.mark.parametrize("deterministic", [False, True])
@torch.inference_mode()
def test_a_step_says_what_the_decoder_says_and_reads_nothing_before_a_window(decoder, deterministic):
    """Of ragged requests whose windows have slid, one of them not yet; free pages hold NaN."""
    outputs, counts, config = [], [3, 1, 2], EngineConfig(page_size=8, prefill_chunk=20)
    tokens = torch.arange(sum(counts), device=DEVICE) + 7
    for graphed in (False, True):
        windows = window_layers(decoder, config)
        pool = open_pool(decoder, "bf16", 200, 8, 200, windows=windows, step_tokens=step_tokens(decoder, config))
        sequences = [pool.new_sequence() for _ in counts]
        for at in range(0, 230, 23):
            own = sequences if at == 0 else sequences[:2]
            parts = [STEM[at : at + 23] for _ in own]
            forward_reserved(decoder, torch.tensor([t for part in parts for t in part], device=DEVICE), own, [23] * len(own))
            for sequence in own:
                sequence.advance(23)
        assert [sequence.windows[0].first_page > 0 for sequence in sequences] == [True, True, False]
        for part in (*([pool.main] if pool.main_layers else []), *(group.pool for group in pool.windowed)):
            owners = part if part is not pool.main else pool
            part.kv[:, :, [page for page in range(part.num_pages) if owners.is_free(page)]] = float("nan")
        runner = GraphedDecoder(decoder, pool, capture=GPU) if graphed else decoder
        own = forward_reserved(runner, tokens, sequences, counts, taps=(0, 2), logits="all", deterministic=deterministic)
        rest = forward_reserved(runner, None, sequences, counts, first_layer=2, hidden=own.taps[2], deterministic=deterministic)
        outputs.append([own.logits, rest.logits, own.taps[2]])
        outputs[-1] += [decoder.read_kv(s, s.length - 4, s.length + n) for s, n in zip(sequences, counts, strict=True)]
    for want, got in zip(*outputs, strict=True):
        assert torch.isfinite(got).all() and ((want - got).norm() / want.norm()).item() < 1e-4


@torch.inference_mode()
def test_padding_writes_no_page(decoder):
    config = EngineConfig(page_size=8, prefill_chunk=20)
    pool = open_pool(decoder, "bf16", 60, 8, 60, windows=window_layers(decoder, config), step_tokens=step_tokens(decoder, config))
    [group] = pool.windowed
    runner, sequences = GraphedDecoder(decoder, pool, capture=GPU), [pool.new_sequence(2) for _ in range(3)]
    step = runner.step(3, 2, 4, 0, decoder.config.num_layers, (), True)
    group.pool.kv.fill_(7.0)
    runner.replay(step)
    assert bool((group.pool.kv == 7.0).all()), "a step of padding alone"
    step.fill([0, 0, 0], [1, 2, 1], runner.tables.rows(sequences), 8)
    runner.replay(step)
    written = [s.windows[0].pages[0] * 8 + at for s, count in zip(sequences, (1, 2, 1), strict=True) for at in range(count)]
    rows = group.pool.layer(0)[0].flatten(0, 1)
    untouched = torch.ones(len(rows), dtype=torch.bool, device=DEVICE)
    untouched[written] = False
    assert bool((rows[untouched] == 7.0).all()) and not bool((rows[~untouched] == 7.0).all(-1).any())


@pytest.mark.parametrize(
    ("draft", "options", "params"),
    [
        ("none", {}, {}),
        ("none", {}, {"temperature": 0.8, "seed": 7}),
        ("none", {"deterministic": True}, {}),
        ("model", {}, {}),
        ("head", {}, {"temperature": 0.8, "seed": 7}),
    ],
)
def test_long_texts_are_the_same_and_their_windows_stay_short(engine_of, counted, draft, options, params):
    """Steps that follow one another on the device cross pages while windows slide; drafts are accepted and refused across their edges."""
    length = 0 if draft == "none" else 2
    each = [SamplingParams(max_new_tokens=n, ignore_eos=True, draft_length=length, **params) for n in (260, 300, 120)]
    prompts = [STEM, [5] * 9, STEM[:100]]
    engine = engine_of(draft, **options)
    core, most = engine.core, []

    def watched(step=core.scheduler.step):
        finished = step()
        most.append(max((len(w.pages) for r in core.scheduler.running for w in r.sequence.windows), default=0))
        return finished

    core.scheduler.step = watched
    found = engine.generate(prompts, each)
    assert counted["plain" if draft == "none" else "blocks"] > 50
    assert [r.token_ids for r in found] == [r.token_ids for r in engine_of(draft, windows=False, **options).generate(prompts, each)]
    if draft == "model":
        assert sum(r.speculation.accepted for r in found) > 0.8 * sum(r.speculation.proposed for r in found)
    [group] = core.pool.windowed
    assert 0 < max(most) <= -(-(group.window + REWIND_TOKENS + 8 + 20) // 8) + 1 < 490 // 8
    core.pool.check_integrity()
    assert all(pool.num_free_pages == pool.max_pages for pool in core.pool.groups)


def test_shared_beginnings(engine_of):
    """Windows of a known text are gone on from."""
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    prompts = [STEM, [*STEM, 5, 6, 7], STEM[:90] + [9] * 30, STEM[:60], STEM[:70]]
    want = [r.token_ids for r in engine_of(windows=False, prefix_sharing=False).generate(prompts, params)]
    engine = engine_of()
    assert [engine.generate(prompt, params)[0].token_ids for prompt in prompts] == want
    again = engine.generate(prompts, params)
    assert [r.token_ids for r in again] == want and again[1].reused_tokens >= 200


def test_interrupted_requests_go_on_with_the_same_text(engine_of):
    params = SamplingParams(max_new_tokens=150, ignore_eos=True)
    prompts = [STEM[: 10 + 5 * n] for n in range(5)]
    want = [r.token_ids for r in engine_of(windows=False).generate(prompts, params)]
    engine = engine_of(pool_tokens=560, max_batch=5)
    engine.core.scheduler.headroom = 8
    assert [r.token_ids for r in engine.generate(prompts, params)] == want
    assert engine.core.scheduler.preemptions > 0
