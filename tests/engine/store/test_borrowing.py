"""Stored texts that refer to other stored texts: shorter, restored as they were coded, and missing when what they refer to is gone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from codec.container import read_span
from codec.errors import CorruptedCode
from engine.runtime.sampling import SamplingParams
from engine.sessions.rates import Rates
from engine.store.borrowing import resolved
from engine.store.runs import PAGE_TOKENS, Run, root_key
from engine.store.store import RunStore

DOCUMENT = bytes(np.random.default_rng(5).integers(97, 123, 640, dtype=np.uint8)).decode()
PROMPTS = ("Read this with care.\n", "Today is Monday, and you are a helper of engineers who build gauges. Say so when you do not know.\n")
ONE = SamplingParams(max_new_tokens=1, draft_length=0)


def keep(engine, text):
    result = engine.generate(text, ONE)[0]
    engine.flush()
    return result


def runs_of(folder):
    return [Run.from_bytes(path.read_bytes()) for path in sorted(folder.rglob("*.run"))]


def loss(engine, other, text):
    """Mean squared difference of the KV that two engines have of a text's whole pages; the first restores it."""
    rows, count = [], len(text) // PAGE_TOKENS * PAGE_TOKENS
    for each in (engine, other):
        session = each.session(quality="tokens", log=lambda _: None)
        result = session.generate(text, ONE)
        rows.append(each.core.target.read_kv(session.conversation.sequence, 0, count).clone())
        assert (result.restored_tokens == count - PAGE_TOKENS * (count == len(text))) == (each is engine)
        session.close()
    return float((rows[0] - rows[1]).pow(2).mean())


@pytest.mark.parametrize("draft", ["draft", "none"])
def test_a_document_after_another_prompt_refers_to_the_first(store_engine, folder, chat_engine, draft, tmp_path) -> None:
    first = store_engine(draft)
    keep(first, PROMPTS[0] + DOCUMENT)
    assert not any(run.donors for run in runs_of(folder)) and first.prefix_cache.metrics.kept_referring == 0
    before = {run.keys[-1] for run in runs_of(folder)}
    second = store_engine(draft)
    keep(second, PROMPTS[1] + DOCUMENT)
    assert second.prefix_cache.metrics.kept_referring >= 2
    new = sum(len(span) for run in runs_of(folder) if run.keys[-1] not in before for span in run.spans)
    plain = store_engine(draft, store=tmp_path / "plain")
    keep(plain, PROMPTS[1] + DOCUMENT)
    alone = sum(len(span) for run in runs_of(tmp_path / "plain") for span in run.spans)
    assert new < 0.95 * alone, "models of random weights leave much over that does not repeat"
    third, again = store_engine(draft), store_engine(draft, store=tmp_path / "plain")
    assert loss(third, chat_engine(draft), PROMPTS[1] + DOCUMENT) < 1.3 * loss(again, chat_engine(draft), PROMPTS[1] + DOCUMENT)
    assert third.prefix_cache.metrics.lent_tokens > 0 and again.prefix_cache.metrics.lent_tokens == 0
    # a shorter text of the same beginning ends inside a run that refers
    part = PROMPTS[1] + DOCUMENT[:400]
    assert loss(store_engine(draft), chat_engine(draft), part) < 1.3 * loss(
        store_engine(draft, store=tmp_path / "plain"), chat_engine(draft), part
    )
    # gone with what it refers to: computed, not wrong
    for path in folder.rglob("*.run"):
        if Run.from_bytes(path.read_bytes()).keys[-1] in before:
            path.unlink()
    last = store_engine(draft)
    result = last.generate(PROMPTS[1] + DOCUMENT, ONE)[0]
    assert result.restored_tokens < 256 and result.token_ids == chat_engine(draft).generate(PROMPTS[1] + DOCUMENT, ONE)[0].token_ids


def test_a_text_that_grows_goes_on_referring_and_a_session_of_it_stands_alone(store_engine, folder, chat_engine, tmp_path) -> None:
    first = store_engine()
    keep(first, PROMPTS[0] + DOCUMENT)
    for end in (400, 520, 640):
        engine = store_engine()
        keep(engine, PROMPTS[1] + DOCUMENT[:end])
    store = RunStore(folder)
    report = store.verify()
    assert report.sound and report.referring >= 2
    store.close()
    engine = store_engine()
    session = engine.session(quality="near-lossless", log=lambda _: None)
    assert session.generate(PROMPTS[1] + DOCUMENT, ONE).restored_tokens >= 640
    assert any(span.borrows for span in session.conversation.restored_spans)
    session.suspend(tmp_path / "file")
    resumed = chat_engine().session(tmp_path / "file", restore="decode", log=lambda _: None)
    kept = session.conversation.sequence, resumed.conversation.sequence
    count = min(sequence.length for sequence in kept)
    rows = [each.core.target.read_kv(each.conversation.sequence, 0, count) for each in (session, resumed)]
    assert float((rows[0] - rows[1]).pow(2).sum() / (rows[0] - rows[0].mean(0)).pow(2).sum()) < 0.3
    session.close()


def test_a_restore_that_lending_makes_too_slow_is_not_made(store_engine, folder) -> None:
    first = store_engine()
    keep(first, PROMPTS[0] + DOCUMENT)
    dear = Rates(0.0, 1e-6, 0.0, 1e-3, lend_token_s=1.0)
    second = store_engine()
    second.prefix_cache.codec.rates = dear
    keep(second, PROMPTS[1] + DOCUMENT)
    assert second.prefix_cache.metrics.kept_referring == 0 and not any(run.donors for run in runs_of(folder))
    third = store_engine()
    keep(third, "And once more, in other words: " + DOCUMENT)
    assert third.prefix_cache.metrics.kept_referring > 0
    fourth = store_engine()
    fourth.prefix_cache.codec.rates = dear
    assert keep(fourth, "And once more, in other words: " + DOCUMENT).restored_tokens == 0 and fourth.prefix_cache.metrics.skipped == 1


def test_a_namespace_lends_nothing_to_another(store_engine, folder) -> None:
    keep(store_engine(), PROMPTS[0] + DOCUMENT)
    other = store_engine(namespace="other")
    keep(other, PROMPTS[1] + DOCUMENT)
    assert other.prefix_cache.metrics.kept_referring == 0


@pytest.mark.parametrize("change", ["distance", "need", "page"])
def test_references_to_what_is_not_there_are_refused(store_engine, folder, change) -> None:
    keep(store_engine(), PROMPTS[0] + DOCUMENT)
    engine = store_engine()
    keep(engine, PROMPTS[1] + DOCUMENT)
    codec, store = engine.prefix_cache.codec.codec, engine.prefix_cache.store
    ids = engine.encode(PROMPTS[1] + DOCUMENT)
    found = store.lookup(root_key(engine.prefix_cache._identity(None)), ids, referring=True)
    lent = resolved(codec, found).lent
    assert lent is not None and lent.num_lent_tokens > 0 and not any(code.references for code in lent.lent)
    at, borrowed = next(iter(found.borrowed.items()))
    if change == "need":
        wrong = borrowed._replace(needs=(0,) * len(borrowed.needs))
    elif change == "page":
        cut = {number: replace(run, spans=run.spans[:0]) for number, run in borrowed.runs.items()}
        wrong = borrowed._replace(runs=cut)
    else:
        wrong = borrowed._replace(runs={})
    with pytest.raises(CorruptedCode, match="not there"):
        resolved(codec, replace(found, borrowed={**found.borrowed, at: wrong}))


def test_a_file_read_twice_refers_to_its_first_reading_and_a_session_keeps_its_code(store_engine, folder, chat_engine, tmp_path) -> None:
    text = PROMPTS[0] + DOCUMENT[:320] + PROMPTS[1] + DOCUMENT[:320]
    keep(store_engine(), text)
    assert any(run.donors for run in runs_of(folder))
    engine = store_engine()
    session = engine.session(quality="near-lossless", log=lambda _: None)
    session.generate(text, ONE)
    assert engine.prefix_cache.metrics.lent_tokens == 0, "what is in the text itself is decoded once"
    kept = session.conversation.restored_spans
    assert not any(span.borrows for span in kept) and any(read_span(span.data).references for span in kept)
    session.suspend(tmp_path / "file")
    assert [bytes(span.data) for span in session.spans[: len(kept)]] == [bytes(span.data) for span in kept]
    resumed = chat_engine().session(tmp_path / "file", restore="decode", log=lambda _: None)
    rows = [each.core.target.read_kv(each.conversation.sequence, 0, kept[-1].end) for each in (session, resumed)]
    assert torch.allclose(*rows, atol=1e-3)
    session.close()
