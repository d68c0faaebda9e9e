"""Sessions whose pack also looks at the target's own first layers, run again at a resume beside a separate draft."""

from __future__ import annotations

import pytest
import torch

from codec.spec import NUM_SINKS
from engine.runtime.sampling import SamplingParams
from engine.sessions.codec_params import find_pack
from engine.sessions.file import SessionFile

pytestmark = pytest.mark.usefixtures("all_coded")

PROMPT = "def greet(name):\n    '''Say hello, once, to whoever is there.'''\n    return f'hello, {name}, and welcome'\n" * 3
GREEDY = SamplingParams(max_new_tokens=40, draft_length=3, ignore_eos=True)
LAYERS = 2


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A cache folder in which the pack is fitted once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def engines(chat_engine, monkeypatch, home):
    """Makes engines of one pair, all deterministic, that share a pack which runs two of the target's four layers again."""
    monkeypatch.setenv("FORETOLD_HOME", str(home))
    monkeypatch.setattr("engine.sessions.codec_params.default_recomputed_layers", lambda num_layers: LAYERS)
    return lambda: chat_engine("draft", deterministic=True)


def kv_of(session):
    sequence = session.conversation.sequence
    return session.core.target.read_kv(sequence, 0, sequence.length)


def resumed_from(engine, path):
    return engine.session(path, log=lambda _: None)


def test_the_first_layers_are_exact_and_nothing_wears_out(engines, tmp_path):
    engine = engines()
    pack = find_pack(engine.core, log=lambda _: None)
    assert pack.layout.first_layer == LAYERS and pack.predictor_settings["target_taps"] == [0, LAYERS]
    session = engine.session(quality="near-lossless", log=lambda _: None)
    session.generate(PROMPT, GREEDY)
    session.suspend(tmp_path / "a.kv")
    width = 2 * 2 * 8  # channels of a layer
    truth = kv_of(session)
    for turn in range(3):
        resumed = resumed_from(engines(), tmp_path / "a.kv")
        now = kv_of(resumed)
        assert torch.equal(now[:NUM_SINKS], truth[:NUM_SINKS])
        if turn == 0:
            assert torch.equal(now[:, : LAYERS * width], truth[:, : LAYERS * width]), "run again, to the bit in deterministic mode"
            error = (now - truth)[:, LAYERS * width :].pow(2).sum() / (truth - truth.mean(0))[:, LAYERS * width :].pow(2).sum()
            assert 0 < float(error) < 0.25
            first, spans = now, SessionFile.load(tmp_path / "a.kv").spans
        assert torch.equal(now[: len(first)], first), "spans keep their bytes, passes repeat to the bit"
        resumed.generate(" and more", GREEDY)
        resumed.suspend(tmp_path / "a.kv")
        later = SessionFile.load(tmp_path / "a.kv").spans
        assert [s.data for s in later[: len(spans)]] == [s.data for s in spans] and len(later) > len(spans)
        spans = later
        resumed.close()
        resumed.core.pool.check_integrity()


def test_suspending_does_not_disturb_a_session_in_use(engines, tmp_path):
    ours, theirs = engines().session(log=lambda _: None), engines().session(log=lambda _: None)
    for session in (ours, theirs):
        session.generate(PROMPT, GREEDY)
    before = kv_of(ours)
    ours.suspend(tmp_path / "a.kv")
    assert torch.equal(kv_of(ours), before)
    assert ours.generate(" then", GREEDY).token_ids == theirs.generate(" then", GREEDY).token_ids


@pytest.mark.parametrize("deterministic", [True, False])
def test_rows_written_again_by_other_products_are_no_longer_invariant(engines, chat_engine, deterministic):
    engine = engines() if deterministic else chat_engine("draft")
    session = engine.session(quality="near-lossless", log=lambda _: None)
    session.generate(PROMPT, SamplingParams(max_new_tokens=4, seed=1, draft_length=0))
    assert session.conversation.invariant  # a seeded request's steps are batch-invariant in every engine
    session.to_bytes()
    assert session.conversation.invariant == deterministic
    session.close()
