"""OpenAI's requests, read into what the engine takes. Unknown fields are tolerated; a field that asks for what is not there is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import ForetoldError, InvalidOption
from engine.inputs import are_whole, is_finite, is_whole, parse_json, shown
from engine.runtime.sampling import SamplingParams
from engine.runtime.sampling_defaults import NO_DEFAULTS, SamplingDefaults
from engine.server.errors import ApiError, as_api_error
from engine.server.tools import Tools, plain_messages, read_tools
from engine.text.constraint import any_object

MAX_CHOICES = 128
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_PROMPTS = 256
MAX_CALL_CHOICES = 1024  # of all prompts of a call together
MAX_TOP_LOGPROBS = 20
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")


@dataclass(frozen=True)
class CompletionRequest:
    """One call of /v1/chat/completions or /v1/completions.

    prompts: chat messages (one prompt), or texts and lists of token ids. params: without max_new_tokens, which `max_tokens` bounds (None: as many as
    the context holds). n: choices a prompt. stream, include_usage: of SSE. echo: begin the text with the prompt. tools: that may be called.
    """

    prompts: list[Any]
    params: SamplingParams
    max_tokens: int | None
    n: int
    stream: bool
    include_usage: bool
    chat: bool
    echo: bool = False
    tools: Tools | None = None

    def sampling(self, prompt_tokens: int, context: int, choice: int) -> SamplingParams:
        """Parameters of one choice of a prompt of so many tokens; with a seed, each choice has its own."""
        room = max(1, context - prompt_tokens)
        wanted = room if self.max_tokens is None else min(self.max_tokens, room)
        seed = self.params.seed
        return dataclasses.replace(self.params, max_new_tokens=wanted, seed=None if seed is None else (seed + choice) % 2**63)


def read_body(content: bytes) -> dict[str, Any]:
    """A request's JSON object. Raises ApiError(400)."""
    try:
        value = parse_json(content, "the request's body", InvalidOption, "send a JSON object")
    except ForetoldError as error:
        raise ApiError(400, str(error), code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, "the request's body is not a JSON object", code="invalid_json")
    return value


def read_chat(body: Mapping[str, Any], defaults: SamplingDefaults = NO_DEFAULTS) -> CompletionRequest:
    """A call of /v1/chat/completions, over the model's defaults. Raises ApiError(400) naming the field."""
    tools = read_tools(body)
    prompt = read_messages(body, tools)
    _refuse(body, "modalities", lambda value: value in (["text"], []), "only text is made")
    _refuse(body, "audio", lambda value: False, "only text is made")
    schema = _response_schema(body.get("response_format"))
    if tools is not None and tools.forced:
        if schema:
            raise ApiError(400, "response_format does not go with a forced tool call", param="response_format")
        schema = tools.schema()
    wanted = _boolean(body, "logprobs")
    top = _whole(body, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    made = _completion(
        body,
        [prompt],
        chat=True,
        max_name="max_completion_tokens",
        logprobs=(top or 0) if wanted else None,
        schema=schema,
        defaults=defaults,
    )
    return dataclasses.replace(made, tools=tools)


def read_messages(body: Mapping[str, Any], tools: Tools | None) -> list[dict[str, Any]]:
    """A chat's messages as the model gets them, calls of functions as text. Raises ApiError(400)."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ApiError(400, "messages must be a list of at least one message", param="messages")
    return plain_messages(messages) if tools is None else tools.messages(messages)


def read_completion(body: Mapping[str, Any], defaults: SamplingDefaults = NO_DEFAULTS) -> CompletionRequest:
    """A call of /v1/completions, over the model's defaults. Raises ApiError(400) naming the field."""
    given = body.get("prompt")
    if isinstance(given, str) or _are_ids(given):
        prompts = [given]
    elif isinstance(given, list) and given:
        prompts = given
    else:
        raise ApiError(400, "prompt must be a text, a list of texts, or token ids", param="prompt")
    if len(prompts) > MAX_PROMPTS:
        raise ApiError(400, f"prompt holds {len(prompts)} prompts, at most {MAX_PROMPTS} are taken", param="prompt")
    for prompt in prompts if prompts is given else []:
        if not isinstance(prompt, str) and not _are_ids(prompt):
            raise ApiError(400, f"prompt holds {shown(prompt)}: give texts or lists of token ids", param="prompt")
    _refuse(body, "suffix", lambda value: value == "", "text cannot be inserted before a suffix")
    best_of = _whole(body, "best_of", 1, MAX_CHOICES)
    if best_of is not None and best_of != (_whole(body, "n", 1, MAX_CHOICES) or 1):
        raise ApiError(400, "best_of must equal n: choices are not ranked", param="best_of")
    logprobs = _whole(body, "logprobs", 0, MAX_TOP_LOGPROBS)
    if logprobs is not None and _boolean(body, "echo"):
        raise ApiError(400, "echo does not go with logprobs: the prompt's tokens have none here", param="echo")
    made = _completion(body, prompts, chat=False, max_name="max_tokens", logprobs=logprobs, defaults=defaults)
    if len(prompts) * made.n > MAX_CALL_CHOICES:
        raise ApiError(400, f"n asks for {len(prompts) * made.n} choices of all prompts, at most {MAX_CALL_CHOICES} are made", param="n")
    # the completions route's own default, as OpenAI documents it
    return dataclasses.replace(made, echo=bool(_boolean(body, "echo")), max_tokens=16 if made.max_tokens is None else made.max_tokens)


def _are_ids(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and are_whole(given)


def _completion(
    body: Mapping[str, Any],
    prompts: list[Any],
    *,
    chat: bool,
    max_name: str,
    logprobs: int | None,
    defaults: SamplingDefaults,
    schema: str = "",
) -> CompletionRequest:
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise ApiError(400, "stream_options must be an object", param="stream_options")
    limits = [_whole(body, name, 1, 2**31) for name in dict.fromkeys((max_name, "max_tokens"))]
    return CompletionRequest(
        prompts=prompts,
        params=dataclasses.replace(read_params(body, defaults), logprobs=logprobs, response_format=schema),
        max_tokens=next((limit for limit in limits if limit is not None), None),
        n=_whole(body, "n", 1, MAX_CHOICES) or 1,
        stream=bool(_boolean(body, "stream")),
        include_usage=bool(_boolean(options or {}, "include_usage")),
        chat=chat,
    )


def read_params(body: Mapping[str, Any], defaults: SamplingDefaults = NO_DEFAULTS) -> SamplingParams:
    """Sampling parameters of a request; defaults are the model's, else OpenAI's (temperature 1). Raises ApiError(400) naming the field."""
    values: dict[str, Any] = {"temperature": 1.0} | defaults.values(body, sampled=True)
    for name in _NUMBERS:
        value = body.get(name)
        if value is not None:
            if not is_finite(value):
                raise ApiError(400, f"{name} must be a number", param=name)
            values[name] = float(value)
    top_k = body.get("top_k")
    if top_k is not None:
        values["top_k"] = 0 if is_whole(top_k) and top_k == -1 else top_k  # -1 is vLLM's "all"
    seed = body.get("seed")
    if seed is not None:
        if not is_whole(seed) or not -(2**63) <= seed < 2**63:
            raise ApiError(400, "seed must be a whole number of 64 bits", param="seed")
        values["seed"] = seed % 2**63
    values["stop"] = _stops(body.get("stop"))
    for name in ("ignore_eos",):
        values[name] = bool(_boolean(body, name))
    if (ids := body.get("stop_token_ids")) is not None:
        values["stop_token_ids"] = tuple(ids) if isinstance(ids, list) else ids
    if (biases := body.get("logit_bias")) is not None:
        values["logit_bias"] = _biases(biases)
    try:
        return SamplingParams(**values)
    except InvalidOption as error:
        raise as_api_error(error, error.what.split(" ", 1)[0]) from error


def _stops(given: Any) -> tuple[str, ...]:
    found = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(found, list) or not all(isinstance(item, str) and 0 < len(item) <= MAX_STOP_CHARS for item in found):
        raise ApiError(400, f"stop must be a text or a list of texts of 1 to {MAX_STOP_CHARS} characters", param="stop")
    if len(found) > MAX_STOPS:
        raise ApiError(400, f"stop holds {len(found)} texts, at most {MAX_STOPS} are taken", param="stop")
    return tuple(found)


def _biases(given: Any) -> dict[int, float]:
    if not isinstance(given, dict):
        raise ApiError(400, "logit_bias must be an object of token ids and numbers", param="logit_bias")
    found: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12) or not is_finite(value):
            raise ApiError(400, f"logit_bias holds {shown(key)}: {shown(value)}", param="logit_bias")
        found[int(key)] = float(value)
    return found


def _response_schema(given: Any) -> str:
    """JSON text of the schema that `response_format` asks for; "" for plain text. Raises ApiError(400)."""
    if given is None:
        return ""
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return ""
    if kind == "json_object":
        return any_object()
    schema = given["json_schema"].get("schema") if kind == "json_schema" and isinstance(given.get("json_schema"), dict) else None
    if not isinstance(schema, dict):
        raise ApiError(
            400, f"response_format {shown(given)} is none of text, json_object, and json_schema with a schema", param="response_format"
        )
    return json.dumps(schema)


def _refuse(body: Mapping[str, Any], name: str, harmless: Any, why: str) -> None:
    """Refuse a known field that asks for something; one that asks for nothing is tolerated."""
    value = body.get(name)
    if value is not None and not harmless(value):
        raise ApiError(400, f"{name} {shown(value)} is not supported: {why}", param=name)


def _whole(body: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not is_whole(value) or not low <= value <= high:
        raise ApiError(400, f"{name} must be a whole number from {low} to {high}, not {shown(value)}", param=name)
    return int(value)


def _boolean(body: Mapping[str, Any], name: str) -> bool | None:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false, not {shown(value)}", param=name)
    return value


def read_model(body: Mapping[str, Any], served: Sequence[str]) -> str:
    """The model's name in a request; the first served one where the field is absent. Raises ApiError(404) for a model that is not served."""
    name = body.get("model")
    if name is None:
        return served[0]
    if name not in served:
        raise ApiError(404, f"the model {shown(name)} is not served here: it is {served[0]!r}", param="model", code="model_not_found")
    return str(name)
