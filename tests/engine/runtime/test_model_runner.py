"""Steps over static buffers say what the decoder says; text does not depend on what was launched ahead."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from engine.engine import Engine
from engine.model.decoder import forward_reserved
from engine.runtime.model_runner import (
    MAX_ROWS,
    PROMPT_LENGTHS,
    GraphedDecoder,
    PlainDecoding,
    Step,
    bucket,
    page_bucket,
    prompt_groups,
    prompt_length,
    row_groups,
)
from engine.runtime.sampling import SamplingParams
from kernels.decode_layer.plans import MOST_SKINNY

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


@pytest.fixture(scope="module", params=["llama-bias", "qwen2", "qwen3"])
def decoder(request, tiny_model):
    # the fused kernels take heads of 64 channels and more
    return tiny_model(request.param, **({"head_dim": 64} if GPU else {})).decoder.to(DEVICE)


def _pair(decoder, prompts):
    """A pool each for the decoder and its runner, prompts already run in both."""
    sides = []
    for kind in (lambda pool: decoder, lambda pool: GraphedDecoder(decoder, pool, capture=GPU)):
        pool = decoder.new_pool(80, 16)
        runner = kind(pool)
        sequences = [pool.new_sequence() for _ in prompts]
        forward_reserved(decoder, torch.tensor([t for p in prompts for t in p], device=DEVICE), sequences, [len(p) for p in prompts])
        for sequence, prompt in zip(sequences, prompts, strict=True):
            sequence.advance(len(prompt))
        sides.append((runner, sequences))
    return sides


@pytest.mark.parametrize("counts", [[1], [3, 1, 2], [2] * 5, [16, 15], [19], [9, 30]], ids=str)
@torch.inference_mode()
def test_a_step_says_what_the_decoder_says(decoder, counts):
    prompts = [list(range(3, 3 + 7 * (b + 1))) for b in range(len(counts))]
    tokens = torch.arange(sum(counts), device=DEVICE) % 90
    outputs = []
    for runner, sequences in _pair(decoder, prompts):
        assert runner.captured_rows == (None if runner is decoder else MAX_ROWS) and runner.follows_tables == (GPU or runner is not decoder)
        own = [forward_reserved(runner, tokens, sequences, counts, taps=(0, 2), logits=logits) for logits in ("all", "last")]
        rest = forward_reserved(runner, None, sequences, counts, first_layer=2, hidden=own[0].taps[2])
        kv = [decoder.read_kv(s, 0, s.length + n) for s, n in zip(sequences, counts, strict=True)]
        outputs.append([own[0].logits, own[1].logits, rest.logits, own[0].hidden, own[0].taps[0], own[0].taps[2], *kv])
    for want, got in zip(*outputs, strict=True):
        assert want.shape == got.shape
        assert ((want - got).norm() / want.norm()).item() < 1e-4


@torch.inference_mode()
def test_passes_that_are_observed_are_the_decoders_own(decoder):
    seen = []
    for runner, sequences in _pair(decoder, [[3, 4, 5, 6]]):
        layers = []
        forward_reserved(
            runner, torch.arange(2, device=DEVICE), sequences, [2], observe=lambda *found, layers=layers: layers.append(found), last_layer=2
        )
        assert [number for number, _, _ in layers] == [0, 1]
        seen.append([part for _, queries, stream in layers for part in (queries, stream)])
    assert all(torch.equal(want, got) for want, got in zip(*seen, strict=True))


@pytest.mark.parametrize("counts", [[3, 1, 2], [1] * 11, [20, 5, 1]], ids=str)
@torch.inference_mode()
def test_a_deterministic_pass_in_groups_says_what_the_decoder_says(decoder, counts):
    prompts = [list(range(3, 5 + b)) for b in range(len(counts))]
    tokens = torch.arange(sum(counts), device=DEVICE) % 90
    outputs = []
    for runner, sequences in _pair(decoder, prompts):
        own = forward_reserved(runner, tokens, sequences, counts, taps=(2,), logits="none", last_layer=2, deterministic=True)
        rest = forward_reserved(runner, None, sequences, counts, first_layer=2, hidden=own.hidden, deterministic=True)
        kv = [decoder.read_kv(s, 0, s.length + n) for s, n in zip(sequences, counts, strict=True)]
        assert own.logits is None
        outputs.append([own.hidden, own.taps[2], rest.hidden, rest.logits, *kv])
    assert all(key.deterministic and key.batch * key.length <= 8 for key in runner._steps)
    for want, got in zip(*outputs, strict=True):
        assert want.shape == got.shape
        assert ((want - got).norm() / want.norm()).item() < 1e-4


@pytest.mark.parametrize("counts,passes", [([16] * 20, 3), ([7] * 9 + [16] * 9, 3), ([20] * 17, 0)], ids=str)
@pytest.mark.parametrize("logits", ["last", "none"])
@torch.inference_mode()
def test_prompts_too_many_for_one_captured_pass_run_in_a_few(decoder, counts, passes, logits):
    """More passes than a few are the decoder's own."""
    prompts = [list(range(3, 5 + b)) for b in range(len(counts))]
    tokens = torch.arange(sum(counts), device=DEVICE) % 90
    outputs = []
    for runner, sequences in _pair(decoder, prompts):
        own = forward_reserved(runner, tokens, sequences, counts, taps=(0, 2), logits=logits)
        kv = [decoder.read_kv(s, 0, s.length + n) for s, n in zip(sequences, counts, strict=True)]
        outputs.append([own.hidden, own.taps[0], own.taps[2], *kv, *([] if logits == "none" else [own.logits])])
        assert (own.logits is None) == (logits == "none")
    assert sum(step.key.batch * step.key.length <= MAX_ROWS for step in runner._steps.values()) == len(runner._steps)
    assert bool(runner._steps) == (passes > 0) and (not passes or len(prompt_groups(counts)) == passes)
    for want, got in zip(*outputs, strict=True):
        assert want.shape == got.shape
        assert ((want - got).norm() / want.norm()).item() < 1e-4


def test_groups_of_prompts_hold_each_once():
    for counts in ([1], [128] * 3, [16] * 20, [20, 1, 9, 3, 70, 128, 33], [64] * 5):
        groups = prompt_groups(counts)
        assert sorted(b for group in groups for b in group) == list(range(len(counts)))
        for group in groups:
            assert bucket(len(group)) * max(prompt_length(counts[b]) for b in group) <= MAX_ROWS
            assert prompt_length(max(counts[b] for b in group)) in PROMPT_LENGTHS, "those are captured beforehand"
    assert prompt_groups([3, 129]) is None and prompt_groups([64] * 2) == [[0, 1]] and len(prompt_groups([64] * 5)) == 3


def test_groups_hold_every_token_once_in_order():
    for counts in ([1], [8] * 3, [1] * 20, [20, 1, 9, 3], [5, 5], [4, 4, 1]):
        seen = [[] for _ in counts]
        for group in row_groups(counts):
            assert len({b for b, _, _ in group}) == len(group)
            assert bucket(len(group)) * max(size for _, _, size in group) <= 8
            for b, at, size in group:
                seen[b] += range(at, at + size)
        assert seen == [list(range(n)) for n in counts]
    assert len(row_groups([1] * 20)) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "seeded"])
def test_deterministic_text_depends_on_no_batch_and_no_draft(decoder, params):
    """In bfloat16, where another order of sums turns near ties."""
    target = copy.deepcopy(decoder).to(torch.bfloat16)
    prompts = [[5 + b, *range(3, 10 + 3 * b)] for b in range(10)]
    texts = []
    for draft, together in ((None, True), (None, False), (2, True), (target, True)):
        engine = Engine(target, draft=draft, page_size=16, pool_tokens=4096, deterministic=True)
        each = SamplingParams(max_new_tokens=40, ignore_eos=True, draft_length=0 if draft is None else 3, **params)
        groups = [prompts] if together else [[prompt] for prompt in prompts]
        texts.append([r.token_ids for group in groups for r in engine.generate(group, each)])
    assert all(text == texts[0] for text in texts[1:])


@torch.inference_mode()
def test_a_pool_that_grew_is_found_again(decoder):
    pool = decoder.new_pool(2, 16, max_pages=40)
    runner = GraphedDecoder(decoder, pool, capture=GPU)
    sequence, other = pool.new_sequence(), pool.new_sequence()
    want = forward_reserved(decoder, torch.arange(20, device=DEVICE), [other], [20]).logits
    got = []
    for token in range(20):
        got.append(forward_reserved(runner, torch.tensor([token], device=DEVICE), [sequence], [1]).logits)
        sequence.advance(1)
        if token == 8:
            pool.new_sequence().ensure(200)  # the pool's tensors are replaced
    torch.testing.assert_close(torch.cat(got), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("deterministic", [False, True])
def test_log_probabilities_come_from_captured_steps(decoder, deterministic, monkeypatch):
    """Those of the decoder's own passes, each request with as many alternatives as it asks for, beside requests that ask for none."""
    found, launched = [], []
    replay = PlainDecoding._replay
    monkeypatch.setattr(PlainDecoding, "_replay", lambda self, *rest: launched.append(len(rest[0])) or replay(self, *rest))
    wanted = ((2, 0.0), (None, 0.7), (0, 0.7), (128, 0.0))
    each = [SamplingParams(max_new_tokens=9, ignore_eos=True, logprobs=n, temperature=t, seed=4) for n, t in wanted]
    for graphed in (False, True):
        engine = Engine(decoder, page_size=16, pool_tokens=1024, deterministic=deterministic)
        engine.core.scheduler.plain = None
        if graphed:
            runner = GraphedDecoder(decoder, engine.core.pool, capture=GPU)
            engine.core.scheduler.target, engine.core.scheduler.plain = runner, PlainDecoding(runner)
        found.append(engine.generate(PROMPTS[:4], each))
    assert launched, "no captured step was taken"
    vocab = decoder.config.vocab_size
    for own, theirs, params in zip(*found, each, strict=True):
        assert own.token_ids == theirs.token_ids and (theirs.logprobs is None) == (params.logprobs is None)
        for mine, other in zip(own.logprobs or (), theirs.logprobs or (), strict=True):
            assert mine.token_id == other.token_id and mine.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert len(other.top) == min(vocab, params.logprobs)
            assert [value for _, value in mine.top] == pytest.approx([value for _, value in other.top], abs=1e-3)
            assert all(0 <= token < vocab for token, _ in other.top) and dict(other.top).get(other.token_id, other.logprob) == other.logprob


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "top_k": 20}], ids=["greedy", "sampled"])
def test_large_deterministic_batches_stay_in_captured_steps(decoder, params, monkeypatch):
    """Each request has the text it has alone; of 11 requests every step after the prompts is two replays, and no pass of the decoder's own."""
    prompts, launched = [[5 + b, *range(3, 6 + b)] for b in range(11)], []
    replay = PlainDecoding._replay
    monkeypatch.setattr(
        PlainDecoding, "_replay", lambda self, sequences, *rest: launched.append(len(sequences)) or replay(self, sequences, *rest)
    )
    engine = Engine(decoder, page_size=16, pool_tokens=2048, max_batch=16, deterministic=True)
    runner = GraphedDecoder(decoder, engine.core.pool, capture=GPU)
    engine.core.scheduler.target, engine.core.scheduler.plain = runner, PlainDecoding(runner)
    each = [SamplingParams(max_new_tokens=6, ignore_eos=True, seed=b if params else None, **params) for b in range(11)]
    together = [r.token_ids for r in engine.generate(prompts, each)]
    assert launched[:2] == [8, 3] and set(launched) == {8, 3} and len(launched) == 2 * 5, "one ahead of each, none behind the last"
    assert together == [engine.generate([prompt], own)[0].token_ids for prompt, own in zip(prompts, each, strict=True)]


PROMPTS = [[3, 4, 9, 20], [7] * 33, [1], [2, 3, 5] * 12, [8, 8]]


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "top_k": 20, "seed": 3}], ids=["greedy", "sampled"])
def test_text_does_not_depend_on_the_runner(decoder, params):
    texts = []
    for graphed in (False, True):
        engine = Engine(decoder, page_size=16, pool_tokens=1024, max_batch=4)
        if graphed:
            runner = GraphedDecoder(decoder, engine.core.pool, capture=GPU)
            engine.core.scheduler.target, engine.core.scheduler.plain = runner, PlainDecoding(runner)
        else:
            engine.core.scheduler.plain = None
        lengths = (40, 1, 17, 23, 30)
        each = [SamplingParams(max_new_tokens=n, stop_token_ids=(11,), **params) for n in lengths]
        texts.append([(r.token_ids, r.finish_reason) for r in engine.generate(PROMPTS, each)])
        engine.core.pool.check_integrity()
        assert engine.core.pool.num_free_pages == engine.core.pool.max_pages
    assert texts[0] == texts[1]


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "sampled"])
def test_a_step_goes_on_from_the_one_before_it(decoder, params, monkeypatch):
    """Inputs are written for the first step alone; where another pass takes the captured step in between, they are written again and the text stays."""
    filled, texts = [], []
    monkeypatch.setattr(Step, "fill", lambda self, *rest, known=Step.fill: filled.append(self.key.length) or known(self, *rest))
    for disturbed in (False, True):
        engine = Engine(decoder, page_size=16, pool_tokens=1024)
        runner = GraphedDecoder(decoder, engine.core.pool, capture=GPU)
        engine.core.scheduler.target, engine.core.scheduler.plain = runner, PlainDecoding(runner)
        with engine.core.lock:
            conversations = [engine.core.open_sequence_state() for _ in range(2)]
            wanted = SamplingParams(max_new_tokens=40, ignore_eos=True, **params)
            requests = [engine.core.submit(c, p, wanted, owns_cache=True) for c, p in zip(conversations, PROMPTS[:2], strict=True)]
            engine.core.step()
            scratch = [engine.core.pool.new_sequence(1) for _ in range(2)]
            filled.clear()
            for number in range(30):
                if disturbed and number % 7 == 3:
                    for step in [step for key, step in runner._steps.items() if key.length == 1 and key.logits]:
                        step.fill([0, 0], [1, 1], runner.tables.rows(scratch), 16)
                        runner.replay(step)
                        runner.replay(step)
                engine.core.step()
        texts.append([request.token_ids[request.prompt_tokens :] for request in requests])
        assert len(texts[-1][0]) >= 30
        if not disturbed:
            assert filled == [1]
    assert texts[0] == texts[1]


def test_buckets():
    assert [bucket(n) for n in (1, 3, 8, 9, 64, 65)] == [1, 4, 8, 16, 64, 96]
    assert PlainDecoding.takes(128) and not PlainDecoding.takes(129)
    assert [page_bucket(n, 512) for n in (1, 64, 65, 300, 512)] == [64, 64, 128, 512, 512] and page_bucket(3, 10) == 10


@pytest.mark.skipif(not GPU, reason="graphs are captured on a GPU")
@torch.inference_mode()
def test_other_threads_use_the_device_while_graphs_are_captured(decoder):
    (_, _), (runner, sequences) = _pair(decoder, [[1, 2, 3], [4, 5]])
    done, failures = threading.Event(), []
    numbers = torch.arange(4096, device=DEVICE) % 9

    def work():
        try:
            while not done.is_set():
                torch.bincount(numbers).tolist()  # waits for the device, as a codec's table does
        except RuntimeError as error:
            failures.append(error)

    other = threading.Thread(target=work)
    other.start()
    try:
        for count in (1, 2, 3, 4):
            forward_reserved(runner, torch.ones(2 * count, dtype=torch.int64, device=DEVICE), sequences, [count] * 2)
    finally:
        done.set()
        other.join()
    assert not failures and any(step.graph is not None for step in runner._steps.values())


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("draft_length", [0, 2], ids=["plain", "drafts"])
@torch.inference_mode()
def test_no_captured_step_waits_for_the_device(decoder, draft_length):
    """Nothing but the tokens' own event is waited for: all copies are from page-locked memory, whatever is sampled. Blocks under a seed are captured
    up to MOST_SKINNY rows."""
    engine = Engine(decoder, draft=decoder, page_size=16, pool_tokens=4096)
    core = engine.core
    for options in (
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "seed": 3},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
    ):
        params = SamplingParams(max_new_tokens=100, ignore_eos=True, draft_length=draft_length, **options)
        count = min(3, MOST_SKINNY // (1 + draft_length)) if "seed" in options else 3
        requests = [core.submit(core.open_sequence_state(), p, params, owns_cache=True) for p in PROMPTS[:count]]
        for _ in range(12):  # the prompts, what is captured, and what is sent once
            core.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(10):
                core.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for request in requests:
            core.abandon(request)


@torch.inference_mode()
def test_what_is_left_of_a_short_prompt_takes_the_step_captured_for_prompts(decoder):
    """Behind a shared beginning a few tokens are left: no length of its own may be captured for them."""
    runner = GraphedDecoder(decoder, decoder.new_pool(32, 16), capture=GPU)
    sequences = [runner.pool.new_sequence() for _ in range(2)]
    ids = torch.tensor([3, 4, 9, 20, 5], device=DEVICE)
    found = forward_reserved(runner, ids, sequences, [4, 1], logits="last")
    assert {key.length for key in runner._steps} == {PROMPT_LENGTHS[0]}
    for sequence in sequences:
        sequence.free()
    whole = forward_reserved(decoder, ids, [runner.pool.new_sequence() for _ in range(2)], [4, 1], logits="last")
    torch.testing.assert_close(found.logits, whole.logits, atol=2e-2, rtol=2e-2)
    many = [runner.pool.new_sequence() for _ in range(9)]
    forward_reserved(runner, ids.repeat(2)[:9], many, [1] * 9, logits="last")
    assert {key.length for key in runner._steps if key.batch == 16} == {1}, "16 rows for each of so many are too many"
