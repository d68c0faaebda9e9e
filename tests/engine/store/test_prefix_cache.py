"""An engine with a store: what one engine generated, another restores, for every kind of draft, and no fault costs an answer."""

from __future__ import annotations

import errno
import threading
import time

import pytest
import torch

from engine.errors import BadStore, InvalidOption
from engine.runtime.sampling import SamplingParams
from engine.sessions import kv_codec
from engine.sessions.file import SessionFile
from engine.sessions.kv_codec import SessionCodec
from engine.sessions.rates import Rates
from engine.store.borrowing import resolved
from engine.store.runs import PAGE_TOKENS
from engine.store.store import RunStore

TEXT = "".join(f"def number_{i}(value):\n    '''Add {i} to it.'''\n    return value + {i}\n\n" for i in range(14))
LONG = TEXT[:800]  # tokens are bytes
GREEDY = SamplingParams(max_new_tokens=8, draft_length=2, ignore_eos=True)
DRAFTS = ("draft", "head", "states", "trunk", "none")


def restored(engine, text=LONG, params=GREEDY):
    result = engine.generate(text, params)[0]
    assert result.restored_tokens <= result.reused_tokens <= result.prompt_tokens - 1
    return result


def kv_loss(engine, other, text):
    """Share of the KV's variance over the text's tokens by which a restored prefix differs from a computed one."""
    rows = []
    for each in (engine, other):
        session = each.session(quality="tokens", log=lambda _: None)
        session.generate(text, SamplingParams(max_new_tokens=1, draft_length=0))
        sequence = session.conversation.sequence
        rows.append(each.core.target.read_kv(sequence, 0, len(text)).flatten(1))
        session.close()
    return float((rows[0] - rows[1]).pow(2).sum() / (rows[0] - rows[0].mean(0)).pow(2).sum())


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_second_engine_restores_what_the_first_computed(store_engine, chat_engine, draft) -> None:
    first = store_engine(draft)
    plain = restored(first)
    assert plain.restored_tokens == 0
    first.flush()
    kept = first.prefix_cache.metrics
    pages = (len(LONG) + 7) // PAGE_TOKENS
    assert kept.kept_tokens == pages * PAGE_TOKENS and kept.kept_bytes > 0 and kept.hits == 0
    second = store_engine(draft)
    result = restored(second)
    assert result.restored_tokens == result.reused_tokens == (len(LONG) - 1) // PAGE_TOKENS * PAGE_TOKENS
    assert result.restore_s > 0 and result.ttft_s > result.restore_s
    assert len(result.token_ids) == 8 and second.prefix_cache.metrics.hits == 1
    # what came back is coded: random tiny models are coded badly, but KV of other tokens would lose more than all of the variance
    assert 0 < kv_loss(second, chat_engine(draft), LONG) < 0.5


@pytest.mark.parametrize("spoken", [True, False])
def test_an_interrupted_greedy_request_that_has_spoken_is_not_restored(store_engine, spoken) -> None:
    """Another process keeps its prompt meanwhile, coded: it has spoken from what it computed, and goes on from that."""
    first, second = (store_engine("none", prefix_sharing=False) for _ in range(2))
    request = first.core.submit(first.core.open_sequence_state(), first.encode(LONG), GREEDY, owns_cache=True)
    first.core.step()
    while spoken and request.num_new < 3:
        first.core.step()
    text = restored(second).token_ids
    second.flush()
    first.core.scheduler._preempt(request)
    result = first.core.finish(request)
    assert result.restored_tokens == (0 if spoken else (len(LONG) - 1) // PAGE_TOKENS * PAGE_TOKENS)
    assert result.token_ids == text or not spoken


@pytest.mark.parametrize("draft", ["draft", "head", "states"])
def test_what_is_restored_is_what_a_session_restores(store_engine, chat_engine, tmp_path, draft, monkeypatch) -> None:
    """The same spans by the same codec: the text that follows is the one that a resumed session gives, whose spans decode alone as a store's do. At
    a quality that codes a session's last tokens, too."""
    encoding = SessionCodec.encoding
    monkeypatch.setattr(SessionCodec, "encoding", lambda *args, **_: encoding(*args[:5]))  # without earlier spans
    prompt = LONG[:768]
    session = chat_engine(draft).session(quality="balanced", log=lambda _: None)
    session.generate(prompt, SamplingParams(max_new_tokens=1, draft_length=0))
    session.suspend(tmp_path / "file")
    resumed = chat_engine(draft).session(tmp_path / "file", restore="decode", log=lambda _: None)
    resumed.conversation.token_ids.pop()
    follow = resumed.generate(chat_engine("none").encode(LONG)[768:], GREEDY)
    first = store_engine(draft, quality="balanced")
    restored(first, prompt, SamplingParams(max_new_tokens=1, draft_length=0))
    first.flush()
    second = store_engine(draft, quality="balanced")
    result = restored(second)
    assert result.restored_tokens == 768 and result.token_ids == follow.token_ids
    session = second.session(quality="tokens", log=lambda _: None)
    assert session.generate(LONG, GREEDY).reused_tokens == 768
    kv = [each.core.target.read_kv(each.conversation.sequence, 0, 768) for each in (session, resumed)]
    assert torch.equal(*kv)


def test_drafts_are_as_good_after_a_restore(store_engine, chat_engine) -> None:
    first = store_engine("head")
    restored(first)
    first.flush()
    params = SamplingParams(max_new_tokens=48, draft_length=3, ignore_eos=True)
    result, plain = restored(store_engine("head"), LONG, params), chat_engine("head").generate(LONG, params)[0]
    assert result.restored_tokens > 700 and result.speculation.proposed > 20
    assert abs(result.speculation.acceptance_rate - plain.speculation.acceptance_rate) < 0.25


def test_a_batch_a_stream_and_a_session_are_served(store_engine) -> None:
    first = store_engine()
    first.generate([LONG, TEXT[100:700]], GREEDY)
    first.flush()
    second = store_engine()
    results = second.generate([LONG, TEXT[100:700], "something else entirely"], GREEDY)
    assert [r.restored_tokens for r in results] == [768, 576, 0]
    last = list(second.stream(LONG, GREEDY))[-1].result
    assert last is not None and last.reused_tokens == 768
    session = second.session(quality="tokens", log=lambda _: None)
    assert session.generate(LONG, GREEDY).reused_tokens == 768
    again = session.generate(" and on it goes", GREEDY)
    assert again.restored_tokens == 0 and again.reused_tokens >= len(LONG)  # its own cache knows more
    session.close()


def test_a_conversation_grows_across_processes(store_engine) -> None:
    """Each engine continues what the one before left; nothing is stored twice."""
    text = TEXT[:150]
    for turn in range(4):
        engine = store_engine()
        result = restored(engine, text)
        assert result.restored_tokens == (0 if turn == 0 else (len(text) - 1 - 200 + 8) // PAGE_TOKENS * PAGE_TOKENS if turn else 0)
        engine.flush()
        text = TEXT[: len(text)] + TEXT[len(text) : len(text) + 200]
        runs = engine.prefix_cache.report()["runs"]
        engine.close()
    assert runs == 3  # 750 bytes: two runs of 256 and a shorter one


@pytest.mark.parametrize("draft", DRAFTS)
def test_what_was_restored_stays_in_the_pool_for_the_next_request(store_engine, draft, monkeypatch, tmp_path) -> None:
    first = store_engine(draft)
    restored(first)
    first.flush()
    engine = store_engine(draft)
    result = restored(engine)
    decoded = engine.prefix_cache.codec.restore
    monkeypatch.setattr(engine.prefix_cache.codec, "restore", lambda *_: pytest.fail("a second hit is decoded"))
    again = restored(engine)
    assert again.token_ids == result.token_ids and again.restored_tokens == 0 and again.reused_tokens == result.reused_tokens == 768
    report = engine.prefix_cache.report()
    assert (report["hits"], report["shared_hits"], report["shared_tokens"]) == (1, 1, 768)
    # only as many whole codes as the prompts have in common
    other = restored(engine, LONG[:500] + "something else")
    assert other.reused_tokens == 448
    # promised to the bit: computed
    seeded = SamplingParams(max_new_tokens=8, seed=1, temperature=1.0, draft_length=2, ignore_eos=True)
    assert restored(engine, LONG, seeded).reused_tokens == 0
    # a session that shares them does not code them again
    session = engine.session(quality="near-lossless", log=lambda _: None)
    assert session.generate(LONG, GREEDY).reused_tokens == 768
    session.suspend(tmp_path / "file")
    spans = SessionFile.load(tmp_path / "file").spans
    kept = [s.data for s in session.conversation.restored_spans]
    assert [bytes(s.data) for s in spans[: len(kept)]] == kept and len(kept) == 12
    session.close()
    monkeypatch.setattr(engine.prefix_cache.codec, "restore", decoded)
    # more of the text is stored by now: what is missing is restored behind the shared pages
    longer = restored(engine, TEXT[:1100])
    assert longer.reused_tokens >= 768
    with engine.core.lock:  # the store's worker may be giving pages back
        engine.core.pool.check_integrity()


def test_drafts_come_from_what_another_process_was_answered(store_engine) -> None:
    prompt, params = LONG[:200], SamplingParams(max_new_tokens=121, ignore_eos=True, draft_length=8, seed=3, temperature=1.0)
    first = store_engine("ngram")
    plain = restored(first, prompt, params)
    first.flush()
    again, stranger = (restored(store_engine("ngram", namespace=name), prompt, params) for name in ("default", "other"))
    assert again.token_ids == stranger.token_ids == plain.token_ids and again.restored_tokens == 0
    assert again.speculation.from_seen_accepted > 80 and again.speculation.steps < plain.speculation.steps / 2
    assert stranger.speculation.from_seen == 0


@pytest.mark.parametrize("promise", ["seed", "deterministic"])
def test_what_is_promised_to_the_bit_is_not_restored(store_engine, chat_engine, promise) -> None:
    first = store_engine()
    restored(first)
    first.flush()
    params = SamplingParams(
        max_new_tokens=12, draft_length=2, ignore_eos=True, **({"seed": 3, "temperature": 1.0} if promise == "seed" else {})
    )
    options = {"deterministic": True} if promise == "deterministic" else {}
    second = store_engine("draft", **options)
    result = restored(second, LONG, params)
    assert result.restored_tokens == 0 and second.prefix_cache.metrics.skipped == 1
    assert result.token_ids == chat_engine("draft", **options).generate(LONG, params)[0].token_ids


def test_namespaces_qualities_and_models_do_not_mix(store_engine, folder) -> None:
    first = store_engine()
    restored(first)
    first.flush()
    for options in ({"namespace": "other"}, {"quality": "compact"}, {"draft": "head"}, {"draft": "none"}):
        assert restored(store_engine(**options)).restored_tokens == 0
    assert restored(store_engine()).restored_tokens > 0
    found = RunStore(folder)
    assert found.delete("other") > 0
    found.close()
    assert restored(store_engine()).restored_tokens > 0


def test_auto_keeps_ids_alone_where_restoring_does_not_pay(store_engine, folder, monkeypatch) -> None:
    slow = Rates(0.0, 1.0, 0.0, 1e-6)
    for rates, tokens in ((slow, 0), (Rates(0.0, 1e-6, 0.0, 1.0), 768)):
        first = store_engine(quality="auto")
        first.prefix_cache.codec.rates = rates
        restored(first)
        first.flush()
        assert bool(list(folder.rglob("*.run"))) == bool(tokens) and bool(list(folder.rglob("*.ids"))) == (not tokens)
        second = store_engine(quality="auto")
        second.prefix_cache.codec.rates = rates
        assert restored(second).restored_tokens == tokens
    # where it has become slower than computing, what is coded is left where it is
    third = store_engine(quality="auto")
    third.prefix_cache.codec.rates = slow
    assert restored(third).restored_tokens == 0 and third.prefix_cache.metrics.skipped == 1


def test_quality_tokens_needs_no_codec_and_keeps_ids(store_engine, folder) -> None:
    engine = store_engine(quality="tokens")
    assert engine.core.session_codec is None
    restored(engine)
    engine.flush()
    assert list(folder.rglob("*.ids")) and not list(folder.rglob("*.run")) and restored(engine).restored_tokens == 0


def test_a_session_keeps_the_code_that_a_store_gave_back(store_engine, tmp_path) -> None:
    first = store_engine()
    restored(first, LONG[:700])
    first.flush()
    second = store_engine()
    session = second.session(quality="near-lossless", log=lambda _: None)
    assert session.generate(LONG, GREEDY).restored_tokens == 640
    session.suspend(tmp_path / "file")
    known = second.prefix_cache.store.lookup(*_root_and_ids(second, session), referring=True)
    spans = resolved(second.prefix_cache.codec.codec, known).spans
    assert [bytes(span.data) for span in session.spans[:10]] == spans[:10]
    session.close()


def _root_and_ids(engine, session):
    from engine.store.runs import root_key

    return root_key(engine.prefix_cache._identity(None)), session.token_ids


# --- behind the answer --------------------------------------------------------------------------------------------------


def test_the_worker_keeps_without_being_asked(store_engine, folder) -> None:
    engine = store_engine()
    restored(engine)
    deadline = time.monotonic() + 300
    while engine.prefix_cache._jobs and time.monotonic() < deadline:
        time.sleep(0.01)
    with engine.core.lock:  # a job is forgotten before its pages are given back
        assert not engine.prefix_cache._jobs and list(folder.rglob("*.run"))
        assert engine.core.pool.num_free_pages == engine.core.pool.max_pages  # and gave the pages back


def test_nothing_is_coded_before_the_answer_is_there(store_engine, monkeypatch) -> None:
    engine = store_engine()
    cache, order = engine.prefix_cache, []
    coded, started = cache._code_piece, threading.Event()

    def watched(job):
        order.append("coded")
        started.set()
        return coded(job)

    monkeypatch.setattr(cache, "_code_piece", watched)
    for event in engine.stream(LONG, GREEDY):
        order.append("event" if event.result is None else "answer")
    assert started.wait(300) and "coded" not in order[: order.index("answer") + 1]


def test_a_page_is_coded_at_a_time_and_the_lock_is_free_between(store_engine, folder, monkeypatch) -> None:
    engine = store_engine()
    cache, pieces, waited = engine.prefix_cache, [], []
    encode = cache.codec.encode

    def watched(conversation, start, end, quality, **options):
        pieces.append(end - start)
        return encode(conversation, start, end, quality, **options)

    monkeypatch.setattr(cache.codec, "encode", watched)
    with engine.core.lock:
        restored(engine)
        thread = threading.Thread(target=lambda: waited.append(restored(engine, "something else")), daemon=True)
    thread.start()
    thread.join(300)
    engine.flush()
    assert waited and len(pieces) == len(LONG) // PAGE_TOKENS and max(pieces) == PAGE_TOKENS
    assert cache.metrics.kept_runs == 3 and cache.metrics.kept_tokens == len(LONG) // PAGE_TOKENS * PAGE_TOKENS
    assert restored(store_engine()).restored_tokens == 768


def test_pages_that_wait_are_given_up_when_they_are_needed(store_engine, monkeypatch) -> None:
    engine = store_engine(pool_tokens=1024)
    cache = engine.prefix_cache
    with engine.core.lock:  # the worker waits
        engine.generate(LONG, GREEDY)
        assert len(cache._jobs) == 1 and engine.core.pool.num_free_pages < 16
        assert len(engine.generate(TEXT[200:1000], GREEDY)[0].token_ids) == 8
        assert len(cache._jobs) == 1  # the second has taken the place of the first


def test_pages_that_wait_to_be_coded_are_held_by_no_request(store_engine) -> None:
    engine = store_engine("none", pool_tokens=1024)
    core, cache = engine.core, engine.prefix_cache
    cache._worker = threading.current_thread()  # nothing is coded until it is asked for
    ids = engine.encode(LONG[:200])
    with core.lock:
        requests = [core.submit(core.open_sequence_state(), ids, SamplingParams(max_new_tokens=8), owns_cache=True) for _ in range(2)]
        while not all(request.num_new for request in requests):
            core.step()
        pages = {page for request in requests for page in request.sequence.pages}
        assert core.held_share == len(pages) / core.pool.max_pages > 0
        for request in requests:
            core.finish(request)
    assert cache._jobs and core.pool.num_free_pages < core.pool.max_pages, "what waits"
    assert core.held_share == 0
    engine.flush()


def test_an_engine_that_is_closed_goes_on_without_its_store(store_engine) -> None:
    engine = store_engine()
    restored(engine)
    engine.close()
    assert engine.core.prefix_store is None and not engine.prefix_cache._jobs
    assert len(restored(engine).token_ids) == 8
    engine.close()
    assert restored(store_engine()).restored_tokens > 0


def test_threads_share_an_engine_and_its_store(store_engine) -> None:
    engine = store_engine()
    plain = {n: restored(engine, TEXT[n * 50 : n * 50 + 500]).token_ids for n in range(3)}
    failures = []

    def work(number: int) -> None:
        try:
            for _ in range(2):
                assert len(restored(engine, TEXT[number * 50 : number * 50 + 500]).token_ids) == len(plain[number])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.flush()
    assert not failures and engine.prefix_cache.store.verify().sound and not store_engine.said


# --- faults -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["full disk", "lock held", "read only"])
def test_a_store_that_cannot_be_written_costs_no_answer_and_is_said_once(store_engine, monkeypatch, fault) -> None:
    engine = store_engine()

    def refuse(*args):
        raise OSError(errno.ENOSPC if fault == "full disk" else errno.EROFS, "refused")

    if fault == "lock held":
        monkeypatch.setattr("engine.store.store._LOCK_WAIT_S", 0.0)
        monkeypatch.setattr("engine.store.store.try_lock", lambda descriptor: False)
    else:
        monkeypatch.setattr("engine.store.store.stage_bytes", refuse)
    for _ in range(2):
        assert len(restored(engine).token_ids) == 8
        engine.flush()
    assert len(store_engine.said) == 1 and "nothing can be kept" in store_engine.said[0]
    monkeypatch.undo()
    restored(engine)
    engine.flush()
    assert engine.prefix_cache.metrics.kept_tokens > 0


def test_damaged_runs_are_computed_again(store_engine, folder) -> None:
    first = store_engine()
    restored(first)
    first.close()
    for path in folder.rglob("*.run"):
        path.write_bytes(path.read_bytes()[:-9])
    second = store_engine()
    assert restored(second).restored_tokens == 0 and second.prefix_cache.report()["damaged"] >= 1
    second.flush()
    assert restored(store_engine()).restored_tokens > 0 and not store_engine.said


@pytest.mark.parametrize("draft", ["draft", "head", "states"])
def test_codes_that_do_not_decode_leave_the_request_whole(store_engine, chat_engine, monkeypatch, draft) -> None:
    """A run that is whole, with spans that are none: the caches are emptied, the prompt is computed."""
    engine = store_engine(draft)
    cache = engine.prefix_cache
    ids = engine.encode(LONG)
    cache.store.insert(cache._identity(None), ids, [b"no span"] * (len(ids) // PAGE_TOKENS))
    for _ in range(2):
        result = restored(engine)  # the runs are known, so nothing is kept in between
        assert result.restored_tokens == 0 and result.token_ids == chat_engine(draft).generate(LONG, GREEDY)[0].token_ids
    assert len(store_engine.said) == 1 and "could not be restored" in store_engine.said[0]
    engine.flush()
    assert engine.core.pool.num_free_pages == engine.core.pool.max_pages


def test_a_draft_heads_layers_are_left_for_later_by_sessions_alone(store_engine, chat_engine, tmp_path, monkeypatch) -> None:
    """A store's prefix goes to whoever begins so, with the head's pages: these must be full."""
    left, run = [], kv_codec.prefill_draft
    monkeypatch.setattr(kv_codec, "prefill_draft", lambda *args, leave=False: left.append(leave) or run(*args, leave=leave))
    first = store_engine("head")
    restored(first)
    first.flush()
    left.clear()
    assert restored(store_engine("head")).restored_tokens > 0 and left and not any(left)
    session = chat_engine("head").session(quality="balanced", log=lambda _: None)
    session.generate(LONG, SamplingParams(max_new_tokens=1, draft_length=0))
    session.suspend(tmp_path / "file")
    left.clear()
    chat_engine("head").session(tmp_path / "file", restore="decode", log=lambda _: None)
    assert left and all(left)


def test_options_are_checked(store_engine, chat_engine, tmp_path) -> None:
    for options in ({"quality": "best"}, {"namespace": ""}, {"namespace": "n" * 300}):
        with pytest.raises(InvalidOption):
            store_engine(**options)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(BadStore):
        chat_engine("draft", store=tmp_path / "other")


def test_what_overflowed_is_not_kept(store_engine, folder) -> None:
    engine = store_engine()
    with engine.core.lock:
        engine.generate(LONG, GREEDY)
        engine.core.pool.kv[:, 1, :, :, :, 0] = torch.inf
    engine.flush()
    assert not list(folder.rglob("*.run")) and len(store_engine.said) == 1 and "could not be coded" in store_engine.said[0]
