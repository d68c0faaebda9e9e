"""The routes as an OpenAPI 3.1 document (`GET /openapi.json`), for clients and testers that are made from one.

It names the fields that are taken, with the bounds that the readers in `protocol` hold them to; unknown fields are tolerated.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from engine.runtime.sampling import MAX_BIAS, MAX_PENALTY
from engine.server.protocol import MAX_CHOICES, MAX_PROMPTS, MAX_STOP_CHARS, MAX_STOPS, MAX_TOP_LOGPROBS

Schema = dict[str, Any]
_ERRORS = {
    400: "a wrong field, or no JSON object",
    401: "no valid key",
    403: "another site's page",
    404: "another model",
    413: "the body is too large",
    429: "the queue is full",
    500: "the engine failed",
    503: "the server is stopping, or its pool is full",
    504: "the request took longer than it may",
}


def _whole(low: int, high: int) -> Schema:
    return {"type": ["integer", "null"], "minimum": low, "maximum": high}


def _number(low: float, high: float) -> Schema:
    return {"type": ["number", "null"], "minimum": low, "maximum": high}


_FLAG: Schema = {"type": ["boolean", "null"]}
_OBJECT: Schema = {"type": "object"}
_STOP: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_TOKENS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PART: Schema = {
    "anyOf": [
        {"type": "string"},
        {"type": "object", "required": ["text"], "properties": {"type": {"const": "text"}, "text": {"type": "string"}}},
    ]
}
_MESSAGE: Schema = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"type": "string", "minLength": 1},  # the model's template says which it knows
        "content": {"anyOf": [{"type": "null"}, _PART, {"type": "array", "items": _PART}]},
        "tool_calls": {"type": ["array", "null"]},  # read of the assistant alone
    },
}
_SAMPLING: dict[str, Schema] = {
    "max_tokens": _whole(1, 2**31),
    "n": _whole(1, MAX_CHOICES),
    "temperature": _number(0, 1e10),
    "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
    "min_p": _number(0, 1),
    "top_k": _whole(-1, 2**63 - 1),
    "seed": _whole(-(2**63), 2**63 - 1),
    "stop": {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}, {"type": "null"}]},
    "stop_token_ids": {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0}},
    "ignore_eos": _FLAG,
    "frequency_penalty": _number(-MAX_PENALTY, MAX_PENALTY),
    "presence_penalty": _number(-MAX_PENALTY, MAX_PENALTY),
    "repetition_penalty": {"type": ["number", "null"], "exclusiveMinimum": 0},
    "logit_bias": {"type": ["object", "null"], "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS}},
    "stream": _FLAG,
    "stream_options": {"type": ["object", "null"], "properties": {"include_usage": _FLAG}},
}
_CHAT: Schema = {
    "type": "object",
    "required": ["messages"],
    "properties": _SAMPLING
    | {
        "messages": {"type": "array", "items": _MESSAGE, "minItems": 1},
        "max_completion_tokens": _whole(1, 2**31),
        "logprobs": _FLAG,
        "top_logprobs": _whole(0, MAX_TOP_LOGPROBS),
        "response_format": {"type": ["object", "null"], "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}}},
        "tools": {"type": ["array", "null"], "items": _OBJECT},
        "tool_choice": {"anyOf": [{"enum": ["none", "auto", "required"]}, _OBJECT, {"type": "null"}]},
    },
}
_COMPLETION: Schema = {
    "type": "object",
    "required": ["prompt"],
    "properties": _SAMPLING
    | {
        "prompt": {
            "anyOf": [
                {"type": "string"},
                _TOKENS,
                {"type": "array", "items": {"anyOf": [{"type": "string"}, _TOKENS]}, "minItems": 1, "maxItems": MAX_PROMPTS},
            ]
        },
        "best_of": _whole(1, MAX_CHOICES),
        "logprobs": _whole(0, MAX_TOP_LOGPROBS),
        "echo": _FLAG,
        "suffix": {"type": ["string", "null"], "maxLength": 0},
    },
}
_TOKENIZE: Schema = {
    "type": "object",
    "anyOf": [{"required": ["prompt"]}, {"required": ["messages"]}],
    "properties": {"prompt": {"type": "string"}, "messages": {"type": "array", "items": _MESSAGE, "minItems": 1}},
}
_DETOKENIZE: Schema = {
    "type": "object",
    "required": ["tokens"],
    "properties": {"tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}}},
}
_USAGE: Schema = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {name: {"type": "integer", "minimum": 0} for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
}


def _answer_of(kind: str, content: dict[str, Schema]) -> Schema:
    """A whole completion. content: what a choice holds beside its index and its end."""
    choice: Schema = {
        "type": "object",
        "required": ["index", "finish_reason", "logprobs", *content],
        "properties": {"index": {"type": "integer"}, "finish_reason": {"enum": ["stop", "length", "tool_calls"]}, **content},
    }
    return {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": kind},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": {"type": "array", "items": choice, "minItems": 1},
            "usage": _USAGE,
        },
    }


_CHAT_MESSAGE: Schema = {
    "type": "object",
    "required": ["role", "content", "refusal"],
    "properties": {"role": {"const": "assistant"}, "content": {"type": ["string", "null"]}},
}
_MODEL: Schema = {"type": "object", "required": ["id", "object", "created", "owned_by"], "properties": {"object": {"const": "model"}}}


def document(model: str) -> dict[str, Any]:
    """The whole document. model: the name that is served."""
    named = {"model": {"enum": [model, None]}}
    try:
        own = version("foretold")
    except PackageNotFoundError:  # run from its folder, not installed
        own = "unknown"
    return {
        "openapi": "3.1.0",
        "info": {"title": "Foretold", "version": own, "description": "OpenAI's completions over one engine; unknown fields are ignored."},
        "paths": {
            "/v1/chat/completions": {
                "post": _operation(
                    _CHAT | {"properties": _CHAT["properties"] | named},
                    _answer_of("chat.completion", {"message": _CHAT_MESSAGE}),
                    stream=True,
                    failing=tuple(_ERRORS),
                )
            },
            "/v1/completions": {
                "post": _operation(
                    _COMPLETION | {"properties": _COMPLETION["properties"] | named},
                    _answer_of("text_completion", {"text": {"type": "string"}}),
                    stream=True,
                    failing=tuple(_ERRORS),
                )
            },
            "/v1/models": {
                "get": _operation(
                    None, {"type": "object", "required": ["object", "data"], "properties": {"data": {"type": "array", "items": _MODEL}}}
                )
            },
            "/v1/models/{model}": {
                "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"enum": [model]}}],
                "get": _operation(None, _MODEL, failing=(401, 403, 404)),
            },
            "/tokenize": {
                "post": _operation(
                    _TOKENIZE,
                    {"type": "object", "required": ["tokens", "count", "max_model_len"], "properties": {"tokens": {"type": "array"}}},
                    failing=(400, 401, 403, 413),
                )
            },
            "/detokenize": {
                "post": _operation(
                    _DETOKENIZE,
                    {"type": "object", "required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
                    failing=(400, 401, 403, 413),
                )
            },
            "/stats": {"get": _operation(None, _OBJECT)},
            "/metrics": {"get": _operation(None, {"type": "string"}, kind="text/plain")},
            "/health": {
                "get": {"responses": {"200": {"description": "requests are taken"}, "503": {"description": "the server is stopping"}}}
            },
        },
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}, {}],  # keys are asked for where the server was given any
    }


def _operation(
    body: Schema | None,
    answer: Schema,
    *,
    stream: bool = False,
    kind: str = "application/json",
    failing: tuple[int, ...] = (401, 403),
) -> dict[str, Any]:
    """One method of a route. body: of the request. stream: whether the answer may come as server-sent events. failing: statuses of errors."""
    content: dict[str, Any] = {kind: {"schema": answer}}
    if stream:
        content["text/event-stream"] = {}  # chunks as OpenAI documents them, and [DONE]
    made: dict[str, Any] = {"responses": {"200": {"description": "the answer", "content": content}} | {str(n): _error(n) for n in failing}}
    if body is not None:
        made["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return made


def _error(status: int) -> dict[str, Any]:
    fields: Schema = {
        "message": {"type": "string"},
        "type": {"type": "string"},
        "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]},
    }
    error: Schema = {"type": "object", "required": list(fields), "properties": fields}
    schema = {"type": "object", "required": ["error"], "properties": {"error": error}}
    return {"description": _ERRORS[status], "content": {"application/json": {"schema": schema}}}
