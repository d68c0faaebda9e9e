"""A client of streamed completions that costs little: raw sockets, answers kept as bytes and read afterwards.

Clients of benchmarks run on the server's own cores, so what they compute is taken from what is measured.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_FIRST = (b'"content":"', b'"text":"')  # how a piece of text begins in a chunk
_EMPTY = (b'"content":""', b'"text":""')


@dataclass
class Answer:
    """What came back for one request. began_s, first_s, ended_s: of `time.perf_counter`; first_s: of the first piece of text, 0 for none."""

    began_s: float
    content: bytearray = field(default_factory=bytearray)
    first_s: float = 0.0
    ended_s: float = 0.0

    @property
    def status(self) -> int:
        """Of HTTP; 0 for no answer."""
        return int(self.content[9:12]) if self.content.startswith(b"HTTP/1.1 ") else 0

    @property
    def ttft_ms(self) -> float:
        """Milliseconds to the first piece of text."""
        return 1e3 * (self.first_s - self.began_s)

    def events(self) -> list[dict[str, Any]]:
        """The JSON of its events. Raises ValueError for an answer that is no stream, or has no end."""
        head, _, body = bytes(self.content).partition(b"\r\n\r\n")
        if self.status != 200 or b"text/event-stream" not in head:
            raise ValueError(f"no stream: {bytes(self.content[:300])!r}")
        if b"chunked" in head.lower():
            body = _dechunked(body)
        lines = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
        if not lines or lines[-1] != b"[DONE]":
            raise ValueError("a stream without its end")
        return [json.loads(line) for line in lines[:-1]]

    def text(self) -> str:
        """The text of its first choice. Raises ValueError as `events`."""
        choices = [event["choices"][0] for event in self.events() if event["choices"]]
        return "".join(choice["delta"].get("content") or "" if "delta" in choice else choice["text"] for choice in choices)


def _has_text(piece: bytes) -> bool:
    return any(piece.count(mark) > piece.count(none) for mark, none in zip(_FIRST, _EMPTY, strict=True))


def _dechunked(body: bytes) -> bytes:
    pieces, at = [], 0
    while at < len(body):
        line = body.index(b"\r\n", at)
        size = int(body[at:line], 16)
        pieces.append(body[line + 2 : line + 2 + size])
        at = line + 4 + size
    return b"".join(pieces)


def ask_all(
    url: str,
    path: str,
    bodies: Sequence[dict[str, Any]],
    *,
    at_once: int,
    until_s: float,
    leave_after_bytes: int | None = None,
) -> list[Answer]:
    """Post every body on a connection of its own, at most `at_once` at a time; answers in order, also unfinished ones.

    until_s: of `time.monotonic`, when all connections are closed. leave_after_bytes: close a connection once so much has come.
    """
    parts = urlsplit(url)
    address = (str(parts.hostname), int(parts.port or 80))
    answers: list[Answer | None] = [None] * len(bodies)
    left = deque(enumerate(bodies))
    selector = selectors.DefaultSelector()

    def begin() -> None:
        index, body = left.popleft()
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        connection = socket.create_connection(address)
        answers[index] = Answer(time.perf_counter())
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, answers[index])

    def end(key: selectors.SelectorKey, answer: Answer) -> None:
        selector.unregister(key.fileobj)
        key.fileobj.close()  # type: ignore[union-attr]
        answer.ended_s = time.perf_counter()

    with selector:
        while left or selector.get_map():
            if time.monotonic() > until_s:
                break
            while left and len(selector.get_map()) < at_once:
                begin()
            for key, _ in selector.select(1.0):
                answer: Answer = key.data
                try:
                    piece = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                except ConnectionError:
                    piece = b""
                answer.content += piece
                if not answer.first_s and _has_text(piece):
                    answer.first_s = time.perf_counter()
                if not piece or (leave_after_bytes is not None and len(answer.content) >= leave_after_bytes):
                    end(key, answer)
        for key in list(selector.get_map().values()):
            end(key, key.data)
    return [answer if answer is not None else Answer(0.0) for answer in answers]
