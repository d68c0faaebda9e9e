"""Function calls: told to the model in a system message, and read from its text."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidOption
from engine.inputs import shown
from engine.server.errors import ApiError, as_api_error
from engine.text.messages import joined_parts

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class Tools:
    """Functions that a model may call.

    functions: name -> its definition (name, description, parameters). choice: "auto", "required", or the one function that must be called.
    """

    functions: dict[str, dict[str, Any]]
    choice: str

    @property
    def forced(self) -> bool:
        """Whether the answer must be a call; its text is then held to `schema`."""
        return self.choice != "auto"

    def schema(self) -> str:
        """JSON schema of a call that is allowed, as JSON text."""
        names = self.functions if self.choice == "required" else [self.choice]
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": self.functions[name].get("parameters") or {"type": "object"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for name in names
        ]
        return json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls})

    def messages(self, given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages with the functions described in the system message, and earlier calls and their results as text, in the form that models
        trained on function calls know (Hermes: tool_call and tool_response tags)."""
        lines = "\n".join(json.dumps({"type": "function", "function": one}, ensure_ascii=False) for one in self.functions.values())
        form = '{"name": <function>, "arguments": <object>}'
        told = f"You can call these functions:\n<tools>\n{lines}\n</tools>\n"
        if self.forced:
            told += f"Answer with one call and nothing else: {form}"
        else:
            told += f"To call one, answer with {form} inside <tool_call></tool_call>. Otherwise answer in plain text."
        messages = plain_messages(given)
        if messages and messages[0].get("role") in ("system", "developer") and isinstance(messages[0].get("content"), str):
            return [{**messages[0], "content": f"{messages[0]['content']}\n\n{told}"}, *messages[1:]]
        return [{"role": "system", "content": told}, *messages]

    def calls(self, text: str) -> tuple[str | None, list[dict[str, Any]]]:
        """(what is text, the calls in OpenAI's form) of an answer; what is no well-formed call of a known function stays text."""
        found = [text] if self.forced else _CALL.findall(text)
        calls = [call for piece in found if (call := self._call(piece)) is not None]
        if not calls or len(calls) < len(found):
            return text, []
        return (None if self.forced else _CALL.sub("", text).strip() or None), calls

    def _call(self, piece: str) -> dict[str, Any] | None:
        try:
            value = json.loads(piece)
        except ValueError:
            return None
        if not isinstance(value, dict) or value.get("name") not in self.functions or not isinstance(value.get("arguments"), dict):
            return None
        function = {"name": value["name"], "arguments": json.dumps(value["arguments"], ensure_ascii=False)}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def plain_messages(given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose calls and results of functions are text, as templates that know neither take them."""
    messages: list[dict[str, Any]] = []
    for number, message in enumerate(given, 1):
        calls = message.get("tool_calls")
        if calls is not None and not isinstance(calls, list):
            raise ApiError(400, f"message {number} has tool_calls {shown(calls)}, which is no list", param="messages")
        if message.get("role") == "assistant" and calls:
            texts = [message["content"]] if isinstance(message.get("content"), str) and message["content"] else []
            texts += [f"<tool_call>\n{_earlier(call)}\n</tool_call>" for call in calls]
            messages.append({"role": "assistant", "content": "\n".join(texts)})
        elif message.get("role") == "tool":
            try:
                text = joined_parts(message.get("content"), f"message {number}")
            except InvalidOption as error:
                raise as_api_error(error, "messages") from error
            messages.append({"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"})
        else:
            messages.append(dict(message))
    return messages


def _earlier(call: Any) -> str:
    """An earlier call as the model would have written it. Raises ApiError(400)."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not isinstance(function.get("arguments"), str):
        raise ApiError(400, f"messages hold a tool call {shown(call)}", param="messages")
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        arguments = function["arguments"]  # whatever the model wrote then
    return json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)


def read_tools(body: Mapping[str, Any]) -> Tools | None:
    """The functions of a chat request; None where none may be called. Raises ApiError(400) naming the field."""
    if body.get("functions") and body.get("function_call") != "none":
        raise ApiError(400, 'functions are not supported: send tools, or function_call: "none"', param="functions")
    given, choice = body.get("tools"), body.get("tool_choice")
    if not given or choice == "none":
        return None
    if not isinstance(given, list) or len(given) > MAX_TOOLS:
        raise ApiError(400, f"tools must be a list of at most {MAX_TOOLS}", param="tools")
    functions: dict[str, dict[str, Any]] = {}
    for tool in given:
        function: Any = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        name = function.get("name") if isinstance(function, dict) else None
        known = isinstance(function, dict) and isinstance(name, str) and _NAME.fullmatch(name)
        if not known or not isinstance(function.get("parameters") or {}, dict):
            raise ApiError(400, f"tools hold {shown(tool)}: only functions with a name and parameters can be called", param="tools")
        functions[str(name)] = {key: function[key] for key in ("name", "description", "parameters") if function.get(key) is not None}
    if choice is None or choice == "auto":
        return Tools(functions, "auto")
    if choice == "required":
        return Tools(functions, "required")
    named = choice.get("function", {}).get("name") if isinstance(choice, dict) and isinstance(choice.get("function"), dict) else None
    if not isinstance(named, str) or named not in functions:
        raise ApiError(400, f"tool_choice {shown(choice)} names none of the tools", param="tool_choice")
    return Tools(functions, named)
