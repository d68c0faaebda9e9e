"""A resume that writes spans straight into pages, as on a GPU, against one that goes through rows."""

from __future__ import annotations

import pytest
import torch

from codec.pages import PageDecoder
from codec.spec import NUM_SINKS
from engine.runtime.sampling import SamplingParams

pytestmark = pytest.mark.usefixtures("all_coded")

TEXT = "def add(self, thing):\n    '''Count it, and say how often it came.'''\n    return self.seen.get(thing, 0) + 1\n" * 2


def resumed_kv(engine, file):
    session = engine.session(file, log=lambda _: None)
    return engine.core.target.read_kv(session.conversation.sequence, 0, session.conversation.sequence.length)


@pytest.mark.parametrize("draft", ["draft", "trunk"])
def test_pages_get_what_rows_would(chat_engine, draft, tmp_path, monkeypatch) -> None:
    def engine():
        return chat_engine(draft, dtype="bfloat16", deterministic=True)

    kept = engine().session(quality="near-lossless", log=lambda _: None)
    kept.generate(TEXT, SamplingParams(max_new_tokens=1, ignore_eos=True))
    kept.suspend(tmp_path / "a.kv")
    rows = resumed_kv(engine(), tmp_path / "a.kv")
    written, write = [], PageDecoder.write_pages

    def counted(self, parts, *args, **kwargs):
        written.extend(size for part in parts for size in part.decoded.sizes)
        return write(self, parts, *args, **kwargs)

    monkeypatch.setattr("engine.sessions.kv_codec.use_triton", lambda *tensors: True)
    monkeypatch.setattr(PageDecoder, "write_pages", counted)
    pages = resumed_kv(engine(), tmp_path / "a.kv")
    assert sum(written) == len(TEXT) - NUM_SINKS
    assert len(pages) == len(TEXT) and torch.equal(pages[:NUM_SINKS], rows[:NUM_SINKS])
    assert 0 < float((pages - rows).norm() / rows.norm()) < 5e-3
    assert torch.equal(pages, resumed_kv(engine(), tmp_path / "a.kv")), "the same bits at every resume"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("draft", ["draft", "trunk"])
def test_a_gpu_resumes_into_pages(chat_engine, draft, tmp_path, monkeypatch) -> None:
    def engine():
        return chat_engine(draft, dtype="bfloat16", device="cuda", deterministic=True)

    kept = engine().session(quality="near-lossless", log=lambda _: None)
    kept.generate(TEXT, SamplingParams(max_new_tokens=1, ignore_eos=True))
    kept.suspend(tmp_path / "a.kv")
    pages = resumed_kv(engine(), tmp_path / "a.kv")
    assert torch.equal(pages, resumed_kv(engine(), tmp_path / "a.kv")), "the same bits at every resume"
    monkeypatch.setattr("engine.sessions.kv_codec.use_triton", lambda *tensors: False)
    rows = resumed_kv(engine(), tmp_path / "a.kv")
    assert float((pages - rows).norm() / rows.norm()) < 5e-3
