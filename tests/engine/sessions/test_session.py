"""Suspending and resuming: what comes back, what it costs, and that it does not wear out."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from codec.spec import NUM_SINKS, QUALITY_DIVERGENCE, SPAN_TOKENS
from engine.errors import EmptyPrompt, InvalidOption, PackMismatch
from engine.model.decoder import forward_reserved
from engine.runtime.sampling import SamplingParams
from engine.sessions.file import SessionFile
from engine.sessions.kv_codec import SessionCodec, coded_end

pytestmark = pytest.mark.usefixtures("all_coded")

QUALITIES = ("near-lossless", "balanced", "compact", "tiny")
PROMPT = "def greet(name):\n    '''Say hello, once, to whoever is there.'''\n    return f'hello, {name}, and welcome'\n"
TEXT = (
    PROMPT
    + """

class Counter:
    '''Counts what it is given, and says how often each thing came.'''

    def __init__(self):
        self.seen = {}

    def add(self, thing):
        self.seen[thing] = self.seen.get(thing, 0) + 1
"""
)
PROBE = torch.tensor(list(b" and then these are the next words, for a while "))
# twice what is promised: the mean over few positions of one text, with parameters fitted to a thousand tokens
BOUNDS = {quality: 2 * promised for quality, promised in QUALITY_DIVERGENCE.items()}
GREEDY = SamplingParams(max_new_tokens=20, draft_length=3, ignore_eos=True)


def quiet(_: str) -> None:
    pass


def session_of(engine, file=None, **options):
    return engine.session(file, log=quiet, **options)


def spoken(engine, tokens=120, params=GREEDY, **options):
    """A session that holds the prompt and an answer, `tokens` new tokens."""
    session = session_of(engine, **options)
    session.generate(PROMPT, SamplingParams(max_new_tokens=tokens, draft_length=params.draft_length, ignore_eos=True))
    return session


def kv_of(session):
    sequence = session.conversation.sequence
    return session.core.target.read_kv(sequence, 0, sequence.length)


def loss(truth, restored):
    """Share of the KV's variance over tokens that is lost."""
    return float((restored - truth).pow(2).sum() / (truth - truth.mean(0)).pow(2).sum())


def next_log_probabilities(session):
    """[T, V] of the probe after what the session's cache holds; nothing moves. Recomputes the session's last tokens where it holds none."""
    sequence = session.conversation.sequence
    ids = torch.cat([torch.tensor(session.token_ids[sequence.length :], dtype=torch.int64), PROBE])
    return forward_reserved(session.core.target, ids, [sequence], [len(ids)]).logits[-len(PROBE) :].log_softmax(-1)


def divergence(session, other):
    """Mean KL(session || other) of the next token, nats."""
    p, q = next_log_probabilities(session), next_log_probabilities(other)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture
def draft_tokens(monkeypatch):
    """`draft_tokens(engine)` -> a list that grows by the number of tokens of every forward of the engine's draft."""

    def watch(engine):
        seen, forward = [], engine.core.draft_model.forward

        def counted(token_ids, *args, **kwargs):
            seen.append(len(token_ids))
            return forward(token_ids, *args, **kwargs)

        monkeypatch.setattr(engine.core.draft_model, "forward", counted)
        return seen

    return watch


# --- what comes back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", ["draft", "head", "states", "trunk", "none"])
def test_next_token_distribution_after_a_resume(chat_engine, draft, tmp_path, capsys):
    engine, again = chat_engine(draft), chat_engine(draft)
    found, sizes = {}, {}
    for quality in ("tokens", *QUALITIES):
        stored = session_of(engine, quality=quality)
        stored.generate(TEXT, SamplingParams(max_new_tokens=1))
        report = stored.suspend(tmp_path / "a.kv")
        resumed = session_of(again, tmp_path / "a.kv")
        assert resumed.quality == quality and resumed.token_ids == stored.token_ids
        assert resumed.conversation.sequence.length == (0 if quality == "tokens" else len(TEXT))
        found[quality], sizes[quality] = divergence(stored, resumed), report.stored_bytes
        assert report.stored_bytes == (tmp_path / "a.kv").stat().st_size
        assert report.tokens == len(TEXT) and report.raw_bytes == 2 * len(TEXT) * 4 * 2 * 2 * 8
        assert report.bits_per_element == pytest.approx(16 * report.stored_bytes / report.raw_bytes)
        assert report.estimated_kl == stored.kv_figures["estimated_kl"]
        assert report.rounding_kl == stored.kv_figures["rounding_kl"]
        if quality == "tokens":
            assert report.estimated_kl == 0.0 and report.rounding_kl is None
        else:
            assert report.rounding_kl == engine.core.session_codec.curve.rounding == 0.0 and report.reachable
            assert not replace(report, rounding_kl=QUALITY_DIVERGENCE[quality]).reachable
            assert 0 < report.estimated_kl <= QUALITY_DIVERGENCE[quality]
            again_kl = resumed.suspend(tmp_path / "b.kv").estimated_kl
            assert again_kl == pytest.approx(report.estimated_kl, rel=1e-3), "a file knows what its spans were expected to lose"
        for session in (stored, resumed):
            session.close()
    again.core.pool.check_integrity()
    with capsys.disabled():
        print(f"\n{draft}: KL " + ", ".join(f"{q} {found[q]:.4f} ({sizes[q]} bytes)" for q in found))
    assert abs(found["tokens"]) < 1e-6
    values = [found[q] for q in QUALITIES]
    assert found["near-lossless"] > 1e-6 and all(b > 0.95 * a for a, b in pairwise(values)), (
        "coarser steps lose more; nearly the same, where the coarsest already keeps the promise"
    )
    assert all(found[q] < BOUNDS[q] for q in QUALITIES)
    assert all(sizes[a] > sizes[b] - 8 for a, b in pairwise(QUALITIES)), (
        "but for a few bytes, where the coarsest step already keeps the promise"
    )
    assert sizes["tokens"] < sizes["tiny"] < report.raw_bytes / 8


@pytest.mark.parametrize("draft", ["draft", "head", "states", "trunk", "none"])
def test_resumed_kv_is_near_and_the_first_tokens_are_exact(chat_engine, draft, tmp_path):
    engine = chat_engine(draft, deterministic=True)
    kept = spoken(engine, quality="near-lossless")
    kept.suspend(tmp_path / "a.kv")
    resumed = session_of(chat_engine(draft, deterministic=True), tmp_path / "a.kv")
    before, after = kv_of(kept), kv_of(resumed)
    assert torch.equal(before[:NUM_SINKS], after[:NUM_SINKS])
    assert 0 < loss(before, after) < 0.3  # what a tiny model bears before its output diverges by the promised .005
    recomputed = kept.core.drafter.exit_layer * 2 * 2 * 8 if kept.core.drafter else 0
    assert torch.equal(before[:, :recomputed], after[:, :recomputed]), "an early exit's own layers are run again, not coded"


@pytest.mark.parametrize("draft", ["draft", "trunk", "none"])
def test_greedy_text_goes_on_as_if_never_suspended(chat_engine, draft, tmp_path):
    kept = spoken(chat_engine(draft, deterministic=True), quality="tokens")
    kept.suspend(tmp_path / "a.kv")
    resumed = session_of(chat_engine(draft, deterministic=True), tmp_path / "a.kv")
    assert resumed.resumed is not None and resumed.resumed.tokens == 0
    ours, theirs = (s.generate("", GREEDY) for s in (kept, resumed))
    assert ours.token_ids == theirs.token_ids
    assert (theirs.prompt_tokens, theirs.reused_tokens) == (len(resumed.token_ids) - 20, 0)


@pytest.mark.parametrize("draft", ["draft", "head", "states", "trunk"])
def test_speculation_over_restored_caches_gives_the_plain_greedy_text(chat_engine, draft, tmp_path):
    engine = chat_engine(draft, deterministic=True)
    kept = spoken(engine, quality="balanced")
    kept.suspend(tmp_path / "a.kv")
    texts = []
    for length in (0, 3):
        resumed = session_of(engine, tmp_path / "a.kv")
        result = resumed.generate("", SamplingParams(max_new_tokens=20, draft_length=length, ignore_eos=True))
        assert result.reused_tokens == len(kept.token_ids) - 1
        texts.append(result.token_ids)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("draft", ["draft", "head", "trunk"])
def test_acceptance_after_a_resume_is_what_it_was(chat_engine, draft, tmp_path):
    """The never-suspended session is given the restored target KV, so only the draft's restored cache could make a difference."""
    engine, again = chat_engine(draft, deterministic=True), chat_engine(draft, deterministic=True)
    kept = spoken(engine, quality="compact")
    kept.suspend(tmp_path / "a.kv")
    resumed = session_of(again, tmp_path / "a.kv")
    kept.conversation.sequence.ensure(kept.conversation.sequence.length, 0)  # the engine shares its pages
    engine.core.target.write_kv(kept.conversation.sequence, 0, kv_of(resumed))
    if draft == "draft":
        length = resumed.conversation.draft_state.length
        assert length == len(kept.token_ids) - 1 and kept.conversation.draft_state.length == length
        ours, theirs = (s.core.draft_model.read_kv(s.conversation.draft_state.sequence, 0, length) for s in (kept, resumed))
        assert torch.equal(ours, theirs)
    ours, theirs = (s.generate("", SamplingParams(max_new_tokens=30, draft_length=3, ignore_eos=True)) for s in (kept, resumed))
    assert ours.token_ids == theirs.token_ids
    assert (ours.speculation.proposed, ours.speculation.accepted) == (theirs.speculation.proposed, theirs.speculation.accepted)
    assert ours.speculation.accepted > 0


# --- coded once ---------------------------------------------------------------------------------------------------------


def test_suspending_again_writes_the_same_bytes(chat_engine, tmp_path):
    session = spoken(chat_engine())
    session.suspend(tmp_path / "a.kv")
    session.suspend(tmp_path / "b.kv")
    assert (tmp_path / "a.kv").read_bytes() == (tmp_path / "b.kv").read_bytes()
    session.generate(" more", GREEDY)
    session.suspend(tmp_path / "c.kv")
    first, last = SessionFile.load(tmp_path / "a.kv").spans, SessionFile.load(tmp_path / "c.kv").spans
    assert last[: len(first)] == first and len(last) > len(first)
    assert last[len(first)].start == first[-1].end and last[-1].end == len(session.token_ids) - 1


@pytest.mark.parametrize("draft", ["draft", "trunk", "none"])
def test_loss_does_not_accumulate_over_cycles(chat_engine, draft, tmp_path):
    """In deterministic mode tokens that were restored before come back to the bit, whatever follows them by now."""
    file = tmp_path / "a.kv"
    session = spoken(chat_engine(draft, deterministic=True))
    truth = kv_of(session)
    session.suspend(file)
    spans = SessionFile.load(file).spans
    assert [s.start for s in spans] == [NUM_SINKS, *range(SPAN_TOKENS, spans[-1].end, SPAN_TOKENS)], "whole spans fill pages"
    old: torch.Tensor | None = None
    for cycle in range(5):
        session = session_of(chat_engine(draft, deterministic=True), file)
        restored = kv_of(session)
        if old is not None:
            assert torch.equal(restored[: len(old)], old), f"cycle {cycle} changed tokens that were restored before"
        old = restored
        session.generate(f" {cycle}: the same again, with a little more text than before, please", GREEDY)
        session.suspend(file)
        now = SessionFile.load(file).spans
        assert now[: len(spans)] == spans
        spans = now
    assert len(session.token_ids) > 600, "more than one chunk of the draft's pass"
    assert loss(truth, old[: len(truth)]) < 0.4


# --- where features come from -------------------------------------------------------------------------------------------


def test_suspending_runs_the_draft_only_on_tokens_it_never_saw(chat_engine, draft_tokens, monkeypatch, tmp_path):
    engine = chat_engine()
    session = spoken(engine)
    unseen = session.conversation.sequence.length - session.conversation.draft_state.length
    assert unseen <= 1, "speculation has run all but the last accepted draft"
    monkeypatch.setattr(SessionCodec, "_recomputed", None)  # no scratch pass
    seen = draft_tokens(engine)
    session.suspend(tmp_path / "a.kv")
    assert sum(seen) == unseen
    del seen[:]
    session.suspend(tmp_path / "a.kv")
    assert seen == []


def test_without_speculation_the_draft_runs_every_token_once(chat_engine, draft_tokens, monkeypatch, tmp_path):
    engine = chat_engine()
    monkeypatch.setattr(SessionCodec, "_recomputed", None)
    seen = draft_tokens(engine)
    session = spoken(engine, params=SamplingParams(draft_length=0))
    assert seen == []
    session.suspend(tmp_path / "a.kv")
    assert sum(seen) == session.conversation.sequence.length
    del seen[:]
    session.generate(" more", SamplingParams(max_new_tokens=10, draft_length=0, ignore_eos=True))
    session.suspend(tmp_path / "a.kv")
    assert sum(seen) == 15


@pytest.mark.parametrize("draft", ["draft", "trunk"])
def test_a_resumed_session_needs_no_scratch_pass(chat_engine, draft, monkeypatch, tmp_path):
    spoken(chat_engine(draft)).suspend(tmp_path / "a.kv")
    monkeypatch.setattr(SessionCodec, "_recomputed", None)
    resumed = session_of(chat_engine(draft), tmp_path / "a.kv")
    resumed.generate(" more", GREEDY)
    resumed.suspend(tmp_path / "a.kv")
    assert SessionFile.load(tmp_path / "a.kv").num_cached == len(resumed.token_ids) - 1


@pytest.mark.parametrize("draft", ["draft", "trunk"])
def test_features_that_were_never_kept_come_from_a_scratch_pass(chat_engine, draft, tmp_path):
    engine = chat_engine(draft, deterministic=True)
    late = spoken(engine, quality="tokens")  # opened before the engine had a pack: no features
    late.quality = "near-lossless"
    late.suspend(tmp_path / "late.kv")
    engine.core.pool.check_integrity()
    kept = session_of(engine, quality="near-lossless")
    kept.generate(late.token_ids[:-1], SamplingParams(max_new_tokens=1, draft_length=0))
    kept.suspend(tmp_path / "kept.kv")
    assert SessionFile.load(tmp_path / "late.kv").token_ids == SessionFile.load(tmp_path / "kept.kv").token_ids
    late_kv, kept_kv = (kv_of(session_of(engine, tmp_path / name)) for name in ("late.kv", "kept.kv"))
    assert (late_kv - kept_kv).pow(2).mean() < 0.02 * kept_kv.pow(2).mean()


# --- qualities, small sessions, mixtures --------------------------------------------------------------------------------


def test_a_session_resumed_at_another_quality_keeps_its_earlier_spans(chat_engine, tmp_path):
    engine, file = chat_engine(), tmp_path / "a.kv"
    spoken(engine, quality="near-lossless").suspend(file)
    first = SessionFile.load(file).spans
    resumed = session_of(engine, file, quality="tiny")
    resumed.generate(" more", GREEDY)
    resumed.suspend(file)
    stored = SessionFile.load(file)
    assert stored.spans[: len(first)] == first and stored.quality == "tiny" and stored.num_cached == len(stored.token_ids) - 1
    assert max(len(s.data) for s in stored.spans[len(first) :]) < min(len(s.data) for s in first[:-1])
    plain = session_of(engine, file, quality="tokens")
    plain.generate(" and more", GREEDY)
    plain.suspend(file)
    last = SessionFile.load(file)
    assert last.spans == stored.spans and last.num_cached == stored.num_cached < len(last.token_ids) - 1
    resumed = session_of(engine, file)
    assert resumed.token_ids == plain.token_ids and abs(divergence(plain, resumed)) < 1e-3
    assert resumed.generate("", GREEDY).reused_tokens == stored.num_cached


@pytest.mark.parametrize("length", [1, 2, NUM_SINKS, NUM_SINKS + 1, NUM_SINKS + 2, NUM_SINKS + SPAN_TOKENS + 1])
def test_short_sessions(chat_engine, length, tmp_path):
    engine = chat_engine()
    session = session_of(engine)
    session.generate(list(range(length)), SamplingParams(max_new_tokens=1))
    report = session.suspend(tmp_path / "a.kv")
    assert report.tokens == length
    resumed = session_of(engine, tmp_path / "a.kv")
    assert resumed.token_ids == session.token_ids and len(resumed.spans) == -(-length // SPAN_TOKENS) * (length > NUM_SINKS)
    assert resumed.generate("", GREEDY).new_tokens == 20
    assert resumed.suspend(tmp_path / "a.kv").tokens == length + 20


def test_resuming_and_suspending_at_once_changes_nothing(chat_engine, tmp_path):
    file = tmp_path / "a.kv"
    for quality in ("tokens", "balanced"):
        first = spoken(chat_engine(), quality=quality).suspend(file)
        before = file.read_bytes()
        again = session_of(chat_engine(), file).suspend(tmp_path / "b.kv")
        assert again.tokens == first.tokens and again.raw_bytes == first.raw_bytes
        if quality == "balanced":
            assert (tmp_path / "b.kv").read_bytes() == before


def test_an_empty_session_cannot_be_suspended(chat_engine, tmp_path):
    with session_of(chat_engine(), quality="tokens") as session:
        with pytest.raises(EmptyPrompt, match="empty"):
            session.suspend(tmp_path / "a.kv")
        with pytest.raises(EmptyPrompt):
            session.chat("  \n")
        with pytest.raises(EmptyPrompt):
            session.generate("")
        session.close()
    assert not (tmp_path / "a.kv").exists()
    session.core.pool.check_integrity()
    assert session.core.pool.num_free_pages == session.core.pool.max_pages


def test_options_that_cannot_be(chat_engine, tmp_path):
    engine = chat_engine()
    with pytest.raises(InvalidOption, match="unknown quality 'best'"):
        session_of(engine, quality="best")
    with pytest.raises(InvalidOption, match="no codec pack"):
        session_of(engine, pack=tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(PackMismatch, match="cannot be read"):
        session_of(engine, pack=tmp_path / "bad.safetensors")
    session_of(engine)
    with pytest.raises(InvalidOption, match="another pack"):
        session_of(engine, pack=tmp_path / "none.safetensors")


def test_figures(chat_engine, tmp_path):
    session = spoken(chat_engine())
    figures = session.kv_figures
    assert figures["stored_bytes"] is figures["bits_per_element"] is figures["quality"] is None
    report = session.suspend(tmp_path / "a.kv")
    figures = session.kv_figures
    assert figures["tokens"] == len(session.token_ids) - 1 and figures["raw_bytes"] == report.raw_bytes
    assert figures["hot_bytes"] >= 2 * figures["raw_bytes"], "float32 pages"
    assert figures["stored_bytes"] == report.stored_bytes and figures["quality"] == "balanced"


def test_the_last_tokens_of_a_near_lossless_session_are_kept_as_ids(chat_engine, tmp_path, monkeypatch):
    """They run again over what was restored, with what follows them; whole spans alone are coded, then and later."""
    monkeypatch.setattr("engine.sessions.kv_codec._LAST_TOKENS", {"near-lossless": 64})
    assert [coded_end(n, "near-lossless") for n in (0, 64, 127, 128, 191, 192, 300)] == [0, 0, 0, 64, 64, 128, 192]
    assert coded_end(300, "balanced") == coded_end(300, 0.5) == 300
    file, engine = tmp_path / "a.kv", chat_engine("draft")
    session = spoken(engine, quality="near-lossless")
    held = session.conversation.sequence.length
    session.suspend(file)
    spans = SessionFile.load(file).spans
    assert spans[-1].end == coded_end(held, "near-lossless") <= held - 64
    resumed = session_of(chat_engine("draft"), file)
    assert resumed.conversation.sequence.length == resumed.resumed.tokens == spans[-1].end and resumed.token_ids == session.token_ids
    resumed.suspend(tmp_path / "same.kv")
    assert (tmp_path / "same.kv").read_bytes() == file.read_bytes(), "nothing new is coded of what waits to be run"
    for one in (session, resumed):
        one.generate(" and so on, for some tokens more", GREEDY)
        one.suspend(tmp_path / "b.kv")
        now = SessionFile.load(tmp_path / "b.kv")
        assert now.spans[: len(spans)] == spans and now.num_cached == coded_end(one.conversation.sequence.length, "near-lossless")
    short = session_of(engine, quality="near-lossless")
    short.generate(list(range(3, 40)), GREEDY)
    report = short.suspend(tmp_path / "short.kv")
    assert report.restore == "recompute" and report.estimated_kl == 0.0 and report.quality == "near-lossless"
    assert report.reason is not None and "near-lossless keeps as ids" in report.reason
    again = session_of(chat_engine("draft"), tmp_path / "short.kv")
    assert again.generate("", GREEDY).token_ids == short.generate("", GREEDY).token_ids
