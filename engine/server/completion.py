"""One call of a completion route: its requests in the engine, and its answer, whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse

from engine.runtime.request import GenerationResult, StreamEvent
from engine.server.errors import ApiError
from engine.server.loop import EngineLoop, Event, Ticket
from engine.server.protocol import CompletionRequest
from engine.server.responses import Answer, Choice, LogprobsForm, finish_reason, sse


class Call:
    """The requests of one call, n to a prompt.

    Args:
        asked: what the caller wants.
        prompts: token ids of each of its prompts, as a list and as `EngineCore.check_tokens` returned them. echoed: what the texts of each begin with.
        answer: makes the JSON.
        loop: runs the requests, once `start` has queued them.
        logprobs: form of log probabilities.
    """

    def __init__(
        self,
        asked: CompletionRequest,
        prompts: list[tuple[list[int], np.ndarray]],
        echoed: list[str],
        *,
        answer: Answer,
        loop: EngineLoop,
        logprobs: LogprobsForm,
        namespace: str,
        deadline: float,
    ) -> None:
        self.asked, self.answer, self._loop, self._logprobs = asked, answer, loop, logprobs
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._echoed: list[str] = []  # what each choice's text begins with
        self._results: dict[int, GenerationResult] = {}
        for beginning, (tokens, row) in zip(echoed, prompts, strict=True):
            for choice in range(asked.n):
                params = asked.sampling(len(tokens), loop.engine.context, choice)
                self._tickets.append(Ticket(tokens, params, namespace, self._sink(len(self._tickets)), deadline, row=row))
                self._echoed.append(beginning)

    def _sink(self, index: int) -> Callable[[Event], None]:
        return lambda event: self._events.put_nowait((index, event))

    def start(self) -> None:
        """Queue the requests; `whole` or `stream` must follow. Raises ApiError (429, 503)."""
        self._loop.submit(self._tickets)

    async def whole(self, http: Request) -> dict[str, Any]:
        """Run to the end. Raises ApiError, and ClientDisconnect when the client goes away before it; nothing is left running then."""
        gone = asyncio.ensure_future(disconnected(http))
        try:
            while not self._done:
                index, event = await self._next(gone)
                if isinstance(event, ApiError):
                    raise event
                self._note(index, event)
        finally:
            gone.cancel()
            self.cancel()
        return self.answer.whole([self._choice(index) for index in range(len(self._tickets))])

    async def stream(self, http: Request) -> StreamingResponse:
        """Run up to the first event, which says whether there is an answer at all: an error before it still has its HTTP status. Raises as `whole`."""
        gone = asyncio.ensure_future(disconnected(http))
        try:
            first = await self._next(gone)
            if isinstance(first[1], ApiError):
                raise first[1]
        except BaseException:
            self.cancel()
            raise
        finally:
            gone.cancel()
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return EventStream(self._pieces(first), media_type="text/event-stream", headers=headers)

    def cancel(self) -> None:
        """End what still runs."""
        for ticket in self._tickets:
            if ticket.state != "done":
                self._loop.cancel(ticket)

    @property
    def _done(self) -> bool:
        return len(self._results) == len(self._tickets)

    def _note(self, index: int, event: StreamEvent) -> None:
        if event.result is not None:
            self._results[index] = event.result

    def _choice(self, index: int) -> Choice:
        result, echoed = self._results[index], self._echoed[index]
        text, calls = (result.text, []) if self.asked.tools is None else self.asked.tools.calls(result.text)
        logprobs = self._logprobs(result.logprobs or (), len(echoed))
        return Choice(result, text if text is None else echoed + text, calls, logprobs)

    async def _pieces(self, first: tuple[int, Event]) -> AsyncIterator[bytes]:
        """Chunks of the answer in SSE's form, those that are there at once together: a write costs more than a chunk.

        Whoever stops asking for them, as Starlette does when the client is gone, ends the requests.
        """
        lengths = [len(text) for text in self._echoed]
        chunks = self._openings()
        try:
            arrived, ended = [first], False
            while not ended:
                while not self._events.empty():
                    arrived.append(self._events.get_nowait())
                for index, event in arrived:
                    if isinstance(event, ApiError):
                        chunks.append(sse(event.body()))
                        ended = True
                        break
                    chunks += self._chunks(index, event, lengths)
                    ended = self._done
                if ended:
                    if self.asked.include_usage and self._done:
                        chunks.append(sse(self.answer.usage_chunk([self._results[i] for i in range(len(self._tickets))])))
                    yield b"".join(chunks) + b"data: [DONE]\n\n"
                else:
                    if chunks:
                        yield b"".join(chunks)
                    chunks, arrived = [], [await self._events.get()]
        finally:
            self.cancel()

    def _openings(self) -> list[bytes]:
        if self.answer.chat:
            return [sse(self.answer.opening(index)) for index in range(len(self._tickets))]
        return [self.answer.piece_event(index, text) for index, text in enumerate(self._echoed) if text]

    def _chunks(self, index: int, event: StreamEvent, lengths: list[int]) -> list[bytes]:
        """Those of one event. lengths: of each choice's text so far, counted up here."""
        buffered = self.asked.tools is not None  # whether it is a call shows at its end
        chunks = []
        if not buffered and (event.text or event.logprobs):
            if event.logprobs:
                chunks.append(sse(self.answer.piece(index, event.text, self._logprobs(event.logprobs, lengths[index]))))
            else:
                chunks.append(self.answer.piece_event(index, event.text))
            lengths[index] += len(event.text)
        self._note(index, event)
        return chunks if event.result is None else [*chunks, *map(sse, self._ending(index, buffered))]

    def _ending(self, index: int, buffered: bool) -> list[dict[str, Any]]:
        """A choice's last chunks; with what was held back."""
        if not buffered:
            return [self.answer.closing(index, finish_reason(self._results[index]))]
        choice = self._choice(index)
        chunks = [self.answer.piece(index, choice.text, choice.logprobs)] if choice.text else []
        chunks += [self.answer.called(index, choice.calls)] if choice.calls else []
        return [*chunks, self.answer.closing(index, choice.reason)]

    async def _next(self, gone: asyncio.Future[None]) -> tuple[int, Event]:
        """The next event; ClientDisconnect when the client is gone before it."""
        if not self._events.empty():
            return self._events.get_nowait()
        event = asyncio.ensure_future(self._events.get())
        try:
            await asyncio.wait((event, gone), return_when=asyncio.FIRST_COMPLETED)
            if event.done():
                return event.result()
            raise ClientDisconnect
        finally:
            event.cancel()


class EventStream(StreamingResponse):
    """A stream whose source is closed with it, also when the client goes away in the middle of a piece."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]  # an async generator


async def disconnected(http: Request) -> None:
    """Returns when the client has closed its connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
