"""Incremental text: unfinished characters and possible stop strings are held back, and the cut into runs does not matter."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
