"""Function calls read from a model's text."""

from __future__ import annotations

import json

import pytest

from engine.server.errors import ApiError
from engine.server.tools import Tools, plain_messages, read_tools

TOOLS = Tools({"wait": {"name": "wait"}, "look": {"name": "look", "parameters": {"type": "object"}}}, "auto")


def call(name: str, arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_calls_are_read_from_text():
    text, calls = TOOLS.calls(f"Let me see. {call('wait', {})} {call('look', {'at': 'é'})}")
    assert text == "Let me see." and [one["function"]["name"] for one in calls] == ["wait", "look"]
    assert json.loads(calls[1]["function"]["arguments"]) == {"at": "é"} and calls[0]["id"] != calls[1]["id"]


@pytest.mark.parametrize(
    "text", ["plain", call("other", {}), call("wait", [1]), "<tool_call>{bad}</tool_call>", f"{call('wait', {})}{call('no', {})}"]
)
def test_what_is_no_call_stays_text(text):
    assert TOOLS.calls(text) == (text, [])


def test_a_forced_call_cut_short_stays_text():
    forced = Tools(TOOLS.functions, "required")
    assert forced.calls('{"name": "wait", "argu') == ('{"name": "wait", "argu', [])
    assert [one["function"]["name"] for one in forced.calls('{"name": "wait", "arguments": {}}')[1]] == ["wait"]


def test_functions_are_told_in_the_system_message():
    told = TOOLS.messages([{"role": "user", "content": "hi"}])
    assert told[0]["role"] == "system" and '"look"' in told[0]["content"] and told[1] == {"role": "user", "content": "hi"}
    joined = TOOLS.messages([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}])
    assert len(joined) == 2 and joined[0]["content"].startswith("Be brief.") and "<tools>" in joined[0]["content"]


def test_earlier_calls_and_results_become_text():
    earlier = {"role": "assistant", "content": "Wait.", "tool_calls": [{"function": {"name": "wait", "arguments": '{"s": 1}'}}]}
    plain = plain_messages([earlier, {"role": "tool", "content": [{"type": "text", "text": "done"}]}])
    assert plain[0] == {"role": "assistant", "content": "Wait.\n" + call("wait", {"s": 1})}
    assert plain[1] == {"role": "user", "content": "<tool_response>\ndone\n</tool_response>"}
    for wrong in ({"role": "assistant", "tool_calls": [3]}, {"role": "tool", "content": None}):
        with pytest.raises(ApiError):
            plain_messages([wrong])


def test_no_tools_are_read_where_none_may_be_called():
    given = [{"type": "function", "function": {"name": "wait"}}]
    assert read_tools({}) is None and read_tools({"tools": given, "tool_choice": "none"}) is None
    assert read_tools({"tools": given}) == Tools({"wait": {"name": "wait"}}, "auto")
