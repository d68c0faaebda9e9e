"""Token ids coded with a model: what is read back, by passes of other shapes, by other numbers of threads, and when it goes wrong."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import engine.sessions.token_coding as token_coding
from codec.errors import CorruptedCode
from codec.token_ids import COUNTED, MODELLED, encode_ids, read_frame, write_frame
from engine.errors import Corrupted, InvalidOption, PoolExhausted
from engine.model.decoder import Decoder
from engine.runtime.sampling import SamplingParams
from engine.sessions.file import SessionFile
from engine.sessions.token_coding import coding_model, decode_tokens, decode_with, encode_tokens, encode_with, record_paths

VOCAB = 97
LONG = b"\0" * 100_000  # a frame longer than any


@pytest.fixture(scope="module")
def model(random_decoder):
    return random_decoder(3, num_hidden_layers=2)


@pytest.fixture(scope="module")
def text(model):
    """360 tokens the model itself might have said."""
    generator, sequence = torch.Generator().manual_seed(0), model.new_pool(8).new_sequence()
    ids = [7]
    while len(ids) < 360:
        logits = model.forward(torch.tensor(ids[-1:]), [sequence], [1]).logits
        sequence.advance(1)
        ids.append(int(torch.multinomial(logits[0].softmax(-1), 1, generator=generator)))
    return ids


@pytest.fixture(scope="module")
def frame(model, text):
    made = encode_with(model, text, 4, LONG)
    assert read_frame(made)[0] == MODELLED
    return made


def cross_entropy(model, ids):
    """Bits of ids[1:] under the model."""
    logits = model.forward(torch.tensor(ids[:-1]), [model.new_pool(8).new_sequence()], [len(ids) - 1]).logits
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")) / np.log(2)


# --- what comes back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, lanes", [(2, 1), (3, 2), (65, 64), (128, 5), (64, 64), (360, 1)])
def test_ids_come_back(model, text, count, lanes):
    assert decode_with(model, encode_with(model, text[:count], lanes, LONG)) == text[:count]


def test_cost_is_near_the_cross_entropy(model, text):
    bits = 8 * len(encode_with(model, text, 1, LONG))
    ideal = cross_entropy(model, text)
    assert ideal < bits < 1.1 * ideal + 10 * 8 + 7, "beyond the frame and the first token"
    assert bits < 0.8 * 8 * len(encode_ids(text))


@pytest.mark.parametrize("threads", [1, 2])
def test_other_numbers_of_threads(model, text, threads):
    """Few tokens: threads that have to share a busy core are slow."""
    made, before = encode_with(model, text[:80], 2, LONG), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert decode_with(model, made) == text[:80]
        assert decode_with(model, encode_with(model, text[:40], 1, LONG)) == text[:40]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("chunks, lanes_at_once", [((1,), 1), ((1,), 64), ((5,), 3), ((1, 2, 31), 2), ((64,), 64)])
def test_passes_of_every_shape_say_the_same_within_the_margin(model, text, chunks, lanes_at_once):
    ours, theirs = (record_paths(model, text, 4, *shape) for shape in ((1, (64,)), (lanes_at_once, chunks)))
    assert ours.drift(theirs) < token_coding.SMALLEST_MARGIN / 2
    assert theirs.candidate.shape == (360,) and theirs.odds.shape == (360, 8)


def shaken(model, size, seed):
    """The model with an error in every logit, new at every call, of at most `size` times the spacing of bfloat16 there."""
    generator, forward = torch.Generator().manual_seed(seed), model.forward

    def noisy(*args, **options):
        out = forward(*args, **options)
        spacing = 2.0 ** (out.logits.abs().clamp_min(2.0**-9).log2().floor() - 7)
        noise = size * spacing * (2 * torch.rand(out.logits.shape, generator=generator) - 1)
        return SimpleNamespace(logits=out.logits + noise)

    return SimpleNamespace(forward=noisy, config=model.config, device=model.device, dtype=model.dtype, new_pool=model.new_pool)


@pytest.mark.parametrize("spacings", [0.005, 0.02, 1, 3])
def test_logits_off_by_steps_of_bfloat16(model, text, spacings):
    """The drift is seen when coding, and the margin made to fit; where it would be too wide the model is not used."""
    made = encode_with(shaken(model, spacings, 1), text, 3, LONG)
    if spacings < 0.1:
        assert read_frame(made)[0] == MODELLED and len(made) > len(encode_with(model, text, 3, LONG))
        for seed in (2, 3):
            assert decode_with(shaken(model, spacings, seed), made) == text
    else:
        assert made == LONG


def test_a_pass_that_reads_back_something_else_is_not_trusted(model, text, monkeypatch):
    counted = encode_ids(text)
    monkeypatch.setattr(token_coding, "reads_back", lambda *_: False)
    assert encode_with(model, text, 4, LONG) == LONG and encode_with(model, text, 4, counted) == counted


def test_a_model_that_drifts_too_far_is_not_used(model, text):
    assert encode_with(shaken(model, 1000, 1), text, 4, LONG) == LONG


# --- damage -------------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_altered_frames_never_give_other_ids(model, text, frame, data):
    at = data.draw(st.integers(9, len(frame) - 1))
    broken = bytearray(frame)
    broken[at] ^= data.draw(st.integers(1, 255))
    with suppress(CorruptedCode):
        assert decode_with(model, bytes(broken)) == text


def test_another_model_is_found_out(random_decoder, frame):
    with pytest.raises(CorruptedCode):
        decode_with(random_decoder(4, num_hidden_layers=2), frame)


@pytest.mark.parametrize("cut", [0, 8, 9, 16, 40, 100])
def test_cut_frames(model, frame, cut):
    with pytest.raises(CorruptedCode):
        decode_with(model, frame[:cut])


# --- an engine's model and sessions -------------------------------------------------------------------------------------

GREEDY = SamplingParams(max_new_tokens=150, draft_length=3, ignore_eos=True)


def test_which_model_codes(chat_engine):
    for draft in ("draft", "trunk", "none"):
        engine = chat_engine(draft)
        assert coding_model(engine) is (engine.draft_decoder or engine.target)
    rounded = chat_engine("draft", dtype="bfloat16")
    model = coding_model(rounded)
    assert isinstance(model, Decoder) and model.dtype == torch.float32 and model.config == rounded.draft_decoder.config
    rounded.draft_dir = None
    assert coding_model(rounded) is None and encode_tokens(rounded, [1, 2, 3] * 30) == encode_ids([1, 2, 3] * 30)
    with pytest.raises(InvalidOption, match="float32"):
        decode_tokens(rounded, write_frame(MODELLED, [1], b""))


def test_ids_beyond_the_coding_model_and_lack_of_room(chat_engine, monkeypatch):
    engine = chat_engine("draft")
    ids = [1, 2, 3, 300] * 30
    assert encode_tokens(engine, ids) == encode_ids(ids)

    def fails(*_, **__):
        raise PoolExhausted("no room")

    monkeypatch.setattr(token_coding, "record_paths", fails)
    assert encode_tokens(engine, [1, 2, 3] * 30) == encode_ids([1, 2, 3] * 30)
    assert encode_tokens(engine, [1]) == encode_ids([1])


@pytest.mark.parametrize("draft, dtype", [("draft", "float32"), ("draft", "bfloat16"), ("trunk", "bfloat16"), ("none", "float32")])
def test_sessions_of_tokens_come_back(chat_engine, draft, dtype, tmp_path):
    target = "draft" if draft == "draft" else "target"  # else a tiny draft knows less of the text than counting does
    with chat_engine(draft, target, dtype=dtype).session(quality="tokens", log=lambda _: None) as session:
        session.generate("def greet(name): return f'hello, {name}'\n", GREEDY)
        ids = list(session.token_ids)
        report = session.suspend(tmp_path / "a.kv")
        session.suspend(tmp_path / "b.kv")
    assert (tmp_path / "a.kv").read_bytes() == (tmp_path / "b.kv").read_bytes()
    stored = SessionFile.load(tmp_path / "a.kv")
    assert stored.token_frame is not None and read_frame(stored.token_frame)[0] == MODELLED
    assert (stored.token_ids, stored.num_tokens) == ([], len(ids)) and len(stored.token_frame) < len(encode_ids(ids))
    assert SessionFile.from_bytes(stored.to_bytes()) == stored
    assert report.stored_bytes == (tmp_path / "a.kv").stat().st_size
    with chat_engine(draft, target, dtype=dtype).session(tmp_path / "a.kv", log=lambda _: None) as resumed:
        assert resumed.token_ids == ids
        assert resumed.generate("", SamplingParams(max_new_tokens=5)).prompt_tokens == len(ids)


def test_a_damaged_frame_in_a_sound_file_is_named(chat_engine, tmp_path):
    engine = chat_engine("none")
    with engine.session(quality="tokens", log=lambda _: None) as session:
        session.generate("what was that?", GREEDY)
        session.suspend(tmp_path / "a.kv")
    stored = SessionFile.load(tmp_path / "a.kv")
    body = bytearray(stored.token_frame)
    body[30] ^= 16
    stored.token_frame = bytes(body)
    stored.save(tmp_path / "bad.kv")
    free = engine.pool.num_free_pages
    with pytest.raises(Corrupted, match=r"bad\.kv: .*token id"):
        engine.session(tmp_path / "bad.kv")
    assert engine.pool.num_free_pages == free


def test_ids_may_be_counted_instead(chat_engine, tmp_path, monkeypatch):
    with chat_engine("none").session(quality="tokens", token_coder="draft", log=lambda _: None) as session:
        session.generate("what was that?", GREEDY)
        coded = session.suspend(tmp_path / "a.kv").stored_bytes
    with chat_engine("none").session(tmp_path / "a.kv", token_coder="counts", log=lambda _: None) as again:
        assert again.suspend(tmp_path / "b.kv").stored_bytes > coded
        monkeypatch.setattr("engine.sessions.session.decode_tokens", None)
        with chat_engine("none").session(tmp_path / "b.kv", log=lambda _: None) as resumed:
            assert resumed.token_ids == session.token_ids
    with pytest.raises(InvalidOption, match=r"token coder 'best'.*draft, counts"):
        chat_engine("none").session(token_coder="best")


def test_other_qualities_need_no_model_for_their_ids(chat_engine, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.sessions.session.encode_tokens", None)
    with chat_engine("draft").session(quality="tiny", log=lambda _: None) as session:
        session.generate("what was that?", GREEDY)
        session.suspend(tmp_path / "a.kv")
        stored = SessionFile.load(tmp_path / "a.kv")
        assert stored.token_frame is None and stored.token_ids == session.token_ids
    assert read_frame(encode_ids(stored.token_ids))[0] == COUNTED
