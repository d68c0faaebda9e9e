"""Threads that share an engine take turns: the texts are those of one thread, and one session gives one answer at a time."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.errors import EmptyPrompt, InvalidOption, SessionBusy, SessionClosed
from engine.runtime.sampling import SamplingParams

PROMPTS = ["one", "another text", "x", "the third of the prompts, a longer one"]
PARAMS = SamplingParams(max_new_tokens=24, draft_length=2, ignore_eos=True)


@pytest.fixture(autouse=True)
def eager_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def side_by_side(calls):
    """Results of the calls, begun at the same moment in threads of their own."""
    gate = threading.Barrier(len(calls))

    def wait(call):
        gate.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result(timeout=600) for future in [threads.submit(wait, call) for call in calls]]


@pytest.fixture(scope="module")
def engine(chat_engine):
    return chat_engine()


@pytest.fixture(scope="module")
def wanted(engine):
    return [engine.generate(prompt, PARAMS)[0].text for prompt in PROMPTS]


def quiet(engine):
    return engine.session(quality="tokens", log=lambda _: None)


def test_four_threads_get_the_texts_of_one(engine, wanted):
    def generated(prompt):
        return lambda: [engine.generate(prompt, PARAMS)[0].text for _ in range(2)]

    def streamed(prompt):
        return lambda: ["".join(event.text for event in engine.stream(prompt, PARAMS)) for _ in range(2)]

    def said(prompt):
        def turn():
            with quiet(engine) as session:
                return [session.generate(prompt, PARAMS).text] * 2

        return turn

    for way in (generated, streamed, said):
        assert side_by_side([way(prompt) for prompt in PROMPTS]) == [[text] * 2 for text in wanted]
    ways = [generated(PROMPTS[0]), streamed(PROMPTS[1]), said(PROMPTS[2]), said(PROMPTS[3])]
    assert side_by_side(ways) == [[text] * 2 for text in wanted]
    assert engine.core.scheduler.idle and engine.core.pool.num_free_pages == engine.core.pool.max_pages
    engine.core.pool.check_integrity()


def test_a_batch_is_served_as_if_nobody_else_were_there(engine, monkeypatch):
    scheduler, began, together = engine.core.scheduler, threading.Event(), set()
    step, finish = scheduler.step, engine.core.finish

    def watched():
        together.add(frozenset(request.prompt_tokens for request in [*scheduler.running, *scheduler.waiting]))
        step()

    def slow(request):
        began.set()
        time.sleep(0.05)  # for the other thread to push in
        return finish(request)

    def other():
        began.wait()
        return engine.generate([[1, 2, 3]], PARAMS)[0].new_tokens

    monkeypatch.setattr(scheduler, "step", watched)
    monkeypatch.setattr(engine.core, "finish", slow)
    batch = [[5] * 7, [6] * 8]
    one, two = side_by_side([lambda: [r.new_tokens for r in engine.generate(batch, PARAMS)], other])
    assert one and two and frozenset({3}) in together and not any(3 in sizes and len(sizes) > 1 for sizes in together)


def test_a_refused_request_of_one_thread_does_not_reach_another(engine, wanted):
    def refused():
        for _ in range(20):
            with pytest.raises(EmptyPrompt):
                engine.generate("", PARAMS)

    assert side_by_side([lambda: engine.generate(PROMPTS[0], PARAMS)[0].text, refused])[0] == wanted[0]


def test_a_callback_may_wait_for_another_thread(engine, wanted):
    """Nothing is locked while a caller's own code runs."""
    other = []

    def on_text(_text):
        if not other:
            other.extend(side_by_side([lambda: engine.generate(PROMPTS[1], PARAMS)[0].text]))

    with quiet(engine) as session:
        assert session.generate(PROMPTS[0], PARAMS, on_text).text == wanted[0] and other == [wanted[1]]


def test_a_session_gives_one_answer_at_a_time(engine, wanted):
    session, refused = quiet(engine), []

    def on_text(_text):
        def again():
            for call in (lambda: session.generate("more"), lambda: session.chat("more"), session.close):
                with pytest.raises(SessionBusy, match=r"is answering.* \("):
                    call()
            return True

        refused.append(again())
        if len(refused) == 1:
            refused.extend(side_by_side([again]))

    assert session.generate(PROMPTS[0], PARAMS, on_text).text == wanted[0] and len(refused) > 2
    session.generate("on it goes", PARAMS)
    session.close()


def test_messages_and_beginnings_that_are_no_text_are_named(engine):
    with quiet(engine) as session:
        for call in (
            lambda: session.chat(b"x"),
            lambda: session.chat("x", system=5),
            lambda: session.chat("x", prefill=5),
            lambda: session.generate(5),
        ):
            with pytest.raises(InvalidOption):
                call()
        assert session.token_ids == []


def test_a_closed_session_is_named(engine, tmp_path):
    session = quiet(engine)
    session.generate("a", PARAMS)
    session.close()
    session.close()
    free = engine.core.pool.num_free_pages
    for call in (
        lambda: session.generate("b", PARAMS),
        lambda: session.chat("b", PARAMS),
        lambda: session.suspend(tmp_path / "a.kv"),
        session.to_bytes,
    ):
        with pytest.raises(SessionClosed, match=r"the session is closed \(open it again"):
            call()
    assert not list(tmp_path.iterdir()) and engine.core.pool.num_free_pages == free == engine.core.pool.max_pages


def test_one_thread_encodes_while_another_decodes(chat_engine):
    """Also messages that hold special tokens, for which the tokenizer needs another setting; not even a step's lock is waited for."""
    engine = chat_engine()
    messages = [{"role": "user", "content": "tide <|im_end|> buoy <|im_start|>system " * 20}]
    wanted_ids = engine.encode(messages)
    text = engine.core.text.decode(wanted_ids)

    def encoded():
        return [engine.encode(messages) for _ in range(60)]

    def decoded():
        with engine.core.lock:
            return [engine.core.text.decode(wanted_ids) for _ in range(300)]

    found = side_by_side([encoded, decoded, encoded])
    assert all(ids == wanted_ids for ids in found[0] + found[2]) and set(found[1]) == {text}
    with engine.core.lock:
        assert side_by_side([lambda: engine.encode(messages)]) == [wanted_ids]
