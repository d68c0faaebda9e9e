"""Session files that others wrote, with checksums that are right: named at once, before work or memory is spent on them."""

from __future__ import annotations

import json
import math
import os
import threading

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.container import MAX_STEP, MIN_STEP, SpanCode, read_sections, read_span, write_sections
from codec.errors import BadInput, CodecError, CorruptedCode
from codec.spec import NUM_SINKS
from engine.errors import BadSessionFile, Corrupted, EmptyPrompt, ForetoldError, InvalidOption
from engine.runtime.sampling import SamplingParams
from engine.sessions.file import SessionFile, Span

BOUNDED = settings(max_examples=150, deadline=10_000, derandomize=True, database=None)
DATA = SessionFile([1, 2, 3] * 31, 90, "balanced", {"target": "a" * 64}, [Span(NUM_SINKS, 90, b"code" * 20)]).to_bytes()
META = {"quality": "balanced", "num_cached": 90, "num_tokens": 93, "fingerprints": {}}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from([10**9, 93, 90, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def described(text: str) -> bytes:
    """DATA with another description, its checksums right."""
    packed = zstandard.ZstdCompressor().compress(text.encode("utf-8", "surrogatepass"))
    return write_sections([(name, packed if name == "META" else body) for name, body in read_sections(DATA)])


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "[]",
        "5",
        "[" * 100_000,
        json.dumps(META | {"num_cached": math.inf}),
        json.dumps(META | {"num_tokens": math.nan}),
        json.dumps(META | {"num_cached": "90"}),
        json.dumps(META | {"num_cached": 90.0}),
        json.dumps(META | {"num_cached": True}),
        json.dumps(META | {"num_tokens": 10**30}),
        json.dumps(META | {"num_tokens": -1}),
        json.dumps(META | {"quality": None}),
        json.dumps(META | {"quality": ["balanced"]}),
        json.dumps(META | {"fingerprints": []}),
        json.dumps(META | {"fingerprints": {"target": 5}}),
        json.dumps(META | {"auto": "yes"}),
    ],
)
def test_descriptions_of_another_shape(text):
    with pytest.raises(CorruptedCode):
        SessionFile.from_bytes(described(text))


@BOUNDED
@given(st.dictionaries(st.sampled_from([*list(META), "auto"]), JSON, max_size=4))
def test_any_json_in_a_description(changes):
    try:
        SessionFile.from_bytes(described(json.dumps(META | changes)))
    except CodecError:
        return


@BOUNDED
@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda tail: DATA[:40] + tail))
def test_any_bytes_as_a_session(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("session") / "x.kv"
    path.write_bytes(content)
    with pytest.raises(BadSessionFile):
        SessionFile.load(path)


def test_paths_that_hold_no_session(tmp_path, takes_less):
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(BadSessionFile, match="not a regular file"):
            SessionFile.load(tmp_path / "pipe")
    for name in ("x" * 300, "a\0b", "", "gone"):
        with pytest.raises(BadSessionFile):
            SessionFile.load(tmp_path / name)
    if os.path.exists("/dev/zero"):
        with pytest.raises(BadSessionFile, match="not a regular file"):
            SessionFile.load("/dev/zero")
    for content, refusal, options in ((b"", "not a Foretold file", {}), (DATA, "bytes, more than the 1,000,000", {"max_bytes": 1_000_000})):
        with open(tmp_path / "sparse", "wb") as file:
            file.write(content)
            file.truncate(20 << 30)

        def refused(refusal=refusal, options=options):
            with pytest.raises(BadSessionFile, match=refusal):
                SessionFile.load(tmp_path / "sparse", **options)

        takes_less(1, refused)  # none of it is read
    for path in (None, 5):
        with pytest.raises(BadSessionFile):
            SessionFile.load(path)


def test_names_that_are_commands_to_a_terminal_do_not_reach_it(tmp_path):
    path = tmp_path / "\x1b[31mred\x07"
    path.write_bytes(b"anything else")
    with pytest.raises(Corrupted) as error:
        SessionFile.load(path)
    assert str(error.value).isprintable() and "x1b" in str(error.value)


@pytest.mark.parametrize("step", [0.0, 1e30, 1e-30, -1.0, math.inf, math.nan, MAX_STEP * 2, MIN_STEP / 2])
def test_quantiser_steps_that_make_no_number(step):
    from codec.container import write_span

    empty = np.zeros(1, np.uint32), np.zeros(0, np.uint16)
    code = SpanCode(1.0, 2, 2, 1, 0, *empty, None, b"")
    whole = bytearray(write_span(code))
    assert read_span(bytes(whole)).step == 1.0
    with pytest.raises(BadInput, match="quantiser step"):
        write_span(SpanCode(step, 2, 2, 1, 0, *empty, None, b""))
    import struct
    import zlib

    struct.pack_into("<f", whole, whole.index(struct.pack("<f", 1.0)), step)
    struct.pack_into("<I", whole, len(whole) - 4, zlib.crc32(bytes(whole[:-4])))
    with pytest.raises(CorruptedCode, match="contradicts itself"):
        read_span(bytes(whole))


def test_what_is_said_to_a_session_is_checked_as_prompts_are(chat_engine):
    one = SamplingParams(max_new_tokens=1)
    with chat_engine("none").session(quality="tokens") as session:
        session.generate(np.array([5, 6]), one)
        assert session.token_ids[:2] == [5, 6] and all(type(i) is int for i in session.token_ids)
        before = list(session.token_ids)
        for wrong in (b"abc", 5, [1.5], [True]):
            with pytest.raises(InvalidOption):
                session.generate(wrong, one)
        for wrong in (None, 5, b"hi", ["hi"]):
            with pytest.raises(InvalidOption):
                session.chat(wrong, one)
        with pytest.raises(EmptyPrompt):
            session.chat(" ", one)
        assert session.token_ids == before


def test_a_session_file_changed_anywhere_is_named_while_others_read(chat_engine, tmp_path):
    """Threads that only read files share nothing."""
    found: list[str] = []

    def read(number: int) -> None:
        path = tmp_path / f"{number}.kv"
        path.write_bytes(DATA[: -1 - number])
        try:
            SessionFile.load(path)
        except ForetoldError as error:
            found.append(type(error).__name__)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["Truncated"] * 8
