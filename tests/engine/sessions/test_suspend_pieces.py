"""A suspend in pieces: what others are served meanwhile, what breaks it off, and who waits for it."""

from __future__ import annotations

import threading

import pytest
import torch

from engine.errors import SessionBusy, SessionClosed
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
def test_a_session_is_coded_in_pieces_while_others_are_served(chat_engine, tmp_path, monkeypatch, draft, let_others):
    alone = spoken(chat_engine(draft))
    wanted = alone.to_bytes()
    engine, steps = chat_engine(draft), []
    session = spoken(engine)
    stream = stream_of(engine)
    let_others(engine.core, lambda: steps.append(engine.core.step()))
    session.suspend(tmp_path / "a.kv")
    monkeypatch.undo()
    assert len(steps) >= PIECES - 1 and stream.num_new >= PIECES - 1
    assert (tmp_path / "a.kv").read_bytes() == wanted, "whatever ran in between"
    engine.core.finish(stream)
    again = session.generate(" and", GREEDY).token_ids
    assert again == alone.generate(" and", GREEDY).token_ids
    session.close()
    assert engine.core.pool.num_free_pages == engine.core.pool.max_pages


def test_an_interrupt_between_two_pieces_of_a_suspend_leaves_the_session_as_it_was(chat_engine, tmp_path, monkeypatch, let_others):
    engine = chat_engine("head")
    session = spoken(engine)
    sequence = session.conversation.sequence
    before = engine.core.target.read_kv(sequence, 0, sequence.length)
    stream = stream_of(engine)

    def interrupt():
        raise KeyboardInterrupt

    let_others(engine.core, interrupt)
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


def test_an_answer_and_a_close_wait_for_a_suspend_of_their_session(chat_engine, tmp_path, monkeypatch, let_others):
    engine = chat_engine("none")
    session, wanted = spoken(engine), spoken(chat_engine("none"))
    stream, found, threads = stream_of(engine), [], []

    def others():
        """Between the first two pieces: another thread asks for an answer."""
        engine.core.step()
        if not threads:
            threads.append(threading.Thread(target=lambda: found.append(session.generate(" and", GREEDY).token_ids)))
            threads[0].start()
            threads[0].join(0.2)
            assert threads[0].is_alive() and not found

    let_others(engine.core, others)
    session.suspend(tmp_path / "a.kv")
    monkeypatch.undo()
    threads[0].join(300)
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


def in_a_thread(work):
    """Its result or its error; fails where it hangs."""
    found = []

    def run():
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(300)
    assert found, "it hangs"
    return found[0]


def test_what_is_asked_within_a_suspend_by_the_same_thread_is_refused(chat_engine, tmp_path, monkeypatch, let_others):
    engine, refused = chat_engine("none"), []
    session = spoken(engine)
    stream = stream_of(engine)

    def asked_within():
        """What a signal's handler does between two pieces."""
        asked = (lambda: session.suspend(tmp_path / "b.kv"), session.to_bytes, lambda: session.generate(" and", GREEDY), session.close)
        for ask in asked:
            with pytest.raises(SessionBusy, match="is being suspended"):
                ask()
            refused.append(ask)

    let_others(engine.core, asked_within)
    report = in_a_thread(lambda: session.suspend(tmp_path / "a.kv"))
    monkeypatch.undo()
    assert report is session.suspended and len(refused) >= 4 and not (tmp_path / "b.kv").exists()
    engine.core.finish(stream)
    assert session.generate(" and", GREEDY).new_tokens == 8
    session.close()


def test_who_holds_the_engine_is_not_made_to_wait_for_a_suspend(chat_engine, tmp_path, monkeypatch, let_others):
    engine, found, threads = chat_engine("none"), [], []
    session = spoken(engine)
    stream = stream_of(engine)
    begun, held = threading.Event(), threading.Event()

    def hold():
        begun.wait(300)
        with engine.core.lock:
            held.set()
            try:
                session.generate(" and", GREEDY)
            except Exception as error:
                found.append(error)

    def between():
        if not threads:
            threads.append(threading.Thread(target=hold, daemon=True))
            threads[0].start()
            begun.set()
            held.wait(300)

    let_others(engine.core, between)
    report = in_a_thread(lambda: session.suspend(tmp_path / "a.kv"))
    monkeypatch.undo()
    threads[0].join(300)
    [error] = found
    assert isinstance(error, SessionBusy) and report is session.suspended
    engine.core.finish(stream)
    session.close()


def test_the_later_of_two_suspends_stays(chat_engine, tmp_path, monkeypatch):
    from engine.sessions import session as module
    from engine.sessions.file import SessionFile

    session, threads, write, reports = spoken(chat_engine("none")), [], module.write_file, []
    path, reached = tmp_path / "a.kv", threading.Event()

    def later():
        session.generate(" and", GREEDY)
        reports.append(session.suspend(path))

    def slow_write(*args):
        if not threads:
            threads.append(threading.Thread(target=later, daemon=True))
            threads[0].start()
            reached.wait(0.5)
        write(*args)

    monkeypatch.setattr(module, "write_file", slow_write)
    before = len(session.token_ids)
    first = in_a_thread(lambda: session.suspend(path))
    threads[0].join(300)
    assert first.tokens == before - 1 and reports[0].tokens == len(session.token_ids) - 1 > first.tokens
    assert SessionFile.load(path).token_ids == session.token_ids
    session.close()


def test_a_closed_session_fits_nothing(chat_engine):
    session = quiet(chat_engine("none"))
    session.close()
    with pytest.raises(SessionClosed):
        session.fit_codec()


def test_a_suspend_within_a_step_of_the_sessions_answer_is_refused(chat_engine, tmp_path, monkeypatch):
    engine, refused = chat_engine("draft"), []
    session, wanted = spoken(engine), spoken(chat_engine("draft"))
    commit = engine.core.drafter.commit

    def handled(*args):
        """A signal's handler in the middle of a step."""
        with pytest.raises(SessionBusy, match="in the middle of a step"):
            session.suspend(tmp_path / "a.kv")
        refused.append(session.conversation.sequence.length)
        return commit(*args)

    monkeypatch.setattr(engine.core.drafter, "commit", handled)
    found = session.generate(" and", GREEDY).token_ids
    assert refused and not (tmp_path / "a.kv").exists() and found == wanted.generate(" and", GREEDY).token_ids
    monkeypatch.undo()
    assert session.to_bytes() == wanted.to_bytes()
