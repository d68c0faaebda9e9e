"""The HTTP side: routes of OpenAI's protocol over an `EngineLoop`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from engine.engine import Engine
from engine.errors import ForetoldError, InvalidOption
from engine.inputs import are_whole
from engine.server.completion import Call
from engine.server.errors import ApiError, as_api_error
from engine.server.keys import Keys
from engine.server.kv_events import KvEvents
from engine.server.loop import EngineLoop, EngineThread, Event, Ticket
from engine.server.metrics import ServerMetrics
from engine.server.openapi import document
from engine.server.page import PAGE
from engine.server.protocol import CompletionRequest, read_body, read_chat, read_completion, read_messages, read_model
from engine.server.responses import Answer, LogprobsForm
from engine.server.tools import read_tools

log = logging.getLogger("foretold.server")
Handler = Callable[[Request, str], Awaitable[Response]]


@dataclass(frozen=True)
class ServerConfig:
    """What a server is told beside its engine.

    model: the name it serves. keys: of callers. max_queue: waiting requests. max_body_bytes: of a request. timeout_s: longest life of a
    request. grace_s: how long running requests may go on when the server stops. local_only: answer only to names of this machine, which keeps a
    web page from asking through a browser. kv_events: endpoint to publish them at (`engine.server.kv_events`); None: nowhere.
    """

    model: str
    keys: Keys
    max_queue: int = 256
    max_body_bytes: int = 32 << 20
    timeout_s: float = 3600.0
    grace_s: float = 30.0
    local_only: bool = False
    kv_events: str | None = None


class Server:
    """One engine behind HTTP. `app` is the ASGI application; its lifespan starts and stops the engine's thread.

    Args:
        engine: with a tokenizer; the server alone uses it.
        config: see `ServerConfig`.
        thread: see `EngineLoop`.

    Raises:
        InvalidOption: KV events of an engine without prefix sharing, or that cannot be published.
    """

    def __init__(self, engine: Engine, config: ServerConfig, thread: EngineThread | None = None) -> None:
        self.engine, self.config = engine, config
        pool = engine.core.pool
        self.metrics = ServerMetrics(
            config.model,
            {
                "vllm:num_requests_running": lambda: self.loop.num_running,
                "vllm:num_requests_waiting": lambda: self.loop.num_waiting,
                "vllm:kv_cache_usage_perc": lambda: engine.core.held_share,
            },
            lambda: engine.core.scheduler.preemptions,
            None if engine.prefix_cache is None else engine.prefix_cache.report,
        )
        self.kv_events: KvEvents | None = None
        if config.kv_events is not None:
            shared = engine.core.shared_prefixes
            if shared is None:
                raise InvalidOption("KV events tell of shared prefixes, and this engine shares none", "make it with prefix_sharing=True")
            self.kv_events = KvEvents(config.kv_events, pool.page_size, "CPU" if engine.device.type == "cpu" else "GPU")
            shared.listener = self.kv_events
        self.loop = EngineLoop(
            engine,
            self.metrics,
            self._deliver,
            max_queue=config.max_queue,
            thread=thread,
            after_step=(lambda: None) if self.kv_events is None else self.kv_events.flush,
        )
        self._stored_tokens, self._stored_until = 0, 0.0
        self._asyncio: asyncio.AbstractEventLoop | None = None
        # a thread of its own: a long prompt must not hold up the answers of others; one, as texts are encoded one at a time
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="foretold-encode")
        routes = [
            ("/v1/chat/completions", "POST", self._keyed(self._chat)),
            ("/v1/completions", "POST", self._keyed(self._complete)),
            ("/v1/models", "GET", self._keyed(self._models)),
            ("/v1/models/{name:path}", "GET", self._keyed(self._model)),
            ("/tokenize", "POST", self._keyed(self._tokenize)),
            ("/detokenize", "POST", self._keyed(self._detokenize)),
            ("/metrics", "GET", self._keyed(self._metrics)),
            ("/stats", "GET", self._keyed(self._stats)),
            ("/openapi.json", "GET", self._openapi),
            ("/health", "GET", self._health),
            ("/", "GET", self._page),
        ]
        self.app = Starlette(
            routes=[Route(path, handler, methods=[method]) for path, method, handler in routes],
            lifespan=self._lifespan,
            exception_handlers={404: _not_found, 405: _not_found, Exception: _failed},
        )

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        self._asyncio = asyncio.get_running_loop()
        self.loop.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.loop.stop, self.config.grace_s)
            await asyncio.to_thread(self.engine.close)  # what was answered last is stored before the process ends
            if self.kv_events is not None:
                self.kv_events.close()
            self._encoder.shutdown(wait=False)

    def _deliver(self, events: list[tuple[Ticket, Event]]) -> None:
        """Hand a step's events to the server's thread, in one call."""

        def dispatch() -> None:
            for ticket, event in events:
                ticket.sink(event)

        assert self._asyncio is not None
        try:
            self._asyncio.call_soon_threadsafe(dispatch)
        except RuntimeError:  # the server's thread is gone, and its clients with it
            log.debug("events of %d requests after the server's end", len(events))

    # --- doors ----------------------------------------------------------------------------------------------------------

    def _keyed(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """A route that asks for a key where there are keys, and answers errors in the protocol's form."""

        async def route(request: Request) -> Response:
            try:
                self._check_origin(request)
                return await handler(request, self.config.keys.namespace(request.headers.get("authorization")))
            except ApiError as error:
                return JSONResponse(error.body(), error.status, error.headers())
            except ForetoldError as error:
                own = as_api_error(error)
                return JSONResponse(own.body(), own.status, own.headers())
            except ClientDisconnect:
                return Response(status_code=499)

        return route

    def _check_origin(self, request: Request) -> None:
        """Without keys, a page of another site must not be able to ask through somebody's browser. Raises ApiError(403)."""
        if not self.config.local_only:
            return
        host = request.headers.get("host", "")
        if _host_name(f"//{host}") not in ("localhost", "127.0.0.1", "::1"):
            raise ApiError(403, "without API keys only requests to localhost are answered", code="foreign_host")
        origin = request.headers.get("origin")
        if origin is not None and _place(origin) != host:
            raise ApiError(403, "without API keys no other site's pages are answered", code="foreign_origin")

    async def _body(self, request: Request) -> dict[str, Any]:
        """The request's JSON object, read up to the limit. Raises ApiError."""
        limit = self.config.max_body_bytes
        too_large = ApiError(413, f"the request's body has more than {limit:,} bytes", code="body_too_large")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length[:19]) > limit:
            raise too_large
        content = bytearray()
        async for piece in request.stream():
            content += piece
            if len(content) > limit:
                raise too_large
        return read_body(bytes(content))

    # --- completions ----------------------------------------------------------------------------------------------------

    async def _chat(self, request: Request, namespace: str) -> Response:
        body = await self._body(request)
        model = read_model(body, [self.config.model])
        return await self._answer(request, read_chat(body, self.engine.core.sampling_defaults), model, namespace)

    async def _complete(self, request: Request, namespace: str) -> Response:
        body = await self._body(request)
        model = read_model(body, [self.config.model])
        return await self._answer(request, read_completion(body, self.engine.core.sampling_defaults), model, namespace)

    async def _answer(self, http: Request, asked: CompletionRequest, model: str, namespace: str) -> Response:
        with self.loop.arrival():
            prompts = [await self._encode(prompt, "messages" if asked.chat else "prompt") for prompt in asked.prompts]
            call = Call(
                asked,
                prompts,
                [await self._echoed(prompt) for prompt in asked.prompts] if asked.echo else [""] * len(prompts),
                answer=Answer(model, asked.chat, asked.n),
                loop=self.loop,
                logprobs=LogprobsForm(self._token_text, asked.chat),
                namespace=namespace,
                deadline=time.monotonic() + self.config.timeout_s,
            )
        call.start()  # nothing more to gather with it by then: an idle engine begins at once
        return await call.stream(http) if asked.stream else JSONResponse(await call.whole(http))

    async def _echoed(self, prompt: str | list[int]) -> str:
        """What an answer to a prompt begins with where its caller wants the prompt back."""
        return prompt if isinstance(prompt, str) else await self._decoded(prompt)

    async def _decoded(self, token_ids: list[int]) -> str:
        """Text of token ids, special ones included."""
        return await asyncio.get_running_loop().run_in_executor(self._encoder, self._token_text, token_ids)

    def _token_text(self, token_ids: list[int]) -> str:
        """Text of tokens by themselves, special ones included."""
        tokenizer = self.engine.tokenizer
        assert tokenizer is not None
        return str(tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    async def _encode(self, prompt: Any, param: str) -> tuple[list[int], np.ndarray]:
        """Token ids of a prompt, checked, as a list and as int32 [T]. Raises ApiError."""

        def encode() -> tuple[list[int], np.ndarray]:
            tokens = self.engine.encode(prompt)
            return tokens, self.engine.core.check_tokens(tokens)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoder, encode)
        except ForetoldError as error:
            raise as_api_error(error, param) from error

    # --- the rest -------------------------------------------------------------------------------------------------------

    async def _models(self, _request: Request, _namespace: str) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def _model(self, request: Request, _namespace: str) -> Response:
        read_model({"model": request.path_params["name"]}, [self.config.model])
        return JSONResponse(self._model_card())

    def _model_card(self) -> dict[str, Any]:
        return {"id": self.config.model, "object": "model", "created": 0, "owned_by": "foretold", "max_model_len": self.engine.context}

    async def _tokenize(self, request: Request, _namespace: str) -> Response:
        body = await self._body(request)
        chat = "messages" in body
        prompt = read_messages(body, read_tools(body)) if chat else body.get("prompt")
        if not chat and not isinstance(prompt, str):
            raise ApiError(400, "give a prompt (a text) or messages (a list)", param="prompt")
        tokens, _ = await self._encode(prompt, "messages" if chat else "prompt")
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": self.engine.context})

    async def _detokenize(self, request: Request, _namespace: str) -> Response:
        tokens = (await self._body(request)).get("tokens")
        if not isinstance(tokens, list) or not are_whole(tokens):
            raise ApiError(400, "tokens must be a list of token ids", param="tokens")
        if not tokens:
            return JSONResponse({"prompt": ""})
        try:
            self.engine.core.check_tokens(tokens)
        except ForetoldError as error:
            raise as_api_error(error, "tokens") from error
        return JSONResponse({"prompt": await self._decoded(tokens)})

    async def _metrics(self, _request: Request, _namespace: str) -> Response:
        return Response(self.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _stats(self, _request: Request, _namespace: str) -> Response:
        core = self.engine.core
        models = {"target_layers": core.target.config.num_layers, "drafter": core.drafter_name, "device": str(core.device)}
        memory = {name: int(count) for name, count in core.memory().items()}
        tiers = self._tiers()
        return JSONResponse(self.metrics.summary() | {"model": self.config.model, "memory": memory, "models": models, "tiers": tiers})

    def _tiers(self) -> list[dict[str, Any]]:
        """Where KV lies: name, bytes, tokens held, bytes the same tokens take in the model's own format, hits (None: not counted apart)."""
        core = self.engine.core
        pages = core.pool.max_pages - core.pool.num_free_pages
        tokens = pages * core.pool.page_size
        config = core.target.config
        raw = 2 * config.num_layers * config.num_kv_heads * config.head_dim * core.dtype.itemsize
        held = round(core.pool.bytes * tokens / max(1, core.pool.num_pages * core.pool.page_size))
        tiers = [{"name": "pool", "bytes": held, "tokens": tokens, "raw_bytes": tokens * raw, "hits": None}]
        cache = self.engine.prefix_cache
        if cache is not None:
            if time.monotonic() > self._stored_until:  # counting reads the whole index
                self._stored_until, self._stored_tokens = (
                    time.monotonic() + 10,
                    sum(root["tokens"] for root in cache.store.describe()["roots"]),
                )
            report = cache.report()
            tokens, hits = self._stored_tokens, report["hits"]
            tiers.append({"name": "store", "bytes": report["bytes"], "tokens": tokens, "raw_bytes": tokens * raw, "hits": hits})
        return tiers

    async def _health(self, _request: Request) -> Response:
        return Response(status_code=200 if self.loop.accepting else 503)

    async def _openapi(self, _request: Request) -> Response:
        return JSONResponse(document(self.config.model))

    async def _page(self, _request: Request) -> Response:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": policy, "X-Frame-Options": "DENY"})


def _place(url: str) -> str | None:
    try:
        return urlsplit(url).netloc
    except ValueError:
        return None


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


async def _not_found(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    what = "no such route" if status == 404 else f"{request.method} is not allowed here"
    headers = getattr(error, "headers", None)  # of 405: what is allowed
    return JSONResponse(ApiError(status, f"{request.url.path}: {what}", code="not_found").body(), status, headers)


async def _failed(_request: Request, _error: Exception) -> Response:
    return JSONResponse(ApiError(500, "the server failed on this request", code="internal_error").body(), 500)
