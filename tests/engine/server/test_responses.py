"""Events of a stream: those written from a frame are those that JSON gives."""

from __future__ import annotations

import json

import pytest

from engine.server.responses import Answer, sse


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("text", ["tide", "", '"} \\ \n\u2028', "\u6f6e \U0001f30a", "\ud83c", "\x00\x7f"])
def test_a_piece_from_a_frame_is_the_piece(chat, text):
    answer = Answer('a "model" {0} %s', chat, n=2)
    for index in (0, 1, 0):
        assert answer.piece_event(index, text) == sse(answer.piece(index, text))


def test_an_event_is_a_line_of_json():
    event = sse({"text": "a\n\nb", "rest": None})
    assert event.startswith(b"data: ") and event.endswith(b"\n\n") and event.count(b"\n") == 2
    assert json.loads(event[6:]) == {"text": "a\n\nb", "rest": None}
