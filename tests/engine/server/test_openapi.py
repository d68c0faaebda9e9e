"""The OpenAPI document against what the server does; `schemathesis run URL/openapi.json` does so with generated requests (docs/server.md)."""

from __future__ import annotations

import jsonschema
import pytest

from engine.server.openapi import document

MESSAGES = [{"role": "user", "content": "Tell me of tides."}]


def body_schema(path: str) -> dict:
    return document("tiny")["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def test_every_route_is_described(running):
    told = running.client.get("/openapi.json").json()
    assert told == document("tiny") and told["openapi"].startswith("3.1")
    served = {(route.path, method) for route in running.server.app.routes for method in route.methods - {"HEAD"}}
    described = {(path, method.upper()) for path, methods in told["paths"].items() for method in methods.keys() - {"parameters"}}
    assert served - {("/", "GET"), ("/openapi.json", "GET")} == {
        (path.replace("{model}", "{name:path}"), method) for path, method in described
    }


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "model": None}),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "max_tokens": 2, "top_k": -1, "stop": ["a"], "seed": -5, "logit_bias": {"3": -100}},
        ),
        ("/v1/completions", {"prompt": [1, 2], "max_tokens": 1, "temperature": 0, "logprobs": 1}),
        ("/v1/completions", {"prompt": ["a", [3]], "max_tokens": 1, "n": 2}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1, 2]}),
    ],
)
def test_what_the_document_allows_is_answered_in_its_form(running, path, body):
    jsonschema.validate(body, body_schema(path))
    answer = running.post(path, body)
    assert answer.status_code == 200, answer.text
    content = document("tiny")["paths"][path]["post"]["responses"]["200"]["content"]
    jsonschema.validate(answer.json(), content["application/json"]["schema"])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": []}),
        ("/v1/chat/completions", {"messages": MESSAGES, "temperature": -1}),
        ("/v1/chat/completions", {"messages": MESSAGES, "top_k": -2}),
        ("/v1/chat/completions", {"messages": MESSAGES, "stop": [""]}),
        ("/v1/chat/completions", {"messages": MESSAGES, "model": "other"}),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}),
        ("/tokenize", {}),
        ("/tokenize", {"messages": [{"role": "assistant", "tool_calls": 1}]}),
        ("/tokenize", {"messages": [{"role": "user", "content": "a", "tool_calls": "b"}]}),
        ("/detokenize", {"tokens": ["a"]}),
    ],
)
def test_what_it_forbids_is_refused_in_its_form(running, path, body):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(body, body_schema(path))
    answer = running.post(path, body)
    failing = document("tiny")["paths"][path]["post"]["responses"][str(answer.status_code)]
    jsonschema.validate(answer.json(), failing["content"]["application/json"]["schema"])


def test_messages_with_calls_have_the_tokens_that_a_chat_has(running):
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "calm"}]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    for extra in ({}, {"tools": tools}):
        count = running.post("/tokenize", {"messages": messages} | extra).json()["count"]
        made = running.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1} | extra).json()
        assert made["usage"]["prompt_tokens"] == count
