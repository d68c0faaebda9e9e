"""Settings of torch that a caller made for code of their own do not reach into the engine."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from engine.runtime.sampling import SamplingParams

SAMPLED = SamplingParams(
    max_new_tokens=16,
    temperature=0.9,
    top_k=60,
    top_p=0.95,
    min_p=0.01,
    seed=3,
    repetition_penalty=1.1,
    frequency_penalty=0.2,
    draft_length=2,
)


@contextmanager
def default_dtype(kind):
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def unusual(kind):
    with default_dtype(kind), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        yield


def conversation(make, file):
    """Load, talk, suspend, resume, and go on: all token ids."""
    engine = make(dtype=torch.float32, device=torch.device("cpu"))
    with engine.session(quality="balanced", log=lambda _: None) as session:
        session.chat("hello there, what is it like at the harbour today?", SAMPLED)
        session.suspend(file)
    with engine.session(file, restore="decode", log=lambda _: None) as session:
        session.chat("and now?", SAMPLED)
        return list(session.token_ids)


@pytest.fixture(scope="module")
def usual(chat_engine, tmp_path_factory):
    return conversation(chat_engine, tmp_path_factory.mktemp("usual") / "a.kv")


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16], ids=str)
def test_nothing_changes_under_a_caller_s_torch(chat_engine, usual, tmp_path, kind):
    with unusual(kind):
        assert conversation(chat_engine, tmp_path / "a.kv") == usual


def test_nor_is_a_pack_fitted_otherwise(chat_engine, pack_home, tmp_path, monkeypatch):
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "home"))
    with unusual(torch.float64), chat_engine().session(quality="balanced", log=lambda _: None) as session:
        session.generate("a pack is fitted here, on the spot", SamplingParams(max_new_tokens=12))
        assert session.suspend(tmp_path / "a.kv").restore == "decode"
