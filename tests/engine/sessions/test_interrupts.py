"""Sessions that are broken off in the middle of an answer, or refused a turn: what was generated stays, and they go on."""

from __future__ import annotations

import pytest

from engine.errors import PoolExhausted
from engine.runtime.sampling import SamplingParams

PROMPT = "def greet(name):\n    '''Say hello, once, to whoever is there.'''\n    return f'hello, {name}, and welcome'\n"
GREEDY = SamplingParams(max_new_tokens=40, draft_length=3, ignore_eos=True)
SHORT = SamplingParams(max_new_tokens=12, draft_length=3, ignore_eos=True)  # a few steps, which is where two texts would part


def session_of(engine, file=None, **options):
    return engine.session(file, log=lambda _: None, **options)


def spoken(engine, tokens, **options):
    """A session that holds the prompt and an answer, `tokens` new tokens."""
    session = session_of(engine, **options)
    session.generate(PROMPT, SamplingParams(max_new_tokens=tokens, draft_length=3, ignore_eos=True))
    return session


def kv_of(session):
    sequence = session.conversation.sequence
    return session.core.target.read_kv(sequence, 0, sequence.length)


def loss(truth, restored):
    """Share of the KV's variance over tokens that is lost."""
    return float((restored - truth).pow(2).sum() / (truth - truth.mean(0)).pow(2).sum())


class Break:
    """Calls through, and raises KeyboardInterrupt before or after the given call."""

    def __init__(self, call, number, after):
        self.call, self.left, self.after = call, number, after

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KeyboardInterrupt
        result = self.call(*args, **kwargs)
        if self.left == 0:
            raise KeyboardInterrupt
        return result


DRAFTS, PLACES = (
    ["draft", "head", "states", "trunk", "none"],
    ["target.forward", "drafter.commit", "drafter.observe_target", "append_tokens", "on_text"],
)


# every place with every draft, before and after in turn
@pytest.mark.parametrize("draft,place,after", [(d, p, (n + m) % 2 == 1) for n, d in enumerate(DRAFTS) for m, p in enumerate(PLACES)])
def test_an_answer_broken_off_anywhere_leaves_a_session_that_goes_on(chat_engine, draft, place, after, monkeypatch, tmp_path):
    if draft == "none" and place.startswith("drafter"):
        pytest.skip("no drafter")
    if place == "drafter.observe_target" and draft not in ("trunk", "head", "states"):
        pytest.skip("only an early exit looks at the target's prompt pass")
    engine = chat_engine(draft, deterministic=True)
    session = spoken(engine, tokens=20)
    before = list(session.token_ids)
    written: list[str] = []
    with monkeypatch.context() as patch:
        on_text = written.append
        if place == "append_tokens":
            from engine.runtime.request import Request

            whole = Request.append_tokens
            broken = Break(whole, 5, after)
            patch.setattr(Request, "append_tokens", lambda self, run: broken(self, run))
        elif place == "on_text":
            on_text = Break(written.append, 3, after)
        else:
            owner = engine.core.target if place.startswith("target") else engine.core.drafter
            name = place.split(".")[1]
            patch.setattr(owner, name, Break(getattr(owner, name), 1 if name == "observe_target" else 5, after))
        with pytest.raises(KeyboardInterrupt):
            session.generate(" more", GREEDY, on_text)
    assert engine.core.scheduler.idle
    assert session.token_ids[: len(before) + 5] == before + engine.tokenizer(" more")["input_ids"]
    assert session.conversation.sequence.length < len(session.token_ids)
    state = session.conversation.draft_state
    assert state is None or state.features.length == state.length, "a feature row belongs to its token"
    engine.core.pool.check_integrity()
    # the same tokens, never broken off, continue alike
    whole = session_of(engine, quality="tokens")
    expected = whole.generate(session.token_ids, SHORT).token_ids
    session.suspend(tmp_path / "broken.kv")
    assert session.generate("", SHORT).token_ids == expected
    session.suspend(tmp_path / "a.kv")
    resumed = session_of(chat_engine(draft, deterministic=True), tmp_path / "a.kv")
    assert resumed.token_ids == session.token_ids and resumed.conversation.sequence.length == len(session.token_ids) - 1
    # the codec bounds what attention makes of it, not this; the KV of other tokens would lose all of it and more
    assert loss(kv_of(session), kv_of(resumed)) < 0.5


def test_an_interrupt_after_the_last_token_leaves_nothing_running(chat_engine, monkeypatch):
    from engine.runtime.request import Request

    engine = chat_engine("none")
    session, whole = spoken(engine, tokens=20, quality="tokens"), Request.append_tokens
    with monkeypatch.context() as patch:
        broken = Break(whole, 1, after=True)
        patch.setattr(Request, "append_tokens", lambda self, run: broken(self, run))
        with pytest.raises(KeyboardInterrupt):
            session.generate(" more", SamplingParams(max_new_tokens=1))
    assert engine.core.scheduler.idle
    before = list(session.token_ids)
    engine.generate("another", SamplingParams(max_new_tokens=3))
    assert session.token_ids == before


def test_a_refused_turn_leaves_the_conversation_as_it_was(chat_engine):
    engine = chat_engine("none", pool_tokens=320)
    session, other = spoken(engine, tokens=40, quality="tokens"), spoken(engine, tokens=16, quality="tokens")
    before, length = list(session.token_ids), session.conversation.sequence.length
    with pytest.raises(PoolExhausted, match="beside the open conversations"):
        session.generate("more", SamplingParams(max_new_tokens=60))
    assert session.token_ids == before and session.conversation.sequence.length == length
    other.close()
    assert session.generate("more", SamplingParams(max_new_tokens=30, ignore_eos=True)).new_tokens == 30
