"""The facade: prompts, streams, conversations, stop strings, scheduling, figures, and errors that name a remedy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from engine.engine import Engine
from engine.errors import EmptyPrompt, InvalidOption, ModelNotFound, PoolExhausted, PromptTooLong
from engine.model.decoder import forward_reserved
from engine.runtime.sampling import SamplingParams
from engine.sessions.session import Session


class ByteTokenizer:
    """Tokens are bytes; 256 is the end of a turn."""

    eos_token_id = 256
    chat_template = "yes"

    class added_tokens_decoder(dict):
        pass

    def __init__(self):
        special = type("Token", (), {"content": "<|end|>", "special": True})
        self.added_tokens_decoder = {256: special}

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": list(text.encode())}

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>" * add_generation_prompt


@pytest.fixture(scope="module")
def target(random_decoder):
    return random_decoder(0, vocab_size=257, max_position_embeddings=256)


@pytest.fixture(scope="module")
def engine(target):
    return Engine(target, ByteTokenizer(), draft=target, page_size=16)


GREEDY = SamplingParams(max_new_tokens=24, draft_length=3)


def test_texts_ids_and_messages_are_prompts(engine):
    texts = engine.generate(["ab", "cde"], GREEDY)
    ids = engine.generate([list(b"ab"), list(b"cde")], GREEDY)
    assert [r.token_ids for r in texts] == [r.token_ids for r in ids]
    assert engine.generate("ab", GREEDY)[0].token_ids == texts[0].token_ids == engine.generate(list(b"ab"), GREEDY)[0].token_ids
    messages = [{"role": "user", "content": "hi"}]
    chat = engine.generate(messages, GREEDY)[0]
    assert chat.token_ids == engine.generate([messages], GREEDY)[0].token_ids == engine.generate("<user>hi<assistant>", GREEDY)[0].token_ids
    assert chat.prompt_tokens == len("<user>hi<assistant>")


def test_one_parameter_for_all_or_one_each(engine):
    short, long = engine.generate(["a", "a"], [SamplingParams(max_new_tokens=2), SamplingParams(max_new_tokens=5)])
    assert (short.new_tokens, long.new_tokens) == (2, 5) and long.token_ids[:2] == short.token_ids
    with pytest.raises(InvalidOption, match="2 sampling parameters were given for 1 prompts"):
        engine.generate(["a"], [GREEDY, GREEDY])


def test_results_carry_the_figures_of_the_run(engine, target):
    [result] = engine.generate(["abc"], SamplingParams(max_new_tokens=24, draft_length=3, seed=12))
    assert (result.prompt_tokens, result.reused_tokens, result.new_tokens, result.finish_reason) == (3, 0, 24, "length")
    assert result.text == ByteTokenizer().decode(result.token_ids, True, False)
    assert result.ttft_s > 0 and result.decode_s > 0 and result.tokens_per_s == pytest.approx(23 / result.decode_s)
    assert result.seed == 12
    pages = engine.core.pool.bytes + engine.core.draft_pool.bytes
    assert result.memory == {"target_bytes": target.weight_bytes, "draft_bytes": target.weight_bytes, "pool_bytes": pages}
    plain = json.loads(json.dumps(result.as_dict()))
    assert plain["speculation"]["acceptance_rate"] == 1 and plain["speculation"]["drafter"] == "model"
    assert set(plain) >= {
        "text",
        "finish_reason",
        "prompt_tokens",
        "reused_tokens",
        "new_tokens",
        "ttft_s",
        "decode_s",
        "tokens_per_s",
        "memory",
    }


def test_a_stream_gives_the_text_of_generate_in_pieces(engine):
    [whole] = engine.generate(["stream"], GREEDY)
    events = list(engine.stream("stream", GREEDY))
    assert "".join(e.text for e in events) == whole.text
    assert [t for e in events for t in e.token_ids] == whole.token_ids
    assert [e.finish_reason for e in events] == [None] * (len(events) - 1) + ["length"]
    assert events[-1].result.token_ids == whole.token_ids and all(e.result is None for e in events[:-1])
    assert max(len(e.token_ids) for e in events) == 4, "accepted runs arrive together"


def test_streams_interleave_and_may_be_left(engine):
    wanted = {p: engine.generate(p, GREEDY)[0].text for p in ("one", "two")}
    streams = {p: engine.stream(p, GREEDY) for p in wanted}
    left = engine.stream("three", GREEDY)
    next(left)
    engine.stream("never asked", GREEDY)
    texts = dict.fromkeys(wanted, "")
    while streams:
        for p in list(streams):
            event = next(streams[p])
            texts[p] += event.text
            if event.finish_reason:
                del streams[p]
    left.close()
    assert texts == wanted and engine.core.scheduler.idle
    assert engine.core.pool.num_free_pages == engine.core.pool.max_pages


@pytest.mark.parametrize("length", [0, 4])
def test_stop_strings_cut_text_and_caches(engine, length):
    [whole] = engine.generate(["stop me"], SamplingParams(max_new_tokens=60, ignore_eos=True))
    place = next(i for i in range(9, 60) if all(b < 128 for b in whole.token_ids[i : i + 2]))
    word = bytes(whole.token_ids[place : place + 2]).decode()
    params = SamplingParams(max_new_tokens=60, ignore_eos=True, stop=(word, "never this"), draft_length=length)
    conversation = engine.core.open_sequence_state()
    pieces = []
    result = engine.core.run(conversation, list(b"stop me"), params, pieces.append)
    assert result.finish_reason == "stop" and word not in result.text and "".join(pieces) == result.text
    assert result.token_ids == whole.token_ids[: len(result.token_ids)]
    cut = bytes(t for t in result.token_ids if t < 256).decode("utf-8", errors="replace")
    assert cut == result.text + word
    assert conversation.sequence.length == len(conversation.token_ids) - 1
    engine.core.close_sequence_state(conversation)


def test_end_tokens_and_special_stop_strings(target, random_decoder):
    plain = Engine(target, ByteTokenizer())
    [whole] = plain.generate(["x"], SamplingParams(max_new_tokens=50, ignore_eos=True))
    token = next(t for i, t in enumerate(whole.token_ids) if i > 4 and t not in whole.token_ids[:i])
    place = whole.token_ids.index(token)
    tokenizer = ByteTokenizer()
    tokenizer.eos_token_id = token
    ending = Engine(target, tokenizer, draft=target)
    for length in (0, 4):
        [result] = ending.generate(["x"], SamplingParams(max_new_tokens=50, draft_length=length))
        assert result.finish_reason == "eos" and result.token_ids == whole.token_ids[: place + 1]
        assert result.text == tokenizer.decode(whole.token_ids[:place], True, False)
    [on] = ending.generate(["x"], SamplingParams(max_new_tokens=50, ignore_eos=True))
    assert on.token_ids == whole.token_ids
    tokenizer = ByteTokenizer()
    tokenizer.added_tokens_decoder = {token: type("Token", (), {"content": "<|stop|>", "special": True})}
    [result] = Engine(target, tokenizer).generate(["x"], SamplingParams(max_new_tokens=50, ignore_eos=True, stop=("<|stop|>",)))
    assert result.finish_reason == "stop" and result.token_ids == whole.token_ids[: place + 1]


def test_a_conversation_reuses_its_caches(engine):
    conversation = engine.core.open_sequence_state()
    first = engine.core.run(conversation, list(b"hello"), GREEDY)
    second = engine.core.run(conversation, list(b"more"), GREEDY)
    assert second.reused_tokens == 5 + first.new_tokens - 1 and second.prompt_tokens == 5 + first.new_tokens + 4
    [fresh] = engine.generate([[*b"hello", *first.token_ids, *b"more"]], GREEDY)
    assert fresh.token_ids == second.token_ids
    assert engine.core.pool.num_free_pages < engine.core.pool.max_pages
    engine.core.close_sequence_state(conversation)
    assert (
        engine.core.pool.num_free_pages == engine.core.pool.max_pages
        and engine.core.draft_pool.num_free_pages == engine.core.draft_pool.max_pages
    )


@pytest.mark.parametrize("draft", ["model", "trunk"])
def test_a_conversation_filled_from_outside_goes_on(target, draft):
    engine = Engine(target, ByteTokenizer(), draft=target if draft == "model" else 1, page_size=16)
    prompt = list(b"filled from outside")
    [wanted] = engine.generate([prompt], GREEDY)
    conversation = engine.core.open_sequence_state()
    conversation.token_ids += prompt
    forward_reserved(target, torch.tensor(prompt), [conversation.sequence], [len(prompt)], logits="none")
    conversation.sequence.advance(len(prompt))
    result = engine.core.run(conversation, [], GREEDY)  # the cache holds everything: the last token runs again
    assert result.token_ids == wanted.token_ids and result.reused_tokens == len(prompt) - 1


def test_a_failing_callback_ends_the_request_and_leaves_the_conversation_usable(engine):
    conversation = engine.core.open_sequence_state()

    def fail(text):
        raise RuntimeError("screen gone")

    with pytest.raises(RuntimeError, match="screen gone"):
        engine.core.run(conversation, list(b"abc"), GREEDY, fail)
    assert engine.core.scheduler.idle and conversation.sequence.length == len(conversation.token_ids) - 1
    [wanted] = engine.generate([conversation.token_ids[:]], GREEDY)
    assert engine.core.run(conversation, [], GREEDY).token_ids == wanted.token_ids
    engine.core.close_sequence_state(conversation)


def test_requests_wait_for_room_and_all_finish(target):
    prompts = [[1 + i] * (3 + 9 * (i % 5)) for i in range(14)]
    params = [SamplingParams(max_new_tokens=4 + 5 * (i % 4), draft_length=i % 4) for i in range(14)]
    wanted = Engine(target, ByteTokenizer(), draft=target, page_size=8).generate(prompts, params)
    small = Engine(target, ByteTokenizer(), draft=target, page_size=8, pool_tokens=160, prefill_chunk=16, max_batch=5)
    most = 0

    def watched(step=small.core.scheduler.step):
        nonlocal most
        finished = step()
        most = max(most, len(small.core.scheduler.running))
        small.core.pool.check_integrity()
        small.core.draft_pool.check_integrity()
        return finished

    small.core.scheduler.step = watched
    results = small.generate(prompts, params)
    assert [r.token_ids for r in results] == [r.token_ids for r in wanted]
    assert 1 < most <= 5 and small.core.pool.num_free_pages == small.core.pool.max_pages == 20


def test_a_long_prompt_does_not_hold_up_the_others(target):
    engine = Engine(target, ByteTokenizer(), page_size=16, prefill_chunk=16)
    engine.core.scheduler.prefill_tokens = 16
    short = engine.stream([1, 2], SamplingParams(max_new_tokens=10))
    next(short)
    long = engine.stream([3] * 200, SamplingParams(max_new_tokens=1))
    next_of_long = []

    def spy(step=engine.core.scheduler.step):
        finished = step()
        next_of_long.append(max(len(r.token_ids) for r in engine.core.scheduler.running or finished))
        return finished

    engine.core.scheduler.step = spy
    [event] = list(long)
    assert event.finish_reason == "length" and len(next_of_long) == 13, "200 tokens in chunks of 16"
    assert sum(len(e.token_ids) for e in short) == 9, "the short request decoded beside it"


def test_the_context_bounds_prompt_and_text(target, engine):
    with pytest.raises(PromptTooLong, match="256"):
        engine.generate([[1] * 256])
    [result] = engine.generate([[1] * 250], SamplingParams(max_new_tokens=50, draft_length=4, ignore_eos=True))
    assert result.new_tokens == 6 and result.finish_reason == "length"
    [sampled] = engine.generate([[1] * 250], SamplingParams(max_new_tokens=50, draft_length=4, ignore_eos=True, temperature=1.0, seed=0))
    assert sampled.new_tokens == 6


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(engine, prompt):
    with pytest.raises(EmptyPrompt):
        engine.generate([prompt])
    with pytest.raises(EmptyPrompt):
        engine.stream(prompt)


@pytest.mark.parametrize(
    "ids, what",
    [
        ([True, False], "True"),
        (np.array([True]), "holds True"),
        (torch.tensor([1.0]), r"holds 1\.0"),
        ([1.0], r"1\.0"),
        ([-1, 2], "token id -1 is outside"),
        ([257], "token id 257 is outside"),
        ([1 << 70], "token id 1180591620717411303424 is outside"),
        (np.array([1, None], dtype=object), "holds None"),
        (np.zeros((1, 1, 2), int), r"holds \[0, 0\]"),
        ({1, 2}, "of type set"),
        (5, "of type int"),
        (np.int64(5), "input_ids are 5"),
    ],
    ids=str,
)
def test_ids_that_are_none_are_named(engine, ids, what):
    for call in (lambda: engine.generate(ids, GREEDY), lambda: engine.stream(ids, GREEDY)):
        with pytest.raises(InvalidOption, match=what):
            call()
    assert engine.core.scheduler.idle and engine.core.pool.num_free_pages == engine.core.pool.max_pages


@pytest.mark.parametrize("params", [{"max_new_tokens": 2}, 5, [5], "greedy"])
def test_parameters_that_are_none_are_named(engine, params):
    for call in (lambda: engine.generate("a", params), lambda: engine.stream("a", params)):
        with pytest.raises(InvalidOption, match="sampling parameters are"):
            call()


def test_most_tokens_may_be_any_number(engine):
    [result] = engine.generate([[1] * 250], SamplingParams(max_new_tokens=2**62, ignore_eos=True))
    assert result.new_tokens == 6, "the context ends it"


def test_refused_requests_leave_nothing_behind(target):
    engine = Engine(target, ByteTokenizer(), draft=target, page_size=16, pool_tokens=64)
    with pytest.raises(PoolExhausted, match="pool_tokens"):
        engine.generate(["a", "b"], [SamplingParams(max_new_tokens=8), SamplingParams(max_new_tokens=100)])
    assert engine.core.scheduler.idle and engine.core.pool.num_free_pages == 4
    conversation = engine.core.open_sequence_state()
    engine.core.run(conversation, [1] * 20, SamplingParams(max_new_tokens=8))
    with pytest.raises(PoolExhausted, match="close conversations"):
        engine.generate([[2] * 30], SamplingParams(max_new_tokens=8))
    before = list(conversation.token_ids)
    with pytest.raises(PoolExhausted):
        engine.core.run(conversation, [1] * 20, SamplingParams(max_new_tokens=90))
    assert conversation.token_ids == before
    engine.core.close_sequence_state(conversation)
    assert engine.core.scheduler.idle and engine.core.pool.num_free_pages == 4
    with pytest.raises(InvalidOption, match="token id 257"):
        engine.generate([[1, 257]])


def test_bad_options_name_a_remedy(target, engine, tmp_path):
    tokenizerless = Engine(target)
    for call in (
        lambda: Engine(target, draft=3),
        lambda: Engine(target, pool_tokens=10),
        lambda: Engine(target, max_batch=0),
        *(
            lambda name=name, value=value: Engine(target, **{name: value})
            for name, value in (
                ("pool_tokens", "x"),
                ("page_size", 1.5),
                ("page_size", True),
                ("max_batch", "64"),
                ("prefill_chunk", 0.5),
                ("deterministic", "yes"),
                ("ngrams", 1),
                ("prefix_sharing", None),
                ("costs", 5),
                ("store", 5),
            )
        ),
        lambda: Engine(target, store=tmp_path / "s", store_bytes="1G"),
        lambda: Engine(target, store=tmp_path / "s", namespace=5),
        lambda: engine.session(quality="tokens", log=None),
        lambda: engine.session(quality="tokens").suspend(None),
        lambda: engine.session(quality="tokens").generate("a", 5),
        lambda: engine.session(quality="tokens").generate("a", GREEDY, "on_text"),
        lambda: Session.from_bytes(engine.core, "text"),
        lambda: tokenizerless.generate(["text"]),
        lambda: tokenizerless.generate([[1]], SamplingParams(stop=("x",))),
        lambda: tokenizerless.core.keep_features((0,), lambda: None),
        lambda: engine.core.keep_features((9,), lambda: None),
        lambda: Engine.from_pretrained(tmp_path, device="abacus"),
        lambda: Engine.from_pretrained(tmp_path, device=None),
        lambda: Engine.from_pretrained(tmp_path, dtype="int7"),
        lambda: Engine.from_pretrained(tmp_path, dtype=torch.float64),
    ):
        with pytest.raises(InvalidOption) as caught:
            call()
        assert caught.value.remedy
    tokenizerless.core.pool.check_integrity()
    with pytest.raises(ModelNotFound):
        Engine.from_pretrained(tmp_path / "nothing")
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InvalidOption, match="chat template"):
        Engine(target, tokenizer).generate([{"role": "user", "content": "hi"}])


def test_from_pretrained_loads_target_draft_and_early_exit(tiny_model, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tiny_model("llama").folder
    words = {f"w{i}": i for i in range(97)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))).save_pretrained(folder)
    plain = Engine.from_pretrained(folder, device="cpu", dtype="float32")
    params = SamplingParams(max_new_tokens=12, draft_length=3)
    [wanted] = plain.generate([[4, 8, 15]], params)
    assert plain.drafter_name == "none" and plain.memory()["draft_bytes"] == 0 and plain.dtype == torch.float32
    assert plain.core.eos_token_ids == {5}
    for draft, name, options in ((folder, folder.name, {}), ("trunk", "early exit", {"exit_layer": 2}), ("trunk", "early exit", {})):
        engine = Engine.from_pretrained(folder, draft, device="cpu", dtype="float32", page_size=16, **options)
        [result] = engine.generate([[4, 8, 15]], params)
        assert result.token_ids == wanted.token_ids and result.speculation.drafter == name
    with pytest.raises(InvalidOption, match="exit_layer"):
        Engine.from_pretrained(folder, "none", device="cpu", exit_layer=2)


def test_costs_are_measured_once_and_frozen(target, monkeypatch):
    monkeypatch.setattr("engine.runtime.core.MEASURED_AFTER", 1)
    engine = Engine(target, draft=1)
    engine.generate([[1]], SamplingParams(max_new_tokens=2, draft_length=2))
    assert engine.core.cost_model is None, "a fixed length needs no costs"
    engine.generate([[1]], SamplingParams(max_new_tokens=2))
    costs = engine.core.cost_model
    engine.generate([[1]], SamplingParams(max_new_tokens=2))
    assert costs is not None and engine.core.cost_model is costs and costs.runs_last_draft
    assert Engine(target, draft=1, costs=costs).core.cost_model is costs
    assert engine.core.pool.num_free_pages == engine.core.pool.max_pages
