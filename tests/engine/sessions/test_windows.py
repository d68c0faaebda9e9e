"""Sessions of models with windows: a file codes of windowed layers what is still seen, and a resume gives the pool no more."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from engine.calibrate.recipe import quick_pack
from engine.engine import Engine
from engine.kv.windowed_pool import WindowedPool
from engine.model.decoder import forward_reserved
from engine.runtime.sampling import SamplingParams
from engine.sessions.kv_codec import session_codec
from engine.sessions.pieces import at_once
from engine.sessions.rates import Rates, measure
from tests.engine.conftest import measured

pytestmark = pytest.mark.usefixtures("all_coded")
QUALITIES = ("near-lossless", "balanced", "compact", "tiny", "tokens")
PARAMS = SamplingParams(max_new_tokens=1, draft_length=2, ignore_eos=True)


@pytest.fixture(params=["trunk", "none"])
def make_engine(request, tiny_model, byte_tokenizer, tmp_path, monkeypatch):
    """`make_engine()` -> an engine whose windowed layers keep their window alone, with a file's codec parameters fitted once."""
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("engine.sessions.codec_params.quick_pack", partial(quick_pack, num_tokens=768, context=128, rank=48))
    monkeypatch.setattr("engine.sessions.rates.measure", measured(Rates(0.0, 1e-6, 0.0, 1.0)))
    monkeypatch.setattr("engine.sessions.rates.SHORTEST", 0)
    folder = tmp_path / "model"
    reference = copy.deepcopy(tiny_model("gemma3", vocab_size=264, eos_token_id=256, max_position_embeddings=1024).reference)
    for parameter in reference.parameters():  # calmer, so that a code's error stays one
        if parameter.dim() > 1:
            parameter.data *= 0.4
    reference.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)

    def make(windows=True):
        with monkeypatch.context() as patch:
            if not windows:
                patch.setattr("engine.runtime.core.window_layers", lambda *_: ())
            engine = Engine.from_pretrained(folder, request.param, device="cpu", dtype="float32", page_size=16, pool_tokens=1 << 13)
        assert isinstance(engine.core.pool, WindowedPool) == windows
        return engine

    return make


def ids_of(count):
    return torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(3)).tolist()


def ahead(engine, session):
    """[30, V] log probabilities of what follows the cache; nothing moves."""
    sequence = session.conversation.sequence
    ids = torch.tensor([*session.token_ids[sequence.length :], *range(60, 90)])
    return forward_reserved(engine.core.target, ids, [sequence], [len(ids)]).logits[-30:].log_softmax(-1)


def test_what_windowed_layers_code_and_hold_stops_growing(make_engine, tmp_path):
    """At every quality a resumed text goes on within the loss; what lies before the windows has no residual in the file, and no page."""
    engine, plain, file = make_engine(), make_engine(windows=False), tmp_path / "session.kv"
    found = {}
    for quality in QUALITIES:
        for tokens in (300, 700):
            session = engine.session(None, quality=quality, log=lambda _: None)
            session.generate(ids_of(tokens), PARAMS)
            wanted = ahead(engine, session)
            session.suspend(file)
            again = engine.session(file, restore="recompute" if quality == "tokens" else "decode", log=lambda _: None)
            resumed = ahead(engine, again)
            divergence = float((wanted.exp() * (wanted - resumed)).sum(-1).mean())
            assert divergence < (1e-6 if quality == "tokens" else 0.4), quality  # a quick pack knows the loss only as other models have it
            if quality != "tokens":
                other = plain.session(file, restore="decode", log=lambda _: None)
                assert (ahead(plain, other) - resumed).abs().max() < 1e-4, "an engine that holds all pages restores the same"
                other.close()
                codec = engine.core.session_codec
                window, held = again.conversation.sequence.windows[0], again.conversation.sequence.length
                found[quality, tokens] = len(window.pages)
                assert window.held_from(0) == 0 and window.first_token == again.resumed.tokens - window.window
                # all rows against those of windowed layers alone: the others' are as predicted
                rows, predicted = torch.ones(held, codec.pack.layout.dim), torch.zeros(held, codec.pack.layout.dim)
                codec._leave_out_unseen(session.conversation.sequence, rows, predicted, 0, held - 1)
                width = engine.core.target.config.kv_width
                kept = [int(part[:, 0].sum()) for part in rows.split(width, 1)]
                shapes = engine.core.target.layer_shapes[codec.first_layer :]
                assert kept == [min(held, shape.window or held) for shape in shapes]
            for own in (session, again):
                own.close()
            engine.core.pool.check_integrity()
        if quality != "tokens":
            assert abs(found[quality, 300] - found[quality, 700]) <= 1, "pages of one window"


def test_a_resumed_text_goes_on_is_coded_again_and_taken_back(make_engine, tmp_path):
    """Only new tokens are coded; taken back before the restored windows it runs from its ids, exactly."""
    engine, files = make_engine(), [tmp_path / f"{n}.kv" for n in range(2)]
    session = engine.session(None, quality="near-lossless", log=lambda _: None)
    session.generate(ids_of(300), PARAMS)
    session.suspend(files[0])
    again = engine.session(files[0], restore="decode", log=lambda _: None)
    spans = list(again.spans)
    again.generate(ids_of(500)[300:], PARAMS)
    wanted = ahead(engine, again)
    again.suspend(files[1])
    assert [span.data for span in again.spans[: len(spans)]] == [span.data for span in spans] and len(again.spans) > len(spans)
    last = engine.session(files[1], restore="decode", log=lambda _: None)
    assert float((wanted.exp() * (wanted - ahead(engine, last))).sum(-1).mean()) < 0.1
    conversation = last.conversation
    del conversation.token_ids[400:]
    conversation.sequence.truncate(min(conversation.sequence.length, 400))
    assert conversation.sequence.length == 0 and not conversation.sequence.windows[0].pages
    conversation.emptied()
    result = engine.core.run(conversation, [5, 6], SamplingParams(max_new_tokens=12, draft_length=2, ignore_eos=True))
    fresh = make_engine().generate(conversation.token_ids[:402], SamplingParams(max_new_tokens=12, draft_length=2, ignore_eos=True))[0]
    assert result.token_ids == fresh.token_ids
    engine.core.pool.check_integrity()


def test_files_of_all_rows_still_open(make_engine, tmp_path):
    """Earlier engines held, and coded, all rows of windowed layers."""
    plain, file = make_engine(windows=False), tmp_path / "session.kv"
    session = plain.session(None, quality="near-lossless", log=lambda _: None)
    session.generate(ids_of(300), PARAMS)
    codec, held = plain.core.session_codec, session.conversation.sequence.length
    with torch.inference_mode():
        session.spans = codec.encode(session.conversation, 4, held, "near-lossless", earlier=[])
    wanted = ahead(plain, session)
    session.suspend(file)
    engine = make_engine()
    again = engine.session(file, restore="decode", log=lambda _: None)
    assert again.conversation.sequence.length == held
    assert float((wanted.exp() * (wanted - ahead(engine, again))).sum(-1).mean()) < 0.1
    assert len(again.conversation.sequence.windows[0].pages) <= 3, "with those of what was looked at ahead"


def test_windows_are_measured_in_what_the_pool_has(make_engine):
    engine = make_engine()
    rates = at_once(measure(session_codec(engine.core, log=lambda _: None)))
    assert rates is not None and rates.restoring(512) > 0 and rates.recomputing(512) > 0 and rates.coding(512) > 0
    assert rates.recompute_pair_s == 0, "a pass far behind attends to no more than a window holds"
    pool = engine.core.pool
    pool.check_integrity()
    assert all(own.num_free_pages == own.max_pages for own in pool.groups)
