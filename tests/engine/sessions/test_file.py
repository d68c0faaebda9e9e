"""The session file: what is written comes back, and nothing that was cut, altered, foreign or newer is ever taken for a session."""

from __future__ import annotations

import base64
import errno
import json
import os
import struct
from dataclasses import replace

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.container import FILE_MAGIC, FILE_VERSION, read_sections, write_sections
from codec.errors import CorruptedCode
from codec.spec import NUM_SINKS
from codec.token_ids import MAX_TOKENS
from engine.errors import BadSessionFile, CacheNotWritable, Corrupted, DiskFull, ForeignModel, NewerVersion, PackMismatch, Truncated
from engine.runtime.sampling import SamplingParams
from engine.sessions.file import SessionFile, Span, session_errors

SPANS = [Span(NUM_SINKS, 68, b"first" * 20), Span(68, 90, b"second" * 7)]
FILE = SessionFile([1, 70_000, 3] * 31, 90, "balanced", {"target": "a" * 64, "pack": "b"}, SPANS)
DATA = FILE.to_bytes()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "chat.kv"


def load(file, data):
    file.write_bytes(data)
    return SessionFile.load(file)


def altered(**sections):
    """DATA with some sections' contents replaced, its checksums right."""
    return write_sections([(name, sections.get(name, body)) for name, body in read_sections(DATA)])


def packed(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


# --- whole files --------------------------------------------------------------------------------------------------------

tokens = st.integers(0, 1 << 20)
names = st.text(max_size=12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(tokens, max_size=200),
    st.lists(st.binary(min_size=1, max_size=40), max_size=4),
    st.dictionaries(names, names, max_size=4),
    names,
)
def test_a_file_comes_back(ids, codes, fingerprints, quality):
    ids = ids + [0] * (NUM_SINKS + len(codes) - len(ids))
    spans = [Span(NUM_SINKS + i, NUM_SINKS + i + 1, code) for i, code in enumerate(codes)]
    session = SessionFile(ids, spans[-1].end if spans else len(ids), quality, fingerprints, spans)
    assert SessionFile.from_bytes(session.to_bytes()) == session
    assert session.to_bytes() == replace(session, spans=list(spans)).to_bytes(), "equal sessions are equal bytes"


def test_saving_and_loading(file):
    assert FILE.save(file) == len(DATA) == file.stat().st_size
    assert SessionFile.load(file) == FILE and [p.name for p in file.parent.iterdir()] == ["chat.kv"]


def test_files_of_earlier_versions_open(file):
    """Their ids were counted bit by bit (`codec.counted_ids`)."""
    older = altered(TOKS=base64.b85decode("0bKw90HB_@p%MQ{zrjm_"))
    assert older != DATA and load(file, older) == FILE


def test_a_small_file_never_takes_more_memory_than_the_context_allows(file):
    zeros = {name: zstandard.ZstdCompressor(level=19).compress(bytes(1 << 26)) for name in ("META", "SIZE")}
    for name, body in zeros.items():
        assert len(body) < 1 << 14
        with pytest.raises(Corrupted, match="claim 67108864 bytes"):
            load(file, altered(**{name: body}))
    with pytest.raises(Corrupted, match=r"tokens the model cannot have: 93, where 92 fit"):
        FILE.save(file)
        SessionFile.load(file, 92)
    assert SessionFile.load(file, 93) == FILE


# --- damaged files ------------------------------------------------------------------------------------------------------


def test_every_truncation_is_named(file):
    for length in range(len(DATA)):
        with pytest.raises(Corrupted if length == 0 else Truncated, match=r"chat\.kv: .*file"):
            load(file, DATA[:length])


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.integers(0, 8 * len(DATA) - 1))
def test_every_flipped_bit_is_found(bit):
    data = bytearray(DATA)
    data[bit // 8] ^= 1 << bit % 8
    named = []
    try:
        with session_errors("chat.kv"):
            SessionFile.from_bytes(bytes(data))
    except BadSessionFile as error:
        named.append(type(error))
    at_version = len(FILE_MAGIC) <= bit // 8 < len(FILE_MAGIC) + 2
    assert named and named[0] in ((NewerVersion, Corrupted) if at_version else (Corrupted, Truncated))


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"GGUF" + b"\0" * 50, b"{}", DATA + b"\0", DATA[1:]])
def test_what_is_no_session_file(file, data):
    with pytest.raises(Corrupted, match=r"session file .*chat\.kv: .*\("):
        load(file, data)


def test_a_newer_version_is_named(file):
    newer = write_sections([("META", b""), ("NEWS", b"unknown")], version=FILE_VERSION + 1)
    with pytest.raises(NewerVersion, match=rf"version {FILE_VERSION + 1}.*update the program"):
        load(file, newer)


META = b'{"fingerprints": {}, "num_cached": %d, "num_tokens": %d, "quality": "tiny"}'


@pytest.mark.parametrize(
    "sections",
    [
        {"META": packed(b"no json")},
        {"META": packed(b"[]")},
        {"META": packed(b'{"quality": "tiny"}')},
        {"META": packed(META % (94, 93))},
        {"META": packed(META % (-1, 93))},
        {"META": packed(META % (90, 92))},
        {"META": packed(META % (0, MAX_TOKENS + 1))},
        {"META": packed(META % (91, 93))},
        {"META": b"not compressed"},
        {"META": packed(META % (90, 93))[:-3]},
        {"TOKS": packed(b"\0" * 5)},
        # a frame that claims a terabyte
        {"TOKS": zstandard.MAGIC_NUMBER.to_bytes(4, "little") + b"\xe0" + struct.pack("<Q", 1 << 40) + b"\1\0\0"},
        {"SIZE": packed(b"\0" * 13)},
        {"SIZE": packed(struct.pack("<6I", 4, 68, 100, 69, 90, 42))},
        {"SIZE": packed(struct.pack("<6I", 4, 68, 100, 60, 90, 42))},
        {"SIZE": packed(struct.pack("<6I", 5, 68, 100, 68, 90, 42))},
        {"SIZE": packed(struct.pack("<6I", 0, 68, 100, 68, 90, 42))},
        {"SIZE": packed(struct.pack("<6I", 4, 68, 100, 68, 68, 42))},
        {"SIZE": packed(struct.pack("<6I", 4, 68, 100, 68, 90, 43))},
        {"SIZE": packed(struct.pack("<6I", 4, 68, 100, 68, 90, 41))},
        {"SIZE": packed(struct.pack("<3I", 4, 68, 100))},
        {"SPAN": b""},
    ],
)
def test_contents_that_contradict_themselves_are_refused_though_their_checksums_are_right(file, sections):
    assert load(file, altered()) == FILE
    with pytest.raises(Corrupted):
        load(file, altered(**sections))


def test_more_cached_tokens_than_there_are(file):
    """Without spans nothing else would tell."""
    whole = SessionFile([1, 2, 3], 3, "tokens", {})
    assert load(file, whole.to_bytes()) == whole
    with pytest.raises(Corrupted, match="contradict"):
        load(file, replace(whole, num_cached=4).to_bytes())


def test_missing_and_surplus_sections(file):
    found = read_sections(DATA)
    for sections in (found[:-1], [*found, ("MORE", b"")], found[::-1], []):
        with pytest.raises(Corrupted, match="sections"):
            load(file, write_sections(sections))


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(BadSessionFile, match="cannot be read: No such file"):
        SessionFile.load(tmp_path / "none.kv")
    with pytest.raises(BadSessionFile, match="cannot be read: Is a directory"):
        SessionFile.load(tmp_path)


# --- writing ------------------------------------------------------------------------------------------------------------


def _fails(number):
    def fail(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("step", ["os.fsync", "os.replace", "os.open"])
@pytest.mark.parametrize(
    "number, error", [(errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull), (errno.EACCES, CacheNotWritable), (errno.EIO, CacheNotWritable)]
)
def test_a_failed_write_leaves_the_earlier_file(file, step, number, error, monkeypatch):
    FILE.save(file)
    with monkeypatch.context() as patch:
        patch.setattr(step, _fails(number))
        with pytest.raises(error, match=r"chat\.kv"):
            replace(FILE, quality="tiny").save(file)
    assert SessionFile.load(file) == FILE and [p.name for p in file.parent.iterdir()] == ["chat.kv"]


def test_a_disk_that_fills_up_while_writing(file, monkeypatch):
    FILE.save(file)
    with monkeypatch.context() as patch:
        patch.setattr(SessionFile, "to_bytes", lambda _: DATA[:100])  # more would not fit
        patch.setattr("os.fsync", _fails(errno.ENOSPC))
        with pytest.raises(DiskFull, match="free space"):
            FILE.save(file)
    assert SessionFile.load(file) == FILE and len(list(file.parent.iterdir())) == 1


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_a_crash_in_the_middle_of_a_save_leaves_the_earlier_file(file, step, tmp_path):
    FILE.save(file)
    process = os.fork()
    if process == 0:  # the child dies there and then, as if killed: no handler of ours runs
        import contextlib

        with contextlib.suppress(BaseException):
            setattr(os, step.split(".")[1], lambda *_: os._exit(7))
            replace(FILE, quality="tiny").save(file)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 7
    assert SessionFile.load(file) == FILE
    assert len(list(tmp_path.iterdir())) == 2, "the crash left its unfinished file"
    replace(FILE, quality="tiny").save(file)
    assert SessionFile.load(file).quality == "tiny"


@pytest.mark.parametrize("path", ["no/such/folder/a.kv", "file/a.kv", "folder", "n" * 300, "a\0b"])
def test_places_that_cannot_be_written(tmp_path, path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheNotWritable, match=r"cannot be written: .*choose another path"):
        FILE.save(tmp_path / path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


# --- through an engine --------------------------------------------------------------------------------------------------

PARAMS = SamplingParams(max_new_tokens=30, draft_length=3, ignore_eos=True)


@pytest.fixture(scope="module")
def suspended(chat_engine, tmp_path_factory):
    """A suspended session's file, and an engine that may resume it."""
    engine, file = chat_engine(), tmp_path_factory.mktemp("suspended") / "chat.kv"
    with engine.session(log=lambda _: None) as session:
        session.generate("import this, and that, and what else there is to be had in a library: " * 2, PARAMS)
        session.suspend(file)
    return file, engine


def test_a_foreign_target_is_refused_before_a_pack_is_looked_for(chat_engine, suspended, monkeypatch):
    engine = chat_engine(target="stranger")
    monkeypatch.setattr("engine.sessions.kv_codec.known_pack", None)
    with pytest.raises(ForeignModel, match="another target"):
        engine.session(suspended[0])
    assert engine.core.pool.num_free_pages == engine.core.pool.max_pages


@pytest.mark.parametrize("draft", ["stranger", "trunk", "none"])
def test_another_draft_leaves_the_ids(chat_engine, suspended, draft):
    """What drafts does not decide the text: the target's KV comes back by recomputing."""
    engine, said = chat_engine(draft), []
    stored = SessionFile.load(suspended[0])
    with pytest.raises(ForeignModel, match="another draft"):
        engine.session(suspended[0], restore="decode", log=said.append)
    assert engine.core.pool.num_free_pages == engine.core.pool.max_pages
    with engine.session(suspended[0], log=said.append) as session:
        assert session.token_ids == stored.token_ids and session.resumed.restore == "recompute" and session.spans == []
        assert sum(line.startswith("it was written with another draft: the ") for line in said) == 1
        [wanted] = engine.generate([stored.token_ids], PARAMS)
        assert session.generate("", PARAMS).token_ids == wanted.token_ids


def test_a_foreign_tokenizer_is_refused(chat_engine, byte_tokenizer, suspended):
    engine = chat_engine()
    engine.core.text.tokenizer = byte_tokenizer()
    engine.tokenizer.add_tokens(["another"])
    with pytest.raises(ForeignModel, match="another tokenizer"):
        engine.session(suspended[0])


def test_another_pack_is_refused(chat_engine, suspended, tmp_path):
    pack = suspended[1].core.session_codec.pack
    replace(pack, info=pack.info | {"made": "later"}).save(tmp_path / "other.safetensors")
    engine = chat_engine()
    with pytest.raises(ForeignModel, match="another pack"):
        engine.session(suspended[0], pack=tmp_path / "other.safetensors")
    assert engine.core.pool.num_free_pages == engine.core.pool.max_pages
    foreign = replace(pack, fingerprints=pack.fingerprints | {"target": "of another"})
    foreign.save(tmp_path / "foreign.safetensors")
    with pytest.raises(PackMismatch, match="made for another target"):
        chat_engine().session(pack=tmp_path / "foreign.safetensors")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_a_span_damaged_behind_right_checksums_never_becomes_a_cache(suspended, tmp_path_factory, data):
    """The file's own checksums are made to fit; the spans' own ones, their headers and their order must still tell."""
    file, engine = suspended
    stored = SessionFile.load(file)
    span = data.draw(st.integers(0, len(stored.spans) - 1))
    body = bytearray(stored.spans[span].data)
    body[data.draw(st.integers(0, len(body) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    stored.spans[span] = replace(stored.spans[span], data=bytes(body))
    bad = tmp_path_factory.getbasetemp() / "bad.kv"
    stored.save(bad)
    free = engine.core.pool.num_free_pages, engine.core.draft_pool.num_free_pages
    with pytest.raises(BadSessionFile, match=r"bad\.kv"):
        engine.session(bad)
    assert (engine.core.pool.num_free_pages, engine.core.draft_pool.num_free_pages) == free


def test_spans_in_another_order_or_cut_are_refused(suspended, tmp_path):
    file, engine = suspended
    stored = SessionFile.load(file)
    first, *_, last = stored.spans
    for spans in (
        [replace(first, data=last.data), *stored.spans[1:]],
        [replace(first, data=first.data[:-1]), *stored.spans[1:]],
        [replace(first, data=b""), *stored.spans[1:]],
    ):
        replace(stored, spans=spans).save(tmp_path / "bad.kv")
        with pytest.raises(BadSessionFile, match=r"bad\.kv"):
            engine.session(tmp_path / "bad.kv")
    engine.core.pool.check_integrity()


@pytest.mark.parametrize("ids", [[0, 263, 264], [1 << 31], list(range(200)) * 6])
def test_tokens_the_model_cannot_have(suspended, tmp_path, ids):
    file, engine = suspended
    stored = SessionFile.load(file)
    replace(stored, token_ids=ids, num_cached=0, spans=[]).save(tmp_path / "bad.kv")
    with pytest.raises(Corrupted, match="tokens the model cannot have"):
        engine.session(tmp_path / "bad.kv", quality="tokens")


# --- spans stay where they belong -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def another(suspended, tmp_path_factory):
    """The file of another session of the same engine, with spans of the same bounds."""
    file = tmp_path_factory.mktemp("another") / "chat.kv"
    with suspended[1].session(log=lambda _: None) as session:
        session.generate("something else was said here, and at some length as well, on and on: " * 2, PARAMS)
        session.suspend(file)
    return SessionFile.load(file)


def exchanged(stored, at, span):
    return [*stored.spans[:at], span, *stored.spans[at + 1 :]]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_span_moved_or_taken_from_another_file_is_refused(suspended, another, tmp_path, fresh):
    """fresh: put in as a new object, without the digest it came with."""
    file, engine = suspended
    stored = SessionFile.load(file)
    first, second, *_ = stored.spans
    assert len(stored.spans) > 2 and [(s.start, s.end) for s in another.spans[:2]] == [(s.start, s.end) for s in stored.spans[:2]]
    short, full = first.end - first.start, second.end - second.start
    assert short < full, "the first span has no sinks: moving whole ones needs two of equal length"
    cases = {
        "the first of another file": (0, another.spans[0]),
        "the second of another file": (1, another.spans[1]),
        "the second at the first's place": (0, replace(first, data=second.data)),
    }
    for name, (at, span) in cases.items():
        put = Span(span.start, span.end, span.data) if fresh else span
        replace(stored, spans=exchanged(stored, at, put)).save(tmp_path / "bad.kv")
        with pytest.raises(Corrupted, match=r"bad\.kv: the session's spans do not belong to"):
            engine.session(tmp_path / "bad.kv")
        beside = SessionFile.load(tmp_path / "bad.kv", beside=True)
        for _ in range(2):
            with pytest.raises(CorruptedCode, match="do not belong"):
                beside.confirm()
        assert name
    beside = SessionFile.load(file, beside=True)
    beside.confirm()
    assert beside == stored and beside.to_bytes() == file.read_bytes()


def test_damaged_spans_are_found_by_the_check_beside(suspended, tmp_path):
    file, engine = suspended
    data = bytearray(file.read_bytes())
    data[-20] ^= 1  # of the last span
    (tmp_path / "bad.kv").write_bytes(data)
    with pytest.raises(Corrupted, match="section 3"):
        SessionFile.load(tmp_path / "bad.kv")
    beside = SessionFile.load(tmp_path / "bad.kv", beside=True)
    with pytest.raises(CorruptedCode, match="section 3"):
        beside.confirm()
    with pytest.raises(Corrupted):
        engine.session(tmp_path / "bad.kv")


def test_other_ids_models_or_places_do_not_fit_the_spans(tmp_path):
    raised = replace(SessionFile.from_bytes(DATA), token_ids=[i + 1 for i in FILE.token_ids])
    moved = [
        replace(span, data=data) for span, data in zip(SessionFile.from_bytes(DATA).spans, (b"other" * 20, SPANS[1].data), strict=True)
    ]
    for changed in (
        raised,
        replace(SessionFile.from_bytes(DATA), fingerprints=FILE.fingerprints | {"pack": "c"}),
        replace(SessionFile.from_bytes(DATA), spans=moved),
    ):
        with pytest.raises(Corrupted, match="do not belong"):
            load(tmp_path / "bad.kv", changed.to_bytes())
    sections = dict(read_sections(DATA))
    swapped = bytes(sections["SPAN"])
    assert swapped == b"first" * 20 + b"second" * 7
    with pytest.raises(Corrupted, match="do not belong"):
        load(tmp_path / "bad.kv", altered(SPAN=b"tsrif" * 20 + b"second" * 7))
    with pytest.raises(Corrupted, match="do not belong"):
        load(tmp_path / "bad.kv", altered(SIZE=packed(struct.pack("<6I", 4, 70, 100, 70, 90, 42))))


def test_ids_behind_the_spans_may_grow_and_spans_be_left_out(tmp_path):
    """A conversation that went on, or was cut back, with the spans it had."""
    stored = SessionFile.from_bytes(DATA)
    longer = replace(stored, token_ids=[*stored.token_ids, 7, 8])
    assert load(tmp_path / "a.kv", longer.to_bytes()) == longer
    shorter = replace(stored, num_cached=68, spans=stored.spans[:1])
    assert load(tmp_path / "a.kv", shorter.to_bytes()) == shorter


def test_files_without_a_chain_open_and_get_one(suspended, tmp_path):
    """As versions before the chain wrote them."""
    file, engine = suspended
    sections = read_sections(file.read_bytes())
    meta = json.loads(zstandard.decompress(sections[0][1]))
    assert len(bytes.fromhex(meta.pop("bound"))) == 16
    older = tmp_path / "older.kv"
    older.write_bytes(write_sections([("META", packed(json.dumps(meta).encode())), *sections[1:]]))
    with engine.session(older, log=lambda _: None) as session, engine.session(file, log=lambda _: None) as wanted:
        assert session.resumed.restore == "decode"
        assert session.generate(" and", PARAMS).token_ids == wanted.generate(" and", PARAMS).token_ids
        session.suspend(older)
    assert "bound" in json.loads(zstandard.decompress(read_sections(older.read_bytes())[0][1]))
    engine.session(older, log=lambda _: None).close()


def test_a_pack_that_is_gone_leaves_the_ids(chat_engine, suspended, tmp_path, monkeypatch):
    """One fitted on the spot lies in the cache alone, and fitted again it is another."""
    file, fitted = suspended
    pack = fitted.core.session_codec.pack
    monkeypatch.setattr("engine.sessions.kv_codec.known_pack", lambda *_: replace(pack, info=pack.info | {"made": "later"}))
    engine, said = chat_engine(), []
    stored = SessionFile.load(file)
    with pytest.raises(ForeignModel, match="another pack"):
        engine.session(file, restore="decode", log=said.append)
    assert engine.core.pool.num_free_pages == engine.core.pool.max_pages and said == []
    with engine.session(file, log=said.append) as session:
        assert session.token_ids == stored.token_ids and session.resumed.restore == "recompute"
        assert len(said) == 1 and said[0].startswith("the codec parameters it was written with are gone: the ")
        [wanted] = engine.generate([stored.token_ids], PARAMS)
        assert session.generate("", PARAMS).token_ids == wanted.token_ids
        session.suspend(tmp_path / "again.kv")
    with engine.session(tmp_path / "again.kv", log=said.append) as session:
        assert session.resumed.restore == "decode" and sum("are gone" in line for line in said) == 1


def test_an_unknown_quality_in_a_file_is_refused(suspended, tmp_path):
    file, engine = suspended
    replace(SessionFile.load(file), quality="best").save(tmp_path / "bad.kv")
    with pytest.raises(Corrupted, match="unknown quality 'best'"):
        engine.session(tmp_path / "bad.kv")
