"""Sessions whose text repeats: later spans refer to earlier ones, across suspends too."""

from __future__ import annotations

import pytest
import torch

from codec.container import read_span
from codec.references import MAX_DEPTH, chain_depths
from codec.spec import NUM_SINKS, SPAN_TOKENS
from engine.runtime.sampling import SamplingParams

pytestmark = pytest.mark.usefixtures("all_coded")

PART = "\n".join(f"def part_{n}(a{n}, b):\n    return a{n} * {n * n % 97} + b[{n * 7 % 31}]" for n in range(4))
ONE = SamplingParams(max_new_tokens=1, draft_length=2, ignore_eos=True)


def session_of(engine, file=None, **options):
    return engine.session(file, log=lambda _: None, **options)


def references_of(session):
    return [read_span(span.data).references for span in session.spans]


def kv_of(session):
    sequence = session.conversation.sequence
    return session.core.target.read_kv(sequence, NUM_SINKS, sequence.length)


@pytest.mark.parametrize("draft", ["draft", "none"])
@pytest.mark.parametrize("quality", ["near-lossless", "tiny"])
def test_a_text_read_twice_takes_fewer_bytes_and_comes_back(chat_engine, draft, quality, tmp_path, monkeypatch):
    engine, other = chat_engine(draft), chat_engine(draft)
    kept = session_of(engine, quality=quality)
    kept.generate(PART + "\n# and again\n", ONE)
    kept.suspend(tmp_path / "a.kv")
    first = [bytes(span.data) for span in kept.spans]
    kept.generate(PART, ONE)
    report = kept.suspend(tmp_path / "a.kv")
    assert [bytes(span.data) for span in kept.spans[: len(first)]] == first, "what was coded keeps its bytes"
    assert any(references_of(kept)) or quality == "tiny", "the second reading refers to the first"
    resumed = session_of(other, tmp_path / "a.kv", restore="decode")
    error = float((kv_of(resumed) - kv_of(kept)).pow(2).sum())
    monkeypatch.setattr("engine.sessions.repeats.matches", lambda ids, start: [])
    plain = session_of(chat_engine(draft), quality=quality)
    plain.generate(kept.token_ids[: len(kept.token_ids) - 1], ONE)
    # of coarse spans of so small a model most is overhead
    assert report.stored_bytes < (1.05 if quality == "tiny" else 0.97) * plain.suspend(tmp_path / "b.kv").stored_bytes
    without = session_of(other, tmp_path / "b.kv", restore="decode")
    assert error < 1.5 * float((kv_of(without) - kv_of(plain)).pow(2).sum())


def test_chains_end_and_a_resumed_session_goes_on_referring(chat_engine, tmp_path):
    engine = chat_engine("draft")
    line = "the same line of sixty-four characters, over and over again, yes"
    assert len(line) == SPAN_TOKENS
    kept = session_of(engine, quality="near-lossless")
    kept.generate(line * 12, ONE)
    kept.suspend(tmp_path / "a.kv")
    resumed = session_of(chat_engine("draft"), tmp_path / "a.kv", restore="decode")
    resumed.generate(line * 2, ONE)
    resumed.suspend(tmp_path / "b.kv")
    references = references_of(resumed)
    bounds = [(span.start, span.end) for span in resumed.spans]
    depths = chain_depths(references, bounds)
    assert 0 < max(depths) <= MAX_DEPTH
    assert any(references[12:]), "what was coded after the resume refers to what was coded before it"
    again = session_of(chat_engine("draft"), tmp_path / "b.kv", restore="decode")
    assert torch.isfinite(kv_of(again)).all() and again.token_ids == resumed.token_ids
