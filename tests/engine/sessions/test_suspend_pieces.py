"""A suspend in pieces: what others are served meanwhile, what breaks it off, and who waits for it."""

from __future__ import annotations

import threading

import pytest
import torch

from engine.errors import SessionBusy
from engine.runtime.sampling import SamplingParams

TEXT = "".join(f"def number_{i}(value):\n    '''Add {i} to it.'''\n    return value + {i}\n\n" for i in range(12))[:760]
GREEDY = SamplingParams(max_new_tokens=8, ignore_eos=True, draft_length=3)
STREAM = SamplingParams(max_new_tokens=40, ignore_eos=True, draft_length=0)
PIECES = 3  # of 256 tokens


def quiet(engine, **options):
    return engine.session(quality="balanced", log=lambda _: None, **options)


def spoken(engine):
    session = quiet(engine)
    session.generate(TEXT, GREEDY)
    return session


def stream_of(engine):
    with engine.core.lock:
        return engine.core.submit(engine.core.open_sequence_state(), engine.encode("Once upon a time"), STREAM, owns_cache=True)


@pytest.mark.parametrize("draft", ["draft", "head", "none"])
def test_a_session_is_coded_in_pieces_while_others_are_served(chat_engine, tmp_path, monkeypatch, draft):
    alone = spoken(chat_engine(draft))
    wanted = alone.to_bytes()
    engine, steps = chat_engine(draft), []
    session = spoken(engine)
    stream = stream_of(engine)
    monkeypatch.setattr("engine.runtime.core.time.sleep", lambda _: steps.append(engine.core.step()))  # between two pieces
    session.suspend(tmp_path / "a.kv")
    monkeypatch.undo()
    assert len(steps) >= PIECES - 1 and stream.num_new >= PIECES - 1
    assert (tmp_path / "a.kv").read_bytes() == wanted, "whatever ran in between"
    engine.core.finish(stream)
    again = session.generate(" and", GREEDY).token_ids
    assert again == alone.generate(" and", GREEDY).token_ids
    session.close()
    assert engine.core.pool.num_free_pages == engine.core.pool.max_pages


def test_an_interrupt_between_two_pieces_of_a_suspend_leaves_the_session_as_it_was(chat_engine, tmp_path, monkeypatch):
    engine = chat_engine("head")
    session = spoken(engine)
    sequence = session.conversation.sequence
    before = engine.core.target.read_kv(sequence, 0, sequence.length)
    stream = stream_of(engine)

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.runtime.core.time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.suspend(tmp_path / "a.kv")
    monkeypatch.undo()
    engine.core.finish(stream)
    assert not (tmp_path / "a.kv").exists() and session.spans == [] and session.suspended is None
    assert torch.equal(engine.core.target.read_kv(sequence, 0, sequence.length), before)
    wanted = spoken(chat_engine("head"))
    assert session.to_bytes() == wanted.to_bytes()
    assert session.generate(" and", GREEDY).token_ids == wanted.generate(" and", GREEDY).token_ids
    session.close()


def test_an_answer_and_a_close_wait_for_a_suspend_of_their_session(chat_engine, tmp_path, monkeypatch):
    engine = chat_engine("none")
    session, wanted = spoken(engine), spoken(chat_engine("none"))
    stream, found, threads = stream_of(engine), [], []

    def others(_):
        """Between the first two pieces: another thread asks for an answer."""
        engine.core.step()
        if not threads:
            threads.append(threading.Thread(target=lambda: found.append(session.generate(" and", GREEDY).token_ids)))
            threads[0].start()
            threads[0].join(0.2)
            assert threads[0].is_alive() and not found

    monkeypatch.setattr("engine.runtime.core.time.sleep", others)
    session.suspend(tmp_path / "a.kv")
    monkeypatch.undo()
    threads[0].join(60)
    assert (tmp_path / "a.kv").read_bytes() == wanted.to_bytes() and found == [wanted.generate(" and", GREEDY).token_ids]
    engine.core.finish(stream)
    session.close()


def test_the_benchmark_of_gaps_counts_steps(chat_engine, tmp_path):
    from bench_suspend_gap import AT_ONCE, PIECES, run

    engine = chat_engine("none")
    ids = engine.encode(TEXT)
    pieces, whole = (run(engine, ids, tmp_path / how, how) for how in (PIECES, AT_ONCE))
    assert (tmp_path / PIECES).read_bytes() == (tmp_path / AT_ONCE).read_bytes()
    assert pieces["steps"] >= 1 and 0 < pieces["gap_s"] <= pieces["suspend_s"] and whole["gap_s"] > 0
    assert engine.core.pool.num_free_pages == engine.core.pool.max_pages


def test_a_suspend_within_an_answer_is_of_what_is_there(chat_engine, tmp_path):
    session, kept = quiet(chat_engine("none")), []

    def on_text(_):
        if not kept:
            kept.append(session.suspend(tmp_path / "a.kv").tokens)
            with pytest.raises(SessionBusy):
                session.close()

    session.generate(TEXT, GREEDY, on_text)
    assert len(TEXT) < kept[0] + 1 < len(session.token_ids)
    with quiet(chat_engine("none"), file=tmp_path / "a.kv") as resumed:
        assert session.token_ids[: len(resumed.token_ids)] == resumed.token_ids
