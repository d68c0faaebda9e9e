"""OpenAI's protocol as its own client and raw HTTP see it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from engine.runtime.sampling import SamplingParams

MESSAGES = [{"role": "user", "content": "Tell me of tides."}]


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def alone(chat_engine):
    """Another engine with the same weights, to say what a text should be."""
    return chat_engine(max_batch=16)


def text_of(engine, prompt, **params) -> str:
    return engine.generate(prompt, SamplingParams(**params))[0].text


def chunks_of(response) -> list[dict[str, Any]]:
    """The JSON of a stream's events; it must end with [DONE]."""
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_a_chat_answer_is_the_librarys(client, alone):
    made = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=30)
    expected = alone.generate([MESSAGES], SamplingParams(max_new_tokens=30))[0]
    assert made.choices[0].message.content == expected.text and expected.text
    assert made.choices[0].finish_reason == ("length" if expected.finish_reason == "length" else "stop")
    assert made.usage.prompt_tokens == expected.prompt_tokens and made.usage.completion_tokens == expected.new_tokens
    assert made.usage.prompt_tokens_details.cached_tokens is not None
    assert made.model_extra["foretold"]["drafter"] == alone.drafter_name


def test_a_stream_gives_the_same_text_piece_by_piece(client, alone):
    stream = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        temperature=0.9,
        seed=4,
        max_completion_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == text_of(alone, [MESSAGES], temperature=0.9, seed=4, max_new_tokens=40)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("length", "stop")
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens > 0
    assert sum(chunk.usage is not None for chunk in chunks) == 1


def test_a_stream_without_usage_has_none(running):
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 4, "stream": True}
    assert not [chunk for chunk in chunks_of(running.post("/v1/chat/completions", body)) if "usage" in chunk]


def test_choices_have_seeds_of_their_own(client, alone):
    made = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=1, seed=7, n=3, max_tokens=20)
    expected = [text_of(alone, [MESSAGES], temperature=1.0, seed=7 + i, max_new_tokens=20) for i in range(3)]
    assert [choice.message.content for choice in made.choices] == expected and len(set(expected)) > 1
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    assert made.usage.prompt_tokens == alone.generate([MESSAGES], SamplingParams(max_new_tokens=1))[0].prompt_tokens


def test_choices_stream_apart(running, alone):
    body = {"messages": MESSAGES, "temperature": 1, "seed": 7, "n": 2, "max_tokens": 20, "stream": True}
    texts = {0: "", 1: ""}
    for chunk in chunks_of(running.post("/v1/chat/completions", body)):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    assert texts == {i: text_of(alone, [MESSAGES], temperature=1.0, seed=7 + i, max_new_tokens=20) for i in range(2)}


def test_a_stop_string_is_cut_out(client, alone):
    whole = text_of(alone, [MESSAGES], max_new_tokens=60)
    stop = whole[10:13]
    made = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=60, stop=[stop, "never there"])
    assert made.choices[0].message.content == whole[: whole.index(stop)] and made.choices[0].finish_reason == "stop"
    same = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=60, stop=stop)
    assert same.choices[0].message.content == made.choices[0].message.content


def test_completions_take_texts_and_ids(client, running, alone):
    ids = running.post("/tokenize", {"prompt": "The sea"}).json()
    assert ids["count"] == len(ids["tokens"]) and ids["max_model_len"] == alone.context
    assert running.post("/detokenize", {"tokens": ids["tokens"]}).json() == {"prompt": "The sea"}
    turns = running.post("/tokenize", {"messages": MESSAGES}).json()["tokens"]
    shown = running.post("/detokenize", {"tokens": turns}).json()["prompt"]
    assert shown.startswith("<|im_start|>") and running.post("/tokenize", {"prompt": shown}).json()["tokens"] == turns
    assert running.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
    assert running.post("/detokenize", {"tokens": [-1]}).json()["error"]["param"] == "tokens"
    expected = text_of(alone, "The sea", max_new_tokens=12)
    for prompt in ("The sea", ids["tokens"], ["The sea"], [ids["tokens"]]):
        made = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=12)
        assert made.choices[0].text == expected
    two = client.completions.create(model="tiny", prompt=["The sea", "A boat"], n=2, temperature=0, max_tokens=12)
    assert [choice.text for choice in two.choices] == [expected] * 2 + [text_of(alone, "A boat", max_new_tokens=12)] * 2
    assert two.usage.prompt_tokens == len("The sea") + len("A boat")


def test_completions_echo_and_have_a_short_default(client, alone):
    made = client.completions.create(model="tiny", prompt="The sea", temperature=0, echo=True, extra_body={"ignore_eos": True})
    assert made.choices[0].text == "The sea" + text_of(alone, "The sea", max_new_tokens=16, ignore_eos=True)
    pieces = client.completions.create(
        model="tiny", prompt="The sea", temperature=0, echo=True, stream=True, extra_body={"ignore_eos": True}
    )
    assert "".join(piece.choices[0].text for piece in pieces) == made.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_ids_are_echoed_as_text(client, running, stream):
    """Special tokens included, as they would be in a text."""
    ids = running.post("/tokenize", {"prompt": "<|im_start|>The sea"}).json()["tokens"]
    made = client.completions.create(model="tiny", prompt=[ids, ids[1:]], temperature=0, echo=True, max_tokens=3, stream=stream)
    texts = {0: "", 1: ""}
    for part in made if stream else [made]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts[0].startswith("<|im_start|>The sea") and texts[1].startswith("The sea")


def test_penalties_and_biases_reach_the_sampler(client, alone):
    made = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=20, frequency_penalty=1.5, presence_penalty=0.5, logit_bias={"65": 100}
    )
    expected = text_of(alone, [MESSAGES], max_new_tokens=20, frequency_penalty=1.5, presence_penalty=0.5, logit_bias={65: 100.0})
    assert made.choices[0].message.content == expected != text_of(alone, [MESSAGES], max_new_tokens=20)


def test_content_may_be_parts_and_roles_may_differ(client, alone):
    parts = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Tell me of tides."}]}]
    made = client.chat.completions.create(model="tiny", messages=parts, temperature=0, max_tokens=10)
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me of tides."}]
    assert made.choices[0].message.content == text_of(alone, [plain], max_new_tokens=10)


def test_the_async_client_runs_many_at_once(running, alone):
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            calls = [
                client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=1, seed=seed, max_tokens=12)
                for seed in range(40)
            ]
            return [made.choices[0].message.content or "" for made in await asyncio.gather(*calls)]

    expected = [
        r.text for r in alone.generate([MESSAGES] * 40, [SamplingParams(temperature=1.0, seed=s, max_new_tokens=12) for s in range(40)])
    ]
    assert asyncio.run(ask()) == expected and len(set(expected)) > 20
    running.wait_idle()


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "messages"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, 400, "messages"),
        ({"messages": MESSAGES, "model": "other"}, 404, "model"),
        ({"messages": MESSAGES, "model": 3}, 404, "model"),
        ({"messages": MESSAGES, "temperature": "hot"}, 400, "temperature"),
        ({"messages": MESSAGES, "temperature": -1}, 400, "temperature"),
        ({"messages": MESSAGES, "temperature": True}, 400, "temperature"),
        ({"messages": MESSAGES, "top_p": 0}, 400, "top_p"),
        ({"messages": MESSAGES, "top_k": 1.5}, 400, "top_k"),
        ({"messages": MESSAGES, "min_p": 2}, 400, "min_p"),
        ({"messages": MESSAGES, "max_tokens": 0}, 400, "max_tokens"),
        ({"messages": MESSAGES, "max_completion_tokens": "9"}, 400, "max_completion_tokens"),
        ({"messages": MESSAGES, "n": 0}, 400, "n"),
        ({"messages": MESSAGES, "n": 1000}, 400, "n"),
        ({"messages": MESSAGES, "stop": ""}, 400, "stop"),
        ({"messages": MESSAGES, "stop": [1]}, 400, "stop"),
        ({"messages": MESSAGES, "stop": ["a"] * 100}, 400, "stop"),
        ({"messages": MESSAGES, "seed": 0.5}, 400, "seed"),
        ({"messages": MESSAGES, "stream": "yes"}, 400, "stream"),
        ({"messages": MESSAGES, "stream_options": 1}, 400, "stream_options"),
        ({"messages": MESSAGES, "frequency_penalty": 3}, 400, "frequency_penalty"),
        ({"messages": MESSAGES, "presence_penalty": -3}, 400, "presence_penalty"),
        ({"messages": MESSAGES, "repetition_penalty": 0}, 400, "repetition_penalty"),
        ({"messages": MESSAGES, "logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"messages": MESSAGES, "logit_bias": {"5": 1000}}, 400, "logit_bias"),
        ({"messages": MESSAGES, "logit_bias": {"99999": 1}}, 400, "logit_bias"),
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, 400, "tools"),
        ({"messages": MESSAGES, "response_format": {"type": "grammar"}}, 400, "response_format"),
        ({"messages": MESSAGES, "modalities": ["audio"]}, 400, "modalities"),
        ({"messages": MESSAGES, "top_logprobs": 3}, 400, "top_logprobs"),
    ],
)
def test_a_wrong_field_is_named(running, body, status, param):
    for stream in (False, True):
        answer = running.post("/v1/chat/completions", body if "stream" in body else body | {"stream": stream})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (status, param), error
        assert error["message"] and error["type"] == "invalid_request_error"
    running.wait_idle()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [999999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": ["a"] * 1000}, "prompt"),
        ({"prompt": ["a"] * 250, "n": 100}, "n"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 10**30}, "max_tokens"),
        ({"prompt": "a", "echo": True, "logprobs": 0}, "echo"),
        ({"prompt": "a", "top_k": 10**30}, "top_k"),
        ({"prompt": "a", "temperature": 1e300}, "temperature"),
    ],
)
def test_a_wrong_completion_names_its_field(running, body, param):
    answer = running.post("/v1/completions", body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_harmless_and_unknown_fields_are_tolerated(running):
    body = {
        "messages": MESSAGES, "max_tokens": 2, "temperature": 0, "user": "me", "metadata": {}, "store": False, "tools": [], "n": None,
        "response_format": {"type": "text"}, "parallel_tool_calls": True, "service_tier": "auto", "nobody": {"knows": "this"}, "top_k": -1,
        "logprobs": False, "top_logprobs": 0,
    }  # fmt: skip
    assert running.post("/v1/chat/completions", body).status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"a":' * 5000, b"null", b'{"messages": NaN}'])
def test_what_is_no_json_object_is_refused(running, content):
    answer = running.client.post("/v1/chat/completions", content=content)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_unknown_routes_and_methods_have_errors_of_the_protocol(running):
    assert running.client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    answer = running.client.get("/v1/chat/completions")
    assert answer.status_code == 405 and answer.json()["error"]["message"]


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["boat", "buoy"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "size"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "look_up", "description": "Looks a boat up.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}},
]


def test_answers_of_a_schema_are_json_of_it(client):
    form = {"type": "json_schema", "json_schema": {"name": "boat", "schema": SCHEMA, "strict": True}}
    for stream in (False, True):
        made = client.chat.completions.create(
            model="tiny", messages=MESSAGES, temperature=1, seed=2, max_tokens=80, response_format=form, stream=stream
        )
        text = "".join(piece.choices[0].delta.content or "" for piece in made) if stream else made.choices[0].message.content
        assert set(json.loads(text)) == {"kind", "size"}
    made = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=60, response_format={"type": "json_object"}
    )
    assert made.choices[0].message.content.startswith("{")


@pytest.mark.parametrize("form", [{"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}, "json", {}])
def test_a_format_that_is_not_understood_names_the_field(running, form):
    answer = running.post("/v1/chat/completions", {"messages": MESSAGES, "response_format": form, "max_tokens": 2})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")


def test_log_probabilities_have_both_forms(client, running):
    made = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=12, logprobs=True, top_logprobs=2)
    content = made.choices[0].logprobs.content
    assert len(content) == made.usage.completion_tokens and all(len(entry.top_logprobs) == 2 for entry in content)
    assert all(entry.logprob == entry.top_logprobs[0].logprob <= 0 for entry in content)
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=12, logprobs=True, stream=True)
    pieces = [entry for chunk in stream if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [piece.token for piece in pieces] == [entry.token for entry in content]
    made = client.completions.create(
        model="tiny", prompt="The sea", temperature=0, max_tokens=12, logprobs=3, extra_body={"ignore_eos": True}
    )
    logprobs = made.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 12
    assert all(len(top) <= 3 for top in logprobs.top_logprobs) and logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]
    assert client.completions.create(model="tiny", prompt="The sea", temperature=0, max_tokens=2).choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_fits_its_function(client, stream):
    for choice in ("required", {"type": "function", "function": {"name": "look_up"}}):
        made = client.chat.completions.create(
            model="tiny", messages=MESSAGES, temperature=1, seed=5, max_tokens=120, tools=TOOLS, tool_choice=choice, stream=stream
        )
        if stream:
            chunks = list(made)
            call = next(chunk.choices[0].delta.tool_calls[0] for chunk in chunks if chunk.choices[0].delta.tool_calls)
            reason = chunks[-1].choices[0].finish_reason
        else:
            assert made.choices[0].message.content is None
            call, reason = made.choices[0].message.tool_calls[0], made.choices[0].finish_reason
        assert reason == "tool_calls" and call.id and call.type == "function"
        arguments = json.loads(call.function.arguments)
        assert call.function.name in ("look_up", "wait")
        assert set(arguments) == ({"kind", "size"} if call.function.name == "look_up" else set())
        assert choice == "required" or call.function.name == "look_up"


def test_a_model_may_answer_in_text_though_it_knows_functions(client):
    made = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=8, tools=TOOLS)
    assert made.choices[0].message.content and not made.choices[0].message.tool_calls
    earlier = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "wait", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "waited"},
    ]
    assert client.chat.completions.create(model="tiny", messages=earlier, temperature=0, max_tokens=8, tools=TOOLS).choices
    assert client.chat.completions.create(model="tiny", messages=earlier, temperature=0, max_tokens=8).choices


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"tools": [{"type": "search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": TOOLS, "tool_choice": "never"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": []}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
        ({"functions": [{"name": "a"}]}, "functions"),
    ],
)
def test_wrong_tools_are_named(running, extra, param):
    answer = running.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, **extra})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_what_openais_other_routes_ask_for_is_not_found(client, running):
    for ask in (
        lambda: client.embeddings.create(model="tiny", input="tide"),
        lambda: client.responses.create(model="tiny", input="tide"),
        lambda: client.images.generate(model="tiny", prompt="tide"),
    ):
        with pytest.raises(openai.NotFoundError, match="no such route"):
            ask()
    assert running.client.head("/health").status_code == 200 and running.client.head("/v1/models").content == b""
    answer = running.client.options("/v1/chat/completions")
    assert answer.status_code == 405 and "POST" in answer.headers["allow"] and answer.json()["error"]["code"] == "not_found"


def test_stops_and_texts_beyond_ascii(client, alone):
    prompt = "Gezeiten \u6f6e\u6c50 \U0001f30a"
    whole = text_of(alone, prompt, max_new_tokens=60, ignore_eos=True)
    stop = next(c for c in whole if ord(c) > 127)
    made = client.completions.create(
        model="tiny", prompt=prompt, temperature=0, max_tokens=60, stop=["\U0001f30a\u6f6e", stop], extra_body={"ignore_eos": True}
    )
    assert made.choices[0].text == whole[: whole.index(stop)] and made.choices[0].finish_reason == "stop"
    assert (
        not client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=3, logprobs=0)
        .choices[0]
        .logprobs.top_logprobs[0]
    )
