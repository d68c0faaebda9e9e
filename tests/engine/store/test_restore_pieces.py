"""A stored prefix comes back in pieces: others' steps run in between, and a restore that is broken off anywhere leaves nothing behind."""

from __future__ import annotations

import threading
import zlib

import pytest

from codec.errors import CorruptedCode
from engine.errors import PoolExhausted
from engine.runtime.sampling import SamplingParams
from engine.sessions.rates import Rates, measure
from engine.sessions.restore import SpanRestore
from engine.store.runs import PAGE_TOKENS, root_key

TEXT = "".join(f"def number_{i}(value):\n    '''Add {i} to it.'''\n    return value + {i}\n\n" for i in range(14))
LONG, OTHER = TEXT[:800], TEXT[37:700]  # tokens are bytes
GREEDY = SamplingParams(max_new_tokens=8, draft_length=2, ignore_eos=True)
STREAM = SamplingParams(max_new_tokens=60, draft_length=0, ignore_eos=True)
DRAWN = "".join(chr(97 + zlib.crc32(bytes([i % 256, i // 256])) % 26) for i in range(800))  # no span refers to another
PIECE, PIECES = 128, 6  # 768 of LONG's tokens are stored
SMALL = {"prefill_chunk": PIECE // 2}
DRAFTS = ("draft", "head", "states", "trunk", "none")
MEASURE = measure  # the real one: tests have another in its place


@pytest.fixture
def stored(store_engine):
    """`stored(draft)`: keeps LONG and OTHER."""

    def keep(draft="draft", **options):
        engine = store_engine(draft, **options)
        engine.generate([LONG, OTHER], GREEDY)
        engine.flush()
        engine.close()

    return keep


def submit(engine, text, params=GREEDY):
    return engine.core.submit(engine.core.open_sequence_state(), engine.encode(text), params, owns_cache=True)


def step_until_restoring(engine, request, pieces):
    """Step until so many pieces of the request's restore are done."""
    for _ in range(50):
        if request.sequence.length >= pieces * PIECE:
            assert request.restoring is not None and request.num_new == 0
            return
        engine.core.step()
    raise AssertionError("nothing is restored")


def check_empty(engine):
    """Nobody holds a page any more, but for caches."""
    assert engine.core.scheduler.idle
    engine.flush()
    for pool in (engine.core.pool, engine.core.draft_pool):
        if pool is not None:
            pool.check_integrity()
            assert pool.num_free_pages == pool.max_pages
    if engine.core.drafter is not None:
        assert not getattr(engine.core.drafter, "waiting", None)


def kv_of(engine, count):
    """The KV of LONG's first tokens that a request begins with in the pool."""
    session = engine.session(quality="tokens", log=lambda _: None)
    assert session.generate(LONG, GREEDY).reused_tokens == count
    rows = engine.core.target.read_kv(session.conversation.sequence, 0, count).clone()
    session.close()
    return rows


@pytest.mark.parametrize("draft", DRAFTS)
def test_others_go_on_between_pieces_and_all_text_is_as_alone(stored, store_engine, draft) -> None:
    stored(draft)
    whole = store_engine(draft, prefill_chunk=1024)
    wanted = whole.generate(LONG, GREEDY)[0]
    wanted_stream = whole.generate("Once upon a time", STREAM)[0].token_ids
    engine = store_engine(draft, **SMALL)
    assert engine.core.scheduler.restore_tokens == PIECE
    alone = store_engine(draft, **SMALL).generate(LONG, GREEDY)[0]
    stream = submit(engine, "Once upon a time", STREAM)
    engine.core.step()
    request = submit(engine, LONG)
    lengths, gained = [], []
    while not request.num_new:
        before = stream.num_new
        engine.core.step()
        gained.append(stream.num_new - before)
        lengths.append(request.sequence.length)
    assert lengths[:PIECES] == [PIECE * (n + 1) for n in range(PIECES)], "a piece a step"
    assert gained == [1] * len(gained) and len(gained) > PIECES, "and a token of the other request's beside each"
    result = engine.core.finish(request)
    assert result.token_ids == alone.token_ids == wanted.token_ids
    assert result.restored_tokens == result.reused_tokens == alone.restored_tokens == wanted.restored_tokens == 768
    assert engine.core.finish(stream).token_ids == wanted_stream
    assert 0 < result.restore_s < result.ttft_s
    metrics = engine.prefix_cache.metrics
    assert (metrics.hits, metrics.hit_tokens, engine.prefix_cache.report()["tiers"]["disk"]["hits"]) == (1, 768, 1)
    loss = kv_of(engine, 768), kv_of(whole, 768)
    assert float((loss[0] - loss[1]).norm() / loss[1].norm()) < 1e-4
    check_empty(engine)


@pytest.mark.parametrize("draft", DRAFTS)
def test_pieces_shorter_than_what_comes_before_the_spans(stored, store_engine, draft) -> None:
    """The attention sinks have no span: the target runs them, in the first piece, however short it is."""
    stored(draft)
    rows = []
    for chunk in (1024, 1):
        engine = store_engine(draft, prefill_chunk=chunk)
        assert engine.generate(LONG, GREEDY)[0].restored_tokens == 768
        rows.append(kv_of(engine, 768).unflatten(1, (engine.core.target.config.num_layers, -1)))
    error = (rows[1] - rows[0]).norm(dim=2) / rows[0].norm(dim=2)
    assert error.max() < 1e-3, "of every token in every layer"


def test_references_to_other_texts_come_with_each_piece(store_engine) -> None:
    """The same document behind another beginning is stored as what differs: pieces need what they refer to in the first text, and no more."""
    first = store_engine()
    for text in (LONG, "x" * 70 + LONG):
        first.generate(text, GREEDY)
        first.flush()
    assert first.prefix_cache.metrics.kept_referring > 0
    first.close()
    rows = []
    for options in ({"prefill_chunk": 1024}, SMALL):
        engine = store_engine("draft", **options)
        result = engine.generate("x" * 70 + LONG, GREEDY)[0]
        assert result.restored_tokens == (70 + len(LONG) - 1) // PAGE_TOKENS * PAGE_TOKENS and engine.prefix_cache.metrics.lent_tokens > 0
        rows.append(result.token_ids)
        session = engine.session(quality="tokens", log=lambda _: None)
        count = session.generate("x" * 70 + LONG, GREEDY).reused_tokens
        rows.append(engine.core.target.read_kv(session.conversation.sequence, 0, count).clone())
        session.close()
    assert rows[0] == rows[2] and float((rows[1] - rows[3]).norm() / rows[1].norm()) < 1e-4


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("pieces", [1, 4])
def test_a_request_that_is_cancelled_half_way_leaves_what_came_to_others(stored, store_engine, draft, pieces) -> None:
    stored(draft)
    wanted = store_engine(draft, **SMALL).generate(LONG, GREEDY)[0].token_ids
    engine = store_engine(draft, **SMALL)
    request = submit(engine, LONG)
    step_until_restoring(engine, request, pieces)
    engine.core.abandon(request)
    assert request.restoring is None
    check_empty(engine)
    result = engine.generate(LONG, GREEDY)[0]
    assert result.token_ids == wanted and result.reused_tokens == 768
    assert engine.prefix_cache.metrics.hit_tokens == 768 and engine.prefix_cache.metrics.hits == 2, "nothing is decoded twice"
    check_empty(engine)


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_request_that_is_interrupted_half_way_comes_back(stored, store_engine, draft) -> None:
    stored(draft)
    wanted = store_engine(draft, **SMALL).generate(LONG, GREEDY)[0].token_ids
    engine = store_engine(draft, **SMALL)
    request = submit(engine, LONG)
    step_until_restoring(engine, request, 3)
    with engine.core.lock:
        engine.core.scheduler._preempt(request)
    assert request.restoring is None and not request.sequence.pages
    assert engine.core.finish(request).token_ids == wanted
    assert engine.prefix_cache.metrics.hit_tokens == 768
    check_empty(engine)


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("fault", ["damage", "memory"])
def test_damage_half_way_is_computed_from_where_the_restore_stood(stored, store_engine, draft, fault, monkeypatch) -> None:
    stored(draft)
    engine, piece, calls = store_engine(draft, **SMALL), SpanRestore.piece, []

    def failing(self, *args):
        calls.append(1)
        count = piece(self, *args)
        if len(calls) == 4:  # its pages are written already
            raise CorruptedCode("damaged", "restore it") if fault == "damage" else PoolExhausted("full", "wait")
        return count

    monkeypatch.setattr(SpanRestore, "piece", failing)
    stream = submit(engine, "Once upon a time", STREAM)
    result = engine.core.finish(submit(engine, LONG))
    assert len(calls) == 4 and result.restored_tokens == 0 and result.reused_tokens == 3 * PIECE and len(result.token_ids) == 8
    assert len(store_engine.said) == 1 and "could not be restored" in store_engine.said[0]
    monkeypatch.undo()
    # the store holds good spans in fact: what was computed behind the third piece is not among what others begin with
    ends = store_engine(draft, **SMALL)
    request = submit(ends, LONG)
    step_until_restoring(ends, request, 3)
    request.restoring.close()
    assert ends.core.finish(request).token_ids == result.token_ids, "the rest is computed behind the same pieces"
    engine.core.finish(stream)
    check_empty(engine)


def test_a_span_that_is_none_half_way(store_engine) -> None:
    """Found only when its piece is read; the pieces before it are used."""
    engine = store_engine(**SMALL)
    engine.generate(DRAWN, GREEDY)
    engine.flush()
    engine.close()
    engine = store_engine(**SMALL)
    cache, ids = engine.prefix_cache, engine.encode(DRAWN)
    found = cache.store.lookup(root_key(cache._identity(None)), ids, 0, referring=True)
    assert found.end_page == 12 and not any(found.borrows(page) for page in range(12))
    cache.store.insert(cache._identity("other"), ids, [*found.spans[:7], *[b"no span"] * 5])
    request = submit(engine, DRAWN)
    request.namespace = "other"
    result = engine.core.finish(request)
    assert result.reused_tokens == 3 * PIECE and result.restored_tokens == 0 and len(result.token_ids) == 8
    assert len(store_engine.said) == 1
    check_empty(engine)


@pytest.mark.parametrize("draft", ["draft", "head", "none"])
def test_two_restores_at_once_are_made_one_after_the_other(stored, store_engine, draft) -> None:
    stored(draft)
    wanted = [store_engine(draft, **SMALL).generate(text, GREEDY)[0].token_ids for text in (LONG, OTHER)]
    engine = store_engine(draft, **SMALL)
    first, second, same = submit(engine, LONG), submit(engine, OTHER), submit(engine, LONG)
    lengths = [first.sequence.length, second.sequence.length, same.sequence.length]
    while second.restoring is not None or not second.num_new:
        engine.core.step()
        now = [first.sequence.length, second.sequence.length, same.sequence.length]
        if first.restoring is not None:
            assert now[0] == lengths[0] + PIECE and now[1:] == [0, 0]
        lengths = now
    results = [engine.core.finish(request) for request in (first, second, same)]
    assert [r.token_ids for r in results] == [*wanted, wanted[0]]
    assert [r.restored_tokens for r in results] == [768, 640, 0] and results[2].reused_tokens == 768, "the same prompt is decoded once"
    assert engine.prefix_cache.metrics.hits == 2 and engine.prefix_cache.report()["shared_hits"] == 1
    check_empty(engine)


def test_a_shorter_common_beginning_is_waited_for_only_as_long_as_it_comes(stored, store_engine) -> None:
    stored()
    engine = store_engine(**SMALL)
    first, other = submit(engine, LONG), submit(engine, LONG[:200] + "and something else, as long as it takes" * 5)
    engine.core.step()
    assert first.sequence.length == PIECE and other.asks_store, "its third page comes with the next piece"
    engine.core.step()
    engine.core.step()
    assert first.restoring is not None and other.sequence.length >= 192 and not other.asks_store
    assert engine.core.finish(other).reused_tokens == 192
    assert engine.core.finish(first).restored_tokens == 768
    check_empty(engine)


@pytest.mark.parametrize("draft", ["draft", "head", "none"])
def test_a_pool_that_fills_up_during_a_restore(stored, store_engine, draft) -> None:
    """Older requests need the pages that a restore holds: it is broken off, and taken up again once there is room."""
    stored(draft)
    wanted = store_engine(draft, **SMALL).generate(LONG, GREEDY)[0].token_ids
    engine = store_engine(draft, pool_tokens=18 * PAGE_TOKENS, **SMALL)
    engine.core.scheduler.headroom = 0
    params = SamplingParams(max_new_tokens=150, draft_length=0, ignore_eos=True)
    wanted_streams = store_engine(draft).generate(["Once", "Twice"], params)
    streams = [submit(engine, text, params) for text in ("Once", "Twice")]
    while streams[1].num_new < 55:
        engine.core.step()
    request = submit(engine, LONG, GREEDY)
    engine.core.step()
    assert request.restoring is not None and request.sequence.capacity >= 768, "its pages are its own from the start"
    with engine.core.lock:
        hog = engine.core.pool.new_sequence(engine.core.pool.num_free_tokens)
    while not engine.core.scheduler.preemptions:
        assert request.restoring is not None or request.num_new == 0
        engine.core.step()
    assert request in engine.core.scheduler.waiting and request.restoring is None
    with engine.core.lock:
        hog.free()
    results = [engine.core.finish(each) for each in (*streams, request)]
    assert [r.token_ids for r in results] == [*(r.token_ids for r in wanted_streams), wanted]
    check_empty(engine)


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_restore_behind_computed_pages_that_the_draft_does_not_know(stored, store_engine, chat_engine, draft) -> None:
    """It runs these tokens first, in pieces of their own, and each token at its own place."""
    stored(draft)
    engine, plain = store_engine(draft, **SMALL), chat_engine(draft)
    drawn = SamplingParams(max_new_tokens=1, draft_length=0, temperature=1.0)
    cache, engine.core.prefix_store = engine.core.prefix_store, None
    engine.core.shared_prefixes.draft_pool = None
    engine.generate(LONG[:200], drawn)
    engine.core.prefix_store = cache
    rows = []
    for each in (engine, plain):
        conversation = each.core.open_sequence_state()
        with each.core.lock:
            request = each.core.submit(conversation, each.encode(LONG), drawn, owns_cache=False)
        each.core.finish(request)
        rows.append(
            each.core.target.read_kv(conversation.sequence, 0, 768).unflatten(1, (each.core.target.config.num_layers, -1)).transpose(0, 1)
        )
        each.core.close_sequence_state(conversation)
        if each is engine:
            assert request.restored_tokens == 768 - 192 and request.reused_tokens == 768
    error = (rows[0] - rows[1]).pow(2).sum((1, 2)) / (rows[1] - rows[1].mean(1, keepdim=True)).pow(2).sum((1, 2))
    assert error.max() < 0.5, "of every layer; KV of other tokens would lose all of the variance"
    check_empty(engine)


def test_an_interrupt_in_a_piece_leaves_the_request_to_be_cancelled(stored, store_engine, monkeypatch) -> None:
    stored()
    engine, piece = store_engine(**SMALL), SpanRestore.piece
    request = submit(engine, LONG)
    step_until_restoring(engine, request, 2)

    def interrupted(self, *args):
        piece(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(SpanRestore, "piece", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.core.step()
    monkeypatch.undo()
    assert not request.sequence.length
    engine.core.abandon(request)
    check_empty(engine)
    assert engine.generate(LONG, GREEDY)[0].reused_tokens == 768


@pytest.mark.parametrize("draft", DRAFTS)
def test_an_error_of_the_program_in_a_piece_leaves_what_came_to_the_request_itself(stored, store_engine, draft, monkeypatch) -> None:
    stored(draft)
    engine = store_engine(draft, **SMALL)
    request = submit(engine, LONG)
    step_until_restoring(engine, request, 2)

    def failing(*args, **options):
        raise RuntimeError("a device's memory is full")

    monkeypatch.setattr(SpanRestore, "piece", failing)
    with pytest.raises(RuntimeError):
        engine.core.step()
    monkeypatch.undo()
    assert request.restoring is None and not request.sequence.pages
    assert engine.core.finish(request).reused_tokens == 2 * PIECE, "the pieces before are in the pool"
    check_empty(engine)


def test_what_two_texts_were_found_to_begin_with_is_not_compared_again(stored, store_engine) -> None:
    engine = store_engine("none")
    asked: list[slice] = []

    class Ids(list):
        def __getitem__(self, key):
            asked.append(key)
            return super().__getitem__(key)

    with engine.core.lock:
        request, alike, unlike = (submit(engine, text) for text in (LONG, LONG, OTHER))
        request.conversation.token_ids = Ids(request.token_ids)
        begin_alike = engine.core.scheduler._begin_alike
        assert [begin_alike(request, alike, end) for end in (64, 128, 128)] == [True] * 3
        assert asked == [slice(0, 64), slice(64, 128)]
        assert [begin_alike(request, unlike, end) for end in (64, 128)] == [False] * 2 and len(asked) == 3
        for one in (request, alike, unlike):
            engine.core.abandon(one)


def test_what_cannot_be_shared_or_kept_in_memory_is_restored_all_the_same(stored, store_engine, monkeypatch) -> None:
    stored("head")
    engine = store_engine("head", store_memory=1 << 24, **SMALL)
    engine.generate("x" * 200, GREEDY)
    engine.flush()
    assert engine.prefix_cache.host is not None

    def full(*args, **options):
        raise MemoryError("there is none")

    monkeypatch.setattr(engine.core.shared_prefixes, "insert_restored", full)
    monkeypatch.setattr(engine.prefix_cache.host, "insert", full)
    stream = submit(engine, "Once upon a time", STREAM)
    assert engine.core.finish(submit(engine, LONG)).restored_tokens == 768
    assert [said.split(":")[0] for said in store_engine.said] == [
        "a restored prefix could not be shared",
        "a restored prefix could not be kept in memory",
    ]
    monkeypatch.undo()
    engine.core.finish(stream)
    check_empty(engine)


def test_a_store_that_is_closed_during_a_restore(stored, store_engine) -> None:
    """What was found is in memory: it comes back all the same."""
    stored()
    engine = store_engine(**SMALL)
    request, waiting = submit(engine, LONG), submit(engine, LONG)
    step_until_restoring(engine, request, 2)
    engine.prefix_cache.close()
    assert engine.core.finish(request).restored_tokens == 768 and engine.core.finish(waiting).reused_tokens == 768


def test_rates_are_measured_in_pieces_between_which_requests_run(store_engine, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "home"))
    reached = []

    def measure(codec):
        scratch = codec.core.open_sequence_state()
        try:
            scratch.sequence.ensure(64)
            for number in range(5):
                reached.append(number)
                yield
        finally:
            codec.core.close_sequence_state(scratch)
        return Rates(0.0, 1e-6, 0.0, 1.0)

    engine = store_engine("none", quality="auto")
    monkeypatch.setattr("engine.sessions.rates.measure", measure)
    monkeypatch.setattr("engine.store.prefix_cache.SHORTEST", 500)
    monkeypatch.setattr("engine.sessions.rates.SHORTEST", 500)
    cache = engine.prefix_cache
    cache.codec.rates, cache._worker = None, threading.current_thread()  # pieces are asked for here alone
    engine.generate(TEXT[:400], GREEDY)
    while cache._jobs:
        cache._keep_some()
    assert not reached and cache.codec.rates is None, "too short to be worth it"
    engine.generate(LONG, GREEDY)
    for _ in range(2):
        cache._keep_some()
    assert reached == [0, 1] and cache._measuring is not None
    with engine.core.lock:
        free = engine.core.pool.num_free_pages
        assert cache.yield_pages(), "whoever needs pages gets those of a measurement, which begins anew"
        assert engine.core.pool.num_free_pages == free + 4 and cache._jobs
    reached.clear()
    for number in range(5):
        cache._keep_some()
        assert reached == list(range(number + 1)) and cache.codec.rates is None
        assert engine.generate("x" * 10, GREEDY)[0].new_tokens == 8, "the lock is free"
    cache._keep_some()
    assert cache.codec.rates == Rates(0.0, 1e-6, 0.0, 1.0) and cache.metrics.kept_tokens == 384
    engine.flush()
    assert cache.metrics.kept_tokens >= 384 + 768 and len(reached) == 5 and list((tmp_path / "home" / "rates").iterdir())


def test_a_measurement_gives_its_pages_to_requests_and_with_the_last_job(store_engine, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "home"))
    engine = store_engine("none", quality="auto", pool_tokens=1024)
    monkeypatch.setattr("engine.sessions.rates.measure", MEASURE)
    cache, pool = engine.prefix_cache, engine.core.pool
    cache.codec.rates, cache._worker = None, threading.current_thread()  # pieces are asked for here alone
    for ends_by in ("a request", "its job"):
        engine.generate(LONG[:550], GREEDY)
        cache._keep_some()
        (job,) = cache._jobs
        held = len(job.conversation.sequence.pages)
        assert pool.num_free_pages < pool.max_pages - held, "the measurement's own"
        if ends_by == "a request":
            assert engine.generate(TEXT[30:1030], GREEDY)[0].new_tokens == 8, "it needs nearly all of the pool"
        else:
            with engine.core.lock:
                cache._end(job)
        with engine.core.lock:
            for job in list(cache._jobs):
                cache._end(job)
        engine.core.shared_prefixes.clear()
        assert pool.num_free_pages == pool.max_pages and cache.codec.rates is None
    engine.generate(LONG[:550], GREEDY)
    engine.flush()
    assert cache.codec.rates is not None and cache._measuring is None
    check_empty(engine)


@pytest.mark.parametrize("full", ["before", "between"])
def test_a_pool_too_full_to_measure_in_is_no_measurement(store_engine, monkeypatch, tmp_path, full) -> None:
    """The store goes on without rates, which a later text has measured; nothing is remembered of it on this machine."""
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "home"))
    engine = store_engine("none", pool_tokens=1024)
    monkeypatch.setattr("engine.sessions.rates.measure", MEASURE)
    cache, pool = engine.prefix_cache, engine.core.pool
    cache.codec.rates, cache._worker = None, threading.current_thread()  # pieces are asked for here alone
    store_engine.said.clear()
    engine.generate(LONG[:550], GREEDY)
    if full == "between":
        for _ in range(5):
            cache._keep_some()
        assert cache._measuring is not None
    with engine.core.lock:
        hog = pool.new_sequence(pool.num_free_tokens)
    engine.flush()
    assert cache.codec.rates is None and cache.metrics.kept_tokens == 512 and not store_engine.said
    assert not list((tmp_path / "home").glob("rates/*"))
    with engine.core.lock:
        hog.free()
    engine.generate(OTHER, GREEDY)
    engine.flush()
    assert cache.codec.rates is not None and cache.metrics.kept_tokens == 512 + 640
    check_empty(engine)


@pytest.mark.parametrize("draft", ["draft", "head", "none"])
def test_a_session_is_resumed_in_pieces(chat_engine, tmp_path, monkeypatch, draft, let_others) -> None:
    """While others are served; its spans refer to earlier ones of the same text."""
    session = chat_engine(draft).session(quality="balanced", log=lambda _: None)
    session.generate(LONG, GREEDY)
    session.suspend(tmp_path / "file")
    whole = chat_engine(draft, prefill_chunk=1024).session(tmp_path / "file", restore="decode", log=lambda _: None)
    engine, steps, pieces = chat_engine(draft, **SMALL), [], []
    restore = SpanRestore.piece
    monkeypatch.setattr(SpanRestore, "piece", lambda *args: pieces.append(restore(*args)) or pieces[-1])
    let_others(engine.core, lambda: steps.append(engine.core.step()))
    stream = submit(engine, "Once upon a time", STREAM)
    resumed = engine.session(tmp_path / "file", restore="decode", log=lambda _: None)
    assert len(pieces) >= PIECES and len(steps) >= PIECES and stream.num_new >= PIECES - 1
    monkeypatch.undo()
    report = resumed.resumed
    assert report.tokens == whole.resumed.tokens > 700 and 0 < report.draft_s + report.decode_s < report.total_s
    rows = [each.core.target.read_kv(each.conversation.sequence, 0, report.tokens) for each in (resumed, whole)]
    assert float((rows[0] - rows[1]).norm() / rows[1].norm()) < 1e-4
    assert resumed.generate(" and", GREEDY).token_ids == whole.generate(" and", GREEDY).token_ids
    engine.core.finish(stream)
    resumed.close()
    check_closed(engine)


def check_closed(engine):
    for pool in (engine.core.pool, engine.core.draft_pool):
        if pool is not None:
            pool.check_integrity()
            assert pool.num_free_pages == pool.max_pages


def test_an_interrupt_between_two_pieces_of_a_resume_gives_pages_back(chat_engine, tmp_path, monkeypatch, let_others) -> None:
    session = chat_engine("draft").session(quality="balanced", log=lambda _: None)
    session.generate(LONG, GREEDY)
    session.suspend(tmp_path / "file")
    engine = chat_engine("draft", **SMALL)
    stream = submit(engine, "Once upon a time", STREAM)

    def interrupt():
        raise KeyboardInterrupt

    let_others(engine.core, interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.session(tmp_path / "file", restore="decode", log=lambda _: None)
    monkeypatch.undo()
    engine.core.finish(stream)
    check_closed(engine)


def test_the_benchmark_of_gaps_counts_steps(stored, store_engine) -> None:
    from bench_restore_gap import run

    stored()
    alone, beside = (run(store_engine(**SMALL), store_engine(**SMALL).encode(LONG), other) for other in (False, True))
    assert alone["gap_s"] is None and alone["steps"] == 0 and alone["restored_tokens"] == beside["restored_tokens"] == 768
    assert beside["steps"] >= PIECES and 0 < beside["gap_s"] < beside["ttft_s"]
