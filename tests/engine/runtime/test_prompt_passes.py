"""Passes of long prompts over static buffers: what the decoder says, for every family, behind any context, and the same text."""

from __future__ import annotations

import pytest
import torch

from bench.interpreter import compute_like_hardware
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model.decoder import forward_reserved
from engine.runtime.memory import open_pool, step_tokens, window_layers
from engine.runtime.model_runner import GraphedDecoder
from engine.runtime.prompt_passes import PASS_REQUESTS, PASS_ROWS
from engine.runtime.sampling import SamplingParams
from kernels.dispatch import triton_importable

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
FAMILIES = ("llama-bias", "qwen3", "mistral-window", "qwen2-window", "gemma2", "gemma3", "mixtral", "qwen3_moe")
TEXT = [int(t) for t in torch.randint(3, 97, (2048,), generator=torch.Generator().manual_seed(5))]
SHAPE = {"num_hidden_layers": 3, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048}
pytestmark = [pytest.mark.gpu] if GPU else []


@pytest.fixture(scope="module", params=FAMILIES)
def decoder(request, tiny_model):
    return tiny_model(request.param, max_position_embeddings=2048).decoder.to(DEVICE)


@pytest.fixture(scope="module")
def llama(tiny_model):
    return tiny_model("llama-bias", max_position_embeddings=2048).decoder.to(DEVICE)


def ids_of(counts):
    return torch.tensor([t for b, n in enumerate(counts) for t in TEXT[b : b + n]], device=DEVICE)


def behind(decoder, pool, contexts):
    """Sequences that hold so many tokens each."""
    sequences = [pool.new_sequence() for _ in contexts]
    for sequence, count in zip(sequences, contexts, strict=True):
        if count:
            forward_reserved(decoder, torch.tensor(TEXT[-count:], device=DEVICE), [sequence], [count])
            sequence.advance(count)
    return sequences


def reserved(sequences, counts):
    """The same, with pages for so many tokens more."""
    for sequence, count in zip(sequences, counts, strict=True):
        sequence.ensure(sequence.length + count)
    return sequences


def twice(runner, *given, **named):
    """The second result: where graphs are captured the first pass of a kind is the decoder's own."""
    forward_reserved(runner, *given, **named)
    return forward_reserved(runner, *given, **named)


def assert_alike(wanted, found):
    for want, got in zip(wanted, found, strict=True):
        assert want.shape == got.shape and want.dtype == got.dtype
        assert ((want - got).norm() / want.norm()).item() < 1e-4


def both(decoder, counts, contexts, **asked):
    """What the decoder and its runner return of the same pass, and their keys and values; and the kinds of passes that the runner has."""
    outputs = []
    for graphed in (False, True):
        pool = decoder.new_pool(400, 8)
        sequences = behind(decoder, pool, contexts)
        runner = GraphedDecoder(decoder, pool, capture=GPU) if graphed else decoder
        out = twice(runner, ids_of(counts), sequences, counts, **asked)
        kv = [decoder.read_kv(s, 0, s.length + n) for s, n in zip(sequences, counts, strict=True)]
        outputs.append([*([] if out.logits is None else [out.logits]), out.hidden, *out.taps.values(), *kv])
        assert (out.logits is None) == (asked["logits"] == "none" or "last_layer" in asked)
    return *outputs, list(runner._prompts._passes)


@pytest.mark.parametrize(
    ("counts", "contexts"),
    [
        ([129], [0]),
        ([255], [13]),
        ([256], [8]),
        ([257], [77]),
        ([1000], [1001]),
        ([1024], [3]),
        ([70, 300, 1], [5, 0, 40]),
        ([60] * 9, [0, 3] * 4 + [9]),
    ],
    ids=str,
)
@torch.inference_mode()
def test_a_pass_says_what_the_decoder_says(decoder, counts, contexts):
    want, got, [key] = both(decoder, counts, contexts, logits="last", taps=(0, 2))
    assert_alike(want, got)
    assert key.rows == min(n for n in PASS_ROWS if n >= sum(counts))
    assert key.requests == min(n for n in PASS_REQUESTS if n >= len(counts))


@pytest.mark.parametrize(
    ("counts", "contexts", "taken"), [([64], [40], True), ([64], [31], False), ([20], [40], True), ([15], [40], False)], ids=str
)
@torch.inference_mode()
def test_short_prompts_far_behind(llama, counts, contexts, taken, monkeypatch):
    """Of 32 padded rows and more."""
    monkeypatch.setattr("engine.runtime.model_runner._FAR_KEYS", 32)
    want, got, keys = both(llama, counts, contexts, logits="last")
    assert_alike(want, got)
    assert [key.rows for key in keys] == [PASS_ROWS[0]] * taken


@pytest.mark.parametrize(
    "asked",
    [
        {"logits": "none"},
        {"logits": "none", "last_layer": 2, "taps": (2,)},
        {"logits": "none", "last_layer": 1, "taps": (0, 1)},
        {"logits": "last", "last_layer": 2},
        {"logits": "last", "taps": (1, 3)},
    ],
    ids=str,
)
@torch.inference_mode()
def test_parts_of_a_pass(llama, asked):
    """Of a draft model, a draft head's first layers, and states for one."""
    want, got, keys = both(llama, [300], [21], **asked)
    assert len(keys) == 1
    assert_alike(want, got)


@pytest.mark.parametrize("logits", ["last", "none"])
@torch.inference_mode()
def test_a_pass_from_hidden_states(decoder, logits):
    outputs = []
    for graphed in (False, True):
        pool = decoder.new_pool(100, 8)
        sequences = behind(decoder, pool, [0, 11])
        hidden = forward_reserved(decoder, ids_of([200, 40]), sequences, [200, 40], logits="none", last_layer=1).hidden
        runner = GraphedDecoder(decoder, pool, capture=GPU) if graphed else decoder
        out = twice(runner, None, sequences, [200, 40], first_layer=1, hidden=hidden, logits=logits, taps=(1, 2))
        outputs.append([*([out.logits] if logits == "last" else []), out.hidden, out.taps[1], out.taps[2]])
    assert [key.embed for key in runner._prompts._passes] == [False]
    assert_alike(*outputs)


@pytest.mark.skipif(GPU or not triton_importable(), reason="needs Triton's interpreter, which a GPU's process has not")
@torch.inference_mode()
def test_interpreted_kernels_say_the_same(tiny_model, monkeypatch):
    compute_like_hardware()
    monkeypatch.setattr("engine.runtime.prompt_passes.PASS_ROWS", (160,))
    decoder, outputs = tiny_model("gemma3", max_position_embeddings=128).decoder, []
    for kernels in ("reference", "triton"):
        pool = decoder.new_pool(60, 16)
        sequences, counts = behind(decoder, pool, [20, 5]), [99, 51]
        monkeypatch.setenv("FORETOLD_KERNELS", kernels)
        runner = GraphedDecoder(decoder, pool, capture=False)
        out = runner.forward(ids_of(counts), reserved(sequences, counts), counts, logits="last", taps=(2,))
        assert len(runner._prompts) == 1
        monkeypatch.setenv("FORETOLD_KERNELS", "reference")
        kv = [decoder.read_kv(s, 0, s.length + n) for s, n in zip(sequences, counts, strict=True)]
        outputs.append([out.logits, out.hidden, out.taps[2], *kv])
    assert_alike(*outputs)


@torch.inference_mode()
def test_padding_writes_no_page_and_nobody_else_is_read(decoder):
    """All that no request has written is NaN, and stays it."""
    pool = decoder.new_pool(60, 8)
    runner = GraphedDecoder(decoder, pool, capture=GPU)
    pool.kv.fill_(float("nan"))
    sequences = [pool.new_sequence() for _ in range(3)]
    counts = [131, 20, 1]
    for _ in range(2):
        out = twice(runner, ids_of(counts), sequences, counts, logits="last")
    assert len(runner._prompts) == 1 and torch.isfinite(out.logits).all() and torch.isfinite(out.hidden).all()
    written = {s.pages[at // 8] * 8 + at % 8 for s, n in zip(sequences, counts, strict=True) for at in range(n)}
    finite = torch.isfinite(pool.layer(0)[0].flatten(0, 1)).flatten(1).all(-1)
    assert set(finite.nonzero().flatten().tolist()) == written
    assert torch.isfinite(pool.layer(2)[1].flatten(0, 1)).flatten(1).any(-1).sum().item() == len(written)


@torch.inference_mode()
def test_results_are_the_callers_own(llama):
    """A pass of the same kind writes the buffers again."""
    pool = llama.new_pool(100, 8)
    runner = GraphedDecoder(llama, pool, capture=GPU)
    first = twice(runner, ids_of([200]), [pool.new_sequence()], [200], logits="last", taps=(2,))
    kept = [part.clone() for part in (first.logits, first.hidden, first.taps[2])]
    forward_reserved(runner, ids_of([150]).flip(0), [pool.new_sequence()], [150], logits="last", taps=(2,))
    assert len(runner._prompts) == 1
    assert all(torch.equal(a, b) for a, b in zip(kept, (first.logits, first.hidden, first.taps[2]), strict=True))


@torch.inference_mode()
def test_a_pool_that_grew_is_found_again(llama):
    pool = llama.new_pool(50, 8, max_pages=300)
    runner = GraphedDecoder(llama, pool, capture=GPU)
    sequence = behind(llama, pool, [30])[0]
    first = twice(runner, ids_of([200]), [sequence], [200], logits="last")
    sequence.advance(200)
    pool.new_sequence().ensure(1500)  # the pool's tensors are replaced
    second = twice(runner, ids_of([180]), [sequence], [180], logits="last")
    assert len(runner._prompts) == 1
    other = behind(llama, pool, [30])[0]
    for count, got in ((200, first), (180, second)):
        want = forward_reserved(llama, ids_of([count]), [other], [count], logits="last")
        other.advance(count)
        assert_alike([want.logits, want.hidden], [got.logits, got.hidden])


@pytest.mark.parametrize("family", ["gemma3", "mistral-window"])
@torch.inference_mode()
def test_windows_that_keep_pages_of_their_own(tiny_model, family):
    """Of ragged requests whose windows have slid, one of them not yet; free pages hold NaN."""
    decoder = tiny_model(family, max_position_embeddings=1024, head_dim=32).decoder.to(DEVICE)
    outputs, counts, config = [], [150, 20, 3], EngineConfig(page_size=8, prefill_chunk=200)
    for graphed in (False, True):
        windows = window_layers(decoder, config)
        pool = open_pool(decoder, "bf16", 300, 8, 300, windows=windows, step_tokens=step_tokens(decoder, config))
        sequences = behind(decoder, pool, [270, 199, 5])
        for part in (*([pool.main] if pool.main_layers else []), *(group.pool for group in pool.windowed)):
            owners = part if part is not pool.main else pool
            part.kv[:, :, [page for page in range(part.num_pages) if owners.is_free(page)]] = float("nan")
        runner = GraphedDecoder(decoder, pool, capture=GPU) if graphed else decoder
        out = twice(runner, ids_of(counts), sequences, counts, logits="last", taps=(2,))
        kv = [decoder.read_kv(s, s.length + n - 2, s.length + n) for s, n in zip(sequences, counts, strict=True)]
        outputs.append([out.logits, out.hidden, out.taps[2], *kv])
    assert len(runner._prompts) == 1
    assert_alike(*outputs)


@pytest.mark.parametrize(
    ("counts", "asked"),
    [
        ([1100, 1000], {"logits": "last"}),
        ([70] * 17, {"logits": "last"}),
        ([200], {"logits": "all"}),
        ([200], {"logits": "last", "deterministic": True}),
        ([200], {"logits": "last", "observe": lambda *_: None}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
@torch.inference_mode()
def test_all_others_are_the_decoders_own(llama, counts, asked):
    pool = llama.new_pool(400, 8)
    runner, sequences = GraphedDecoder(llama, pool, capture=GPU), [pool.new_sequence() for _ in counts]
    got = twice(runner, ids_of(counts), sequences, counts, **asked)
    assert not len(runner._prompts)
    assert_alike([forward_reserved(llama, ids_of(counts), sequences, counts, **asked).logits], [got.logits])


class _Replayed:
    """A graph's stand-in: what was captured, run again."""

    def __init__(self, run):
        self.replay = run


@torch.no_grad()
def test_the_first_of_a_kind_is_the_decoders_own_unless_it_was_captured_before(llama, monkeypatch):
    pool = llama.new_pool(200, 8)
    runner = GraphedDecoder(llama, pool, capture=GPU)
    if not GPU:
        runner._prompts.capture = lambda run: run() or _Replayed(run)
    own, run = [], llama.run
    monkeypatch.setattr(llama, "run", lambda asked: own.append(sum(asked.query_lens)) or run(asked))

    def compare(count):
        sequence = pool.new_sequence()
        got = forward_reserved(runner, ids_of([count]), [sequence], [count], logits="last")
        assert_alike([forward_reserved(llama, ids_of([count]), [sequence], [count], logits="last").logits], [got.logits])
        own.pop()
        sequence.free()

    for count in (200, 250, 201, 500):
        compare(count)
    assert own == [200, 500] and len(runner._prompts) == 1
    runner.capture_long_prompts(1, until_s=0.0)
    assert len(runner._prompts) == 1
    runner.capture_long_prompts(1)
    for count in (400, 700, 1000):
        compare(count)
    assert own == [200, 500] and len(runner._prompts) == len(PASS_ROWS)


@pytest.fixture(scope="module")
def target(random_decoder):
    return random_decoder(1, **SHAPE).to(DEVICE)


@pytest.fixture
def source_of(target, random_decoder, make_draft_head, tmp_path):
    """`source_of(kind)`: a draft source of the target."""
    from engine.runtime.drafters import load_draft_head

    def make(kind):
        if kind == "model":
            return random_decoder(1, **SHAPE).to(DEVICE)
        if kind in ("head", "states"):
            options = {"exit_layer": 1} if kind == "head" else {"state_layers": (1, 3)}
            return load_draft_head(make_draft_head(tmp_path / kind, target, **options), target)
        return None

    return make


KINDS = ("none", "model", "head", "states")
OPTIONS = {"page_size": 16, "pool_tokens": 8192, "max_batch": 4, "prefill_chunk": 1024}


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_that_of_the_decoders_own_passes(target, source_of, as_on_a_gpu, kind):
    """Fresh prompts, one at a time and together, and such that go on from a known beginning."""
    each = SamplingParams(max_new_tokens=8, ignore_eos=True, draft_length=0 if kind == "none" else 2)
    plain = SamplingParams(max_new_tokens=8, ignore_eos=True, draft_length=0)
    prompts = [TEXT[:150], TEXT[:700], TEXT[30:330], TEXT[:150] + TEXT[900:1100], TEXT[7:140]]
    eager = Engine(target, **OPTIONS, prefix_sharing=False)
    eager.core.scheduler.target = target
    eager.core.scheduler.plain = None
    want = [eager.generate(prompt, plain)[0].token_ids for prompt in prompts]
    engine = as_on_a_gpu(Engine(target, draft=source_of(kind), **OPTIONS))
    assert [engine.generate(prompt, each)[0].token_ids for prompt in prompts] == want
    assert [r.token_ids for r in engine.generate(prompts, each)] == want
    assert len(engine.core.runner._prompts) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_passes_are_captured_at_the_start(target, source_of, as_on_a_gpu, kind):
    engine = as_on_a_gpu(Engine(target, draft=source_of(kind), **OPTIONS, prefix_sharing=False))
    runner, blocks = engine.core.runner, engine.core.scheduler.blocks
    runners = [runner, *([blocks.draft] if blocks is not None and blocks.draft is not None else [])]
    engine.core.capture_steps(limit_s=600.0)
    known = [set(own._prompts._passes) for own in runners]
    assert {key.rows for key in known[0]} == set(PASS_ROWS)
    for count in (129, 256, 300, 520, 1000):
        engine.generate(TEXT[:count], SamplingParams(max_new_tokens=6, ignore_eos=True, draft_length=0 if kind == "none" else 2))
    engine.generate([TEXT[:90], TEXT[5:200], TEXT[9:70]], SamplingParams(max_new_tokens=6, ignore_eos=True))
    assert [set(own._prompts._passes) for own in runners] == known
    assert {key.requests for key in known[0]} == {1, 4}


@pytest.mark.parametrize("kind", ["none", "model", "head"])
def test_a_capture_in_the_middle_leaves_other_texts_as_they_are(target, source_of, as_on_a_gpu, kind):
    """Requests decode while prompts of new kinds join, first as the decoder's own pass, then captured."""
    length = 0 if kind == "none" else 2
    params = SamplingParams(max_new_tokens=60, ignore_eos=True, draft_length=length)
    early, late = [TEXT[:20], TEXT[40:75]], [TEXT[:300], TEXT[1:330], TEXT[5:480], TEXT[9:480]]  # shorter ones run beside
    alone = Engine(target, **OPTIONS, prefix_sharing=False)
    want = [
        alone.generate(prompt, SamplingParams(max_new_tokens=60, ignore_eos=True, draft_length=0))[0].token_ids for prompt in early + late
    ]
    core = as_on_a_gpu(Engine(target, draft=source_of(kind), **(OPTIONS | {"max_batch": 6}), prefix_sharing=False)).core
    requests = [core.submit(core.open_sequence_state(), prompt, params, owns_cache=True) for prompt in early]
    for prompt in late:
        for _ in range(3):
            core.step()
        requests.append(core.submit(core.open_sequence_state(), prompt, params, owns_cache=True))
    while core.scheduler.running or core.scheduler.waiting:
        core.step()
    assert [r.token_ids[r.prompt_tokens :] for r in requests] == want
    assert len(core.runner._prompts) >= 2


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@torch.inference_mode()
def test_no_captured_pass_waits_for_the_device(llama):
    pool = llama.new_pool(400, 8)
    runner = GraphedDecoder(llama, pool, capture=True)
    for counts in ([300], [100, 60]):
        sequences = [pool.new_sequence() for _ in counts]
        ids = ids_of(counts)
        twice(runner, ids, sequences, counts, logits="last", taps=(2,))
        torch.cuda.set_sync_debug_mode("error")
        try:
            forward_reserved(runner, ids, sequences, counts, logits="last", taps=(2,))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(own.graph is not None for own in runner._prompts._passes.values()) and len(runner._prompts) == 2
