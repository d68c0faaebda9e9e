"""uvicorn's HTTP/1.1 with bounds on what comes before a request is one: bytes and seconds of its head, and bytes of trailers.

httptools has neither bound. It joins the pieces of a name or value as they come, in time that grows with the square of their length, so that one caller
without a key could keep the server's thread busy for ever, or fill its memory.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10
"""Bytes in a row that are no body: a request line with its headers, trailers, extensions of a chunk."""

MAX_HEAD_S = 60.0
"""From a connection's beginning, or a request's first byte, to the end of its headers."""

_TOO_LARGE = b"431 Request Header Fields Too Large", b"the request's headers are too large"
_TOO_SLOW = b"408 Request Timeout", b"the request's headers took too long"


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection; what it refuses is answered and closed."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_bytes = 0  # since anything else came
        self._slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The time of the first head begins."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is expected any more."""
        self._head_is_here()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Hand data on piece by piece, as a head's end may lie inside of it."""
        for at in range(0, len(data), MAX_HEAD_BYTES):
            piece = data[at : at + MAX_HEAD_BYTES]
            self._head_bytes += len(piece)
            super().data_received(piece)
            if self.transport.is_closing():
                return
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(*_TOO_LARGE)
                return

    def on_message_begin(self) -> None:
        """A request's first byte."""
        self._expect_head()
        super().on_message_begin()

    def on_message_complete(self) -> None:
        """What follows is another request."""
        self._head_bytes = 0
        super().on_message_complete()

    def on_headers_complete(self) -> None:
        """The head was within its bounds."""
        self._head_bytes = 0
        self._head_is_here()
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        """Of a body in chunks; the last one, empty, begins the trailers."""
        self._head_bytes = 0

    def on_body(self, body: bytes) -> None:
        """A part of a body, which the application bounds."""
        self._head_bytes = 0
        super().on_body(body)

    def _expect_head(self) -> None:
        self._head_is_here()
        self._slow = self.loop.call_later(MAX_HEAD_S, self._refuse, *_TOO_SLOW)

    def _head_is_here(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None

    def _refuse(self, status: bytes, what: bytes) -> None:
        """Answer where no other answer was begun, and close."""
        if self.cycle is None or self.cycle.response_complete:
            body = b'{"error":{"message":"' + what + b'","type":"invalid_request_error","param":null,"code":null}}'
            self.transport.write(
                b"HTTP/1.1 "
                + status
                + b"\r\ncontent-type: application/json\r\ncontent-length: "
                + str(len(body)).encode()
                + b"\r\nconnection: close\r\n\r\n"
                + body
            )
        self.transport.close()
