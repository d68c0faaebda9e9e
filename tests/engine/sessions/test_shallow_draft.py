"""Codec parameters that look at the first layers of a separate draft: a restore runs these alone, and the draft catches up when it is asked."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from codec.spec import NUM_SINKS
from engine.calibrate.corpus import documents, library_texts
from engine.calibrate.recipe import CalibrationOptions, calibrate
from engine.runtime.sampling import SamplingParams
from engine.sessions.codec_params import pair_fingerprints
from engine.sessions.kv_codec import SessionCodec, prefill_draft

pytestmark = pytest.mark.usefixtures("all_coded")

PROMPT = "def greet(name):\n    '''Say hello, once, to whoever is there.'''\n    return f'hello, {name}, and welcome'\n" * 2
GREEDY = SamplingParams(max_new_tokens=30, draft_length=3, ignore_eos=True)


@pytest.fixture(scope="module")
def make_pack(chat_engine):
    """`make_pack(taps)` -> codec parameters of the tiny pair that look at these layers of its draft."""
    engine = chat_engine("draft")
    docs, _ = documents(library_texts(), engine.tokenizer, 1500, 128)
    made = partial(calibrate, engine.core.target, engine.core.draft_model, docs, fingerprints=pair_fingerprints(engine.core))

    def make(*taps: int):
        options = CalibrationOptions(
            taps=taps, predictor="dense", weighting="attention", level_strength=0.0, held_out_tokens=400, budget=8.0
        )
        return made(options=options, log=lambda _: None)

    return make


@pytest.mark.parametrize("taps", [(), (0,), (0, 1)])
def test_a_restore_runs_the_layers_that_are_looked_at(chat_engine, make_pack, tmp_path, taps, monkeypatch):
    pack = make_pack(*taps)
    pack.save(tmp_path / "p")
    engine = chat_engine("draft")
    draft = engine.core.draft_model
    per_layer = 2 * (2 * 32 * 32 + 32 * 32 + 3 * 32 * 64)  # q, o, and k and v of two heads of eight channels; then the three of the block
    assert pack.info["restore"]["draft_flops"] == max(taps, default=0) * per_layer
    assert pack.info["restore"]["prefill_flops"] == 4 * per_layer
    session = engine.session(quality="near-lossless", pack=tmp_path / "p", log=lambda _: None)
    session.generate(PROMPT, GREEDY)
    truth = session.core.target.read_kv(session.conversation.sequence, 0, session.conversation.sequence.length)
    session.suspend(tmp_path / "a.kv")
    session.close()

    layers: list[int] = []
    forward = type(draft).forward

    def counted(self, *args, last_layer=None, **options):
        if self is draft:
            layers.append(self.config.num_layers if last_layer is None else last_layer)
        return forward(self, *args, last_layer=last_layer, **options)

    monkeypatch.setattr(type(draft), "forward", counted)
    resumed = engine.session(tmp_path / "a.kv", pack=tmp_path / "p", log=lambda _: None)
    assert resumed.resumed.restore == "decode" and set(layers) == ({1} if 1 in taps else set())
    now = resumed.core.target.read_kv(resumed.conversation.sequence, 0, resumed.conversation.sequence.length)
    error = (now - truth)[NUM_SINKS:].pow(2).sum() / (truth - truth.mean(0))[NUM_SINKS:].pow(2).sum()
    assert 0 < float(error) < 0.25
    torch.testing.assert_close(now[:NUM_SINKS], truth[:NUM_SINKS])
    assert resumed.conversation.draft_state.length == 0, "nobody has asked for drafts yet"
    result = resumed.generate(" then", GREEDY)
    assert result.speculation.proposed > 0 and layers[-1] == 2 and resumed.conversation.draft_state.length > len(truth)
    resumed.suspend(tmp_path / "b.kv")
    assert len(resumed.spans) > 0 and resumed.spans[-1].end == resumed.conversation.sequence.length
    resumed.close()
    engine.core.pool.check_integrity()


def test_the_first_layers_alone_give_the_features_of_a_whole_pass(chat_engine, make_pack):
    engine = chat_engine("draft", deterministic=True)
    codec = SessionCodec(engine.core, make_pack(0, 1))
    ids = torch.randint(256, (100,), generator=torch.Generator().manual_seed(3)).tolist()
    shallow, whole, parted, behind = (engine.core.open_sequence_state() for _ in range(4))
    for conversation in (shallow, whole, parted, behind):
        conversation.token_ids[:] = ids
    with torch.inference_mode():
        prefill_draft(engine.core, whole.draft_state, ids)
        expected = codec._latents(whole, NUM_SINKS, len(ids))
        assert torch.equal(codec._draft_pass(shallow.draft_state, shallow, NUM_SINKS, len(ids)), expected)
        parts = [codec._draft_pass(parted.draft_state, parted, *part) for part in ((NUM_SINKS, 40), (40, 64, 40), (64, len(ids), 64))]
        assert torch.equal(torch.cat(parts), expected)
        # a draft that lies behind what is restored runs up to there first, in pieces of its own
        assert codec.draft_end(behind, 0) == 0 and codec.run_draft(behind, 0, 30) == 30 and codec.run_draft(behind, 30, 50) == 50
        assert torch.equal(codec._draft_pass(behind.draft_state, behind, 64, len(ids), 50), expected[64 - NUM_SINKS :])
        assert codec.draft_end(whole, 0) == len(ids)
    assert shallow.draft_state.length == 0 and whole.draft_state.length == len(ids)
