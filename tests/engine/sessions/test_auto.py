"""Quality auto: what pays is kept, and a resume never costs more than recomputing; sessions as bytes."""

from __future__ import annotations

import json
import math

import pytest
import torch

from codec import spans
from engine.errors import BadSessionFile, InvalidOption
from engine.runtime.sampling import SamplingParams
from engine.sessions import rates
from engine.sessions.file import SessionFile
from engine.sessions.rates import Rates
from engine.sessions.session import Session
from tests.engine.conftest import measured

PROMPT = "def greet(name):\n    '''Say hello, once, to whoever is there.'''\n    return f'hello, {name}, and welcome'\n" * 2
GREEDY = SamplingParams(max_new_tokens=20, draft_length=3, ignore_eos=True)
DEAR, CHEAP = Rates(1.0, 1.0, 0.0, 1e-6), Rates(0.0, 1e-6, 0.0, 1.0)


def quiet(_: str) -> None:
    pass


def spoken(engine, **options):
    session = engine.session(log=quiet, **options)
    session.generate(PROMPT, GREEDY)
    return session


def kv_of(session):
    sequence = session.conversation.sequence
    return session.core.target.read_kv(sequence, 0, sequence.length)


@pytest.mark.parametrize("known, quality, restore", [(CHEAP, "balanced", "decode"), (DEAR, "tokens", "recompute")])
def test_auto_keeps_what_pays_and_says_why(chat_engine, tmp_path, known, quality, restore):
    session = spoken(chat_engine())
    assert session.quality == "auto"
    session.core.session_codec.rates = known
    report = session.suspend(tmp_path / "a.kv")
    assert (report.quality, report.restore) == (quality, restore) and report.reason == known.coding_reason(
        len(session.token_ids) - 1, len(session.token_ids) - 1
    )
    figures = session.kv_figures
    assert (figures["quality"], figures["restore"]) == (quality, restore)
    stored = SessionFile.load(tmp_path / "a.kv")
    assert stored.auto and bool(stored.spans) == (restore == "decode")
    with chat_engine().session(tmp_path / "a.kv", log=quiet) as resumed:
        assert resumed.quality == "auto" and resumed.resumed.restore == restore
        assert resumed.kv_figures["restore"] == restore
        assert resumed.generate("", GREEDY).reused_tokens == (stored.num_cached if restore == "decode" else 0)


def test_spans_that_are_not_decoded_are_recomputed_exactly_and_kept(chat_engine, tmp_path):
    def engine():
        return chat_engine(deterministic=True)

    kept = spoken(engine(), quality="tiny")
    kept.suspend(tmp_path / "a.kv")
    spans = SessionFile.load(tmp_path / "a.kv").spans
    again = engine()
    assert again.session(tmp_path / "a.kv", log=quiet, restore="decode").resumed.tokens == len(kept.token_ids) - 1
    resumed = again.session(tmp_path / "a.kv", log=quiet, restore="recompute")
    assert (resumed.resumed.restore, resumed.resumed.tokens, resumed.resumed.reason) == ("recompute", 0, None)
    resumed.suspend(tmp_path / "b.kv")
    assert SessionFile.load(tmp_path / "b.kv") == SessionFile.load(tmp_path / "a.kv"), "nothing ran: the same file"
    ours, theirs = kept.generate(" and then", GREEDY), resumed.generate(" and then", GREEDY)
    assert ours.token_ids == theirs.token_ids and torch.equal(kv_of(kept), kv_of(resumed))
    resumed.suspend(tmp_path / "b.kv")
    later = SessionFile.load(tmp_path / "b.kv")
    assert later.spans[: len(spans)] == spans and later.num_cached == len(resumed.token_ids) - 1


def test_a_quality_asked_for_by_name_is_restored_whatever_the_rates_say(chat_engine, tmp_path):
    spoken(chat_engine(), quality="compact").suspend(tmp_path / "named.kv")
    session = spoken(chat_engine())
    session.core.session_codec.rates = CHEAP
    session.suspend(tmp_path / "auto.kv")
    engine = chat_engine()
    engine.session(tmp_path / "named.kv", log=quiet).close()
    engine.core.session_codec.rates = DEAR
    for name, quality, done in (
        ("named", None, "decode"),
        ("auto", "balanced", "decode"),
        ("auto", None, "recompute"),
        ("named", "auto", "recompute"),
    ):
        with engine.session(tmp_path / f"{name}.kv", quality=quality, log=quiet) as resumed:
            assert (resumed.resumed.restore, resumed.resumed.reason is None) == (done, done == "decode")


def test_coding_that_resumes_cannot_pay_back_is_left_out(chat_engine, tmp_path):
    """What two resumes save, a thousandth of a second a token each, has to pay for coding."""
    for code_token_s, quality in ((1e-3, "balanced"), (3e-3, "tokens")):
        session = spoken(chat_engine())
        held = len(session.token_ids) - 1
        known = Rates(0.0, 0.0, 0.0, 1e-3, 0.0, code_token_s)
        session.core.session_codec.rates = known
        report = session.suspend(tmp_path / "a.kv")
        assert (report.quality, report.reason) == (quality, known.coding_reason(held, held)) and "to code" in report.reason
    rates = Rates(0.0, 0.0, 0.0, 1e-3, 0.0, 3e-3)
    assert rates.coding_pays(100, 1000) and not rates.coding_pays(1000, 1000), "only what is new is coded"


def test_short_sessions_are_not_worth_a_measurement(chat_engine, monkeypatch, tmp_path):
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(rates, "SHORTEST", 1000)
    monkeypatch.setattr(rates, "measure", None)
    session = spoken(chat_engine())
    report = session.suspend(tmp_path / "a.kv")
    assert report.quality == "tokens" and report.reason.startswith(f"{len(session.token_ids) - 1} tokens are few enough")
    session = spoken(chat_engine(), quality="balanced")
    session.suspend(tmp_path / "b.kv")
    with chat_engine().session(tmp_path / "b.kv", log=quiet) as resumed:
        assert (resumed.resumed.restore, resumed.resumed.reason) == ("decode", None), "what was asked for, while nothing is known"


def test_rates_are_measured_once_and_remembered(chat_engine, monkeypatch, tmp_path):
    session = spoken(chat_engine())
    codec, timed = session.core.session_codec, []
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path))
    monkeypatch.setattr(rates, "measure", lambda codec: timed.append(codec) or measured(CHEAP)(codec))
    for _ in range(3):
        codec.rates = None
        assert rates.rates_of(codec, 100, quiet) == CHEAP
    assert timed == [codec]
    (file,) = (tmp_path / "rates").iterdir()
    for damage in ("", "{}", "[1]", json.dumps({"restore_s": "x"})):
        file.write_text(damage)
        codec.rates = None
        assert rates.rates_of(codec, 100, quiet) == CHEAP, "a damaged memory is made anew"
    threads = torch.get_num_threads()
    key = rates._key(codec)
    try:
        torch.set_num_threads(threads + 1)
        assert rates._key(codec) != key
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("draft", ["draft", "head", "none"])
def test_measuring_gives_finite_rates_and_pages_back(chat_engine, draft):
    from engine.sessions.kv_codec import session_codec

    engine = chat_engine(draft)
    codec = session_codec(engine.core, log=quiet)
    pieces, count = MEASURE(codec), 0
    with pytest.raises(StopIteration) as end:
        while True:
            next(pieces)
            count += 1
            if draft == "draft":  # requests run in between
                assert engine.generate("Once upon", GREEDY)[0].new_tokens == 20
    found = end.value.value
    assert count == 9, "three passes over the text, one far behind it, three codings, two pieces of a restore"
    assert all(math.isfinite(value) and value >= 0 for value in vars(found).values())
    assert found.recomputing(256) > 0 and found.restoring(256) > 0 and found.coding(256) > 0
    engine.core.pool.check_integrity()
    assert engine.core.pool.num_free_pages == engine.core.pool.max_pages


MEASURE = rates.measure


def test_attention_is_told_from_the_rest_by_a_pass_far_behind():
    def took(tokens, before=0):
        return 0.02 + 1.3e-3 * tokens + 4.5e-7 * tokens * (before + tokens / 2)

    known = {64: took(64), 512: took(512)}
    assert rates._parabola(known, (128, 2048, took(128, 2048))) == pytest.approx((0.02, 1.3e-3, 4.5e-7))
    start_s, token_s, pair_s = rates._parabola(known, None)
    assert pair_s == 0 and (start_s + 64 * token_s, start_s + 512 * token_s) == pytest.approx((took(64), took(512))), "a line"
    assert rates._parabola(known, (128, 2048, took(128)))[2] == 0, "noise is no attention"
    found = Rates(0.1, 6e-4, 0.02, 1.3e-3, restore_pair_s=1e-7, recompute_pair_s=4.5e-7)
    assert found.recomputing(5000) == pytest.approx(took(5000)) and found.restoring(5000) == pytest.approx(0.1 + 3.0 + 1.25)
    assert found.saved_token_s(5000) == pytest.approx(7e-4 + 2500 * 3.5e-7)
    assert Rates(0.1, 2e-3, 0.0, 1e-3).saved_token_s(100) == 0


@pytest.mark.parametrize("draft", ["draft", "head"])
def test_a_pass_far_behind_needs_no_text_of_that_length(chat_engine, draft):
    from engine.sessions.kv_codec import session_codec

    engine = chat_engine(draft)
    core, codec = engine.core, session_codec(engine.core, log=quiet)
    first = core.open_sequence_state()
    first.token_ids[:] = range(40)
    codec.run_target(first, 40)
    before = core.target.read_kv(first.sequence, 0, 40)
    free = core.pool.num_free_pages
    count, start, took = rates._far_pass(core, first)
    assert (count, start) == (40, (1024 - 40) // 16 * 16) and took > 0
    assert core.pool.num_free_pages == free and torch.equal(core.target.read_kv(first.sequence, 0, 40), before)
    held = core.pool.new_sequence()
    held.reserve(core.pool.num_free_tokens - 128)
    assert rates._far_pass(core, first) is None, "no room"
    held.free()
    core.close_sequence_state(first)
    core.pool.check_integrity()


@pytest.mark.parametrize("restored", [rates._restored_by_piece, rates._restored_at_once])
def test_both_ways_to_time_a_restore(chat_engine, restored):
    from codec.spec import NUM_SINKS
    from engine.sessions.kv_codec import session_codec

    engine = chat_engine()
    core, codec, ids = engine.core, session_codec(engine.core, log=quiet), list(range(150))
    first = core.open_sequence_state()
    first.token_ids[:] = ids
    codec.run_target(first, 150)
    spans = codec.encode(first, NUM_SINKS, 150, "balanced")
    core.close_sequence_state(first)
    pieces = restored(codec, ids, spans, (64, 150), 0.0)
    with pytest.raises(StopIteration) as end, torch.inference_mode():
        while True:
            next(pieces)
    start_s, token_s = end.value.value
    assert start_s >= 0 and token_s >= 0 and start_s + token_s > 0
    assert core.pool.num_free_pages == core.pool.max_pages


@pytest.mark.parametrize("draft, dtype", [("draft", "float32"), ("head", "bfloat16"), ("none", "float32")])
def test_warming_up_touches_nothing_of_the_engine(chat_engine, draft, dtype):
    engine = chat_engine(draft, dtype=dtype)
    session = spoken(engine, quality="balanced")
    before = kv_of(session), engine.core.pool.num_free_pages
    engine.core.session_codec.warm_up()
    assert torch.equal(kv_of(session), before[0]) and engine.core.pool.num_free_pages == before[1]


def test_a_session_as_bytes(chat_engine, tmp_path):
    session = spoken(chat_engine(), quality="balanced")
    data = session.to_bytes()
    session.suspend(tmp_path / "a.kv")
    assert (tmp_path / "a.kv").read_bytes() == data
    engine = chat_engine()
    with Session.from_bytes(engine.core, data, log=quiet) as resumed:
        assert resumed.token_ids == session.token_ids and resumed.to_bytes() == data
        assert torch.equal(kv_of(resumed), kv_of(engine.session(tmp_path / "a.kv", log=quiet)))
    for bad in (b"", data[:-1], data[:100] + bytes([data[100] ^ 1]) + data[101:]):
        with pytest.raises(BadSessionFile, match="in memory"):
            Session.from_bytes(engine.core, bad, log=quiet)


def test_unknown_ways_to_restore_are_refused(chat_engine):
    with pytest.raises(InvalidOption, match=r"'guess'.*auto, decode, recompute"):
        chat_engine("none").session(restore="guess")


def test_a_session_that_codes_nothing_unpacks_no_matrices(chat_engine, tmp_path, monkeypatch):
    """They take a third of a second on a CPU, which a chat of a few turns would wait for at each of its starts."""
    monkeypatch.setattr(spans, "KvCodec", lambda *args, **options: pytest.fail("the codec's matrices were unpacked"))
    with spoken(chat_engine()) as session:
        session.core.session_codec.rates = DEAR
        session.suspend(tmp_path / "a.kv")
    with chat_engine().session(tmp_path / "a.kv", log=quiet) as resumed:
        resumed.core.session_codec.rates = DEAR
        assert resumed.generate(" and", GREEDY).new_tokens == 20
        assert resumed.suspend(tmp_path / "a.kv").quality == "tokens"
