"""Other clients that people point at OpenAI's protocol; skipped where they are not installed (the extra `clients`)."""

from __future__ import annotations

import pytest

from engine.runtime.sampling import SamplingParams

MESSAGES = [{"role": "user", "content": "Tell me of tides."}]


@pytest.fixture(scope="module")
def expected(chat_engine) -> str:
    return chat_engine().generate([MESSAGES], SamplingParams(max_new_tokens=20))[0].text


def test_litellm(running, expected):
    litellm = pytest.importorskip("litellm", reason="the extra clients is not installed")
    options = {
        "model": "openai/tiny",
        "api_base": f"{running.url}/v1",
        "api_key": "none",
        "messages": MESSAGES,
        "temperature": 0,
        "max_tokens": 20,
    }
    assert litellm.completion(**options).choices[0].message.content == expected
    pieces = litellm.completion(**options, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**(options | {"temperature": 5, "top_p": 7}))


def test_langchain(running, expected):
    langchain = pytest.importorskip("langchain_openai", reason="the extra clients is not installed")
    chat = langchain.ChatOpenAI(model="tiny", base_url=f"{running.url}/v1", api_key="none", temperature=0, max_tokens=20)
    made = chat.invoke("Tell me of tides.")
    assert made.content == expected and made.usage_metadata["output_tokens"] > 0
    assert "".join(str(piece.content) for piece in chat.stream("Tell me of tides.")) == expected
    schema = {
        "title": "boat",
        "type": "object",
        "properties": {"sure": {"type": "boolean"}},
        "required": ["sure"],
        "additionalProperties": False,
    }
    longer = langchain.ChatOpenAI(model="tiny", base_url=f"{running.url}/v1", api_key="none", temperature=0, max_tokens=80)
    for method in ("json_schema", "function_calling"):
        assert set(longer.with_structured_output(schema, method=method).invoke("Is it?")) == {"sure"}
