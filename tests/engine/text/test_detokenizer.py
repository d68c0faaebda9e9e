"""Incremental text: unfinished characters and possible stop strings are held back, and the cut into runs does not matter."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from engine.text.detokenizer import TextStream


def decode(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def test_an_unfinished_character_is_held_back():
    stream = TextStream(decode)
    data = "aé€😀b".encode()
    pieces = []
    for byte in data:
        stream.push([byte])
        pieces.append(stream.take())
    assert "".join(pieces) == "aé€😀b"
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces[1] == "" and pieces[2] == "é"


def test_what_stays_unfinished_is_shown_at_the_end():
    stream = TextStream(decode)
    stream.push(list("né".encode()[:-1]))
    assert stream.take() == "n"
    stream.finish()
    assert stream.text == "n\ufffd" and stream.take() == "\ufffd"


def test_the_beginning_of_a_stop_string_is_held_back_and_released_when_it_is_none():
    stream = TextStream(decode, stop=["STOP"])
    assert stream.push(list(b"ab ST")) is None
    assert stream.take() == "ab "
    assert stream.push(list(b"AY S")) is None
    assert stream.take() == "STAY "
    stream.finish()
    assert stream.take() == "S" and stream.text == "ab STAY S"


def test_a_stop_string_ends_the_text_and_names_the_tokens_used():
    stream = TextStream(decode, stop=["END", "\n\n"])
    assert stream.push(list(b"one\n")) is None
    assert stream.push(list(b"\ntwo END")) == 1
    stream.finish()
    assert stream.text == "one"


def test_the_string_completed_first_wins():
    stream = TextStream(decode, stop=["abc", "b"])
    assert stream.push(list(b"xabc")) == 3
    assert stream.text == "xa"


def test_the_context_keeps_a_leading_space():
    words = {0: "Hello", 1: " world", 2: " again"}

    def stripping(ids):  # as sentencepiece decoders do
        return "".join(words[i] for i in ids).lstrip(" ")

    stream = TextStream(stripping, context=[0])
    stream.push([1])
    assert stream.take() == " world"
    stream.push([2])
    stream.finish()
    assert stream.text == " world again"


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet="ab\né😀", max_size=24),
    stop=st.lists(st.text(alphabet="ab\né😀", min_size=1, max_size=3), max_size=3),
    cuts=st.lists(st.integers(1, 6), min_size=1, max_size=40),
)
@pytest.mark.filterwarnings("ignore")
def test_text_and_stops_do_not_depend_on_how_runs_are_cut(text, stop, cuts):
    tokens = list(text.encode())

    def consume(sizes):
        stream, used, streamed, i = TextStream(decode, stop=stop), 0, "", 0
        while used < len(tokens):
            run = tokens[used : used + sizes[i % len(sizes)]]
            i += 1
            kept = stream.push(run)
            streamed += stream.take()
            used += len(run) if kept is None else kept
            if kept is not None:
                break
        stream.finish()
        return used, stream.text, streamed + stream.take()

    one_by_one = consume([1])
    assert consume(cuts) == one_by_one
    used, final, streamed = one_by_one
    assert streamed == final and text.startswith(final)
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    if ends:
        first = min(end for end, _ in ends)
        assert final == text[: min(start for end, start in ends if end == first)]
        assert used == len(text[:first].encode())
    else:
        assert final == text and used == len(tokens)


WORDS = ["<s>", "\u2581a", "\u2581", "b", "\u2581c\u00e9"]  # ids 0 to 4, the first is special; bytes follow


@pytest.fixture(scope="module")
def fallback():
    """decode of a tokenizer in sentencepiece's manner: words with a marked space, and a token for every byte."""
    vocab = {word: i for i, word in enumerate([*WORDS, *(f"<0x{b:02X}>" for b in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)


def as_bytes(text):
    return [len(WORDS) + b for b in (text.encode() if isinstance(text, str) else text)]


def consume(decode, tokens, sizes, *, look, stop=(), context=()):
    """(text, streamed text) of tokens pushed in runs of the given sizes."""
    stream, streamed, used, i = TextStream(decode, context, stop), "", 0, 0
    while used < len(tokens):
        size = sizes[i % len(sizes)]
        kept = stream.push(tokens[used : used + size])
        if look:
            streamed += stream.take()
            assert streamed == stream.text
        used, i = used + size, i + 1
        if kept is not None:
            break
    stream.finish()
    return stream.text, streamed + stream.take()


def test_two_emoji_of_bytes_cut_in_the_second_are_the_same_text_however_they_are_asked_for(fallback):
    tokens = as_bytes("\U0001f600\U0001f680")[:6]
    assert fallback(tokens) == "\ufffd" * 6, "at once the tokenizer gives up the first one too"
    for sizes in ([1], [6], [4, 2], [5, 1]):
        for look in (True, False):
            assert consume(fallback, tokens, sizes, look=look) == ("\U0001f600\ufffd\ufffd",) * 2


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from([0, 1, 2, 3, 4, "\u00e9", "\u20ac", "\U0001f600", b"\xff", b"\xf0\x9f", b"\x80", b"\xe2\x82", "A"]), max_size=12
    ),
    cuts=st.lists(st.integers(1, 6), min_size=1, max_size=10),
    context=st.sampled_from([[], [1], [3, 4], as_bytes("\U0001f600"), as_bytes(b"\xf0\x9f"), [0]]),
    stop=st.lists(st.sampled_from(["a", " c", "\u20ac", "bA"]), max_size=2),
)
def test_text_of_words_and_broken_bytes_does_not_depend_on_cuts_or_looks(fallback, pieces, cuts, context, stop):
    tokens = [t for piece in pieces for t in ([piece] if isinstance(piece, int) else as_bytes(piece))]
    text, streamed = consume(fallback, tokens, [1], look=True, context=context, stop=stop)
    assert text == streamed
    for look in (True, False):
        assert consume(fallback, tokens, cuts, look=look, context=context, stop=stop) == (text, text)
    if not stop and "\ufffd" not in fallback([*context, *tokens]):
        assert text == fallback([*context, *tokens])[len(fallback(context)) :]


@pytest.mark.parametrize(
    "context, tokens, text",
    [
        ([], [*as_bytes(b"\x9f"), 1, 1], "\ufffd a a"),  # the words behind bytes that are no text are what the next one follows
        ([4, *as_bytes(b"\xf0")], [*as_bytes(b"\xff"), 4, 1], "\ufffd c\u00e9 a"),
        ([], [3, 1, 2, 1], "b a  a"),  # a space alone decodes to nothing: it follows what stood before
        ([], [2, 2, 1, 2, *as_bytes(b"\xe2"), 3], "  a \ufffdb"),
        ([2], [2, *as_bytes("\u2018"), 1], "\u2018 a"),
        ([], [*as_bytes(b"\x80\xff"), 4, 2, 2, 0, 1], "\ufffd\ufffd c\u00e9   a"),
    ],
)
def test_words_around_broken_bytes_and_spaces_keep_their_spaces(fallback, context, tokens, text):
    for sizes in ([1], [2, 1], [20]):
        for look in (True, False):
            assert consume(fallback, tokens, sizes, look=look, context=context) == (text, text)


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=20), cuts=st.lists(st.integers(1, 6), min_size=1, max_size=10))
def test_broken_bytes_of_a_byte_level_tokenizer_come_out_as_python_decodes_them(data, cuts):
    for sizes in ([1], cuts, [20]):
        for look in (True, False):
            assert consume(decode, list(data), sizes, look=look) == (decode(data),) * 2


@pytest.mark.parametrize("byte", [0xFF, 0x80, 0xF0], ids=hex)
def test_bytes_that_are_no_text_are_released_as_they_come_in_linear_time(fallback, byte):
    for decoder, token in ((decode, byte), (fallback, len(WORDS) + byte)):
        decoded = 0

        def counting(ids, decoder=decoder):
            nonlocal decoded
            decoded += len(ids)
            return decoder(ids)

        stream, streamed, most = TextStream(counting), "", 0
        for count in range(1, 301):
            stream.push([token])
            streamed += stream.take()
            most = max(most, count - len(streamed))
        stream.finish()
        assert streamed + stream.take() == "\ufffd" * 300
        assert most <= 3, "at most an unfinished character is held back"
        assert decoded < 300 * 200


def test_special_tokens_within_a_character_change_nothing(fallback):
    a, b, c, d = as_bytes("\U0001f600")
    assert consume(fallback, [1, a, 0, b, 0, 0, 0, c, d], [1], look=True) == ("a\U0001f600",) * 2
    assert consume(fallback, [0] * 50 + [1, 1], [1], look=True) == ("a a",) * 2


def test_of_several_stops_in_one_token_the_earliest_ends_the_text():
    words = {0: "x", 1: "one END two STOP", 2: "y"}
    stream = TextStream(lambda ids: "".join(words[i] for i in ids), stop=["STOP", "END", "two"])
    assert stream.push([0, 1, 2]) == 2
    assert stream.text == "xone "
