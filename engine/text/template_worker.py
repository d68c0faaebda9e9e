"""A process of its own that renders chat templates: templates are programs of strangers, and only a process can be bounded in time and memory.

Run as a script by `engine.text.templates`; it imports nothing of ours and reads requests from standard input until that ends. Messages both
ways are an 8-byte little-endian length and JSON.

Request: {"template": str, "values": {name: value}, "cpu_s": int, "max_chars": int}. Answer: {"text": str} or {"error": str}.
The environment is the one chat templates are written for (Hugging Face's documentation of them): sandboxed, immutable, blocks trimmed, loop
controls, `tojson` without HTML escapes, `raise_exception`, `strftime_now`, and `generation` blocks, which only mark their content.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 1 << 29
KEPT_TEMPLATES = 4
"""Compiled templates that are kept, the last used: to compile one takes longer than to render it."""


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: marks what the model writes, for training; here its content alone."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """The sandbox that templates run in."""

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:  # the signature that templates use
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: object) -> NoReturn:
        raise TemplateError(str(message))

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def render(compiled: Callable[[str], Template], request: dict[str, Any]) -> dict[str, str]:
    """The answer to a request; every failure of the template is an answer too."""
    try:
        pieces, length = [], 0
        for piece in compiled(request["template"]).generate(**request["values"]):
            pieces.append(piece)
            length += len(piece)
            if length > request["max_chars"]:
                return {"error": f"it writes more than {request['max_chars']:,} characters"}
        return {"text": "".join(pieces)}
    except RecursionError:
        return {"error": "it recurses too deep"}
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:
        return {"error": (str(error) or type(error).__name__)[:300]}


def limit_time(seconds: int) -> None:
    """Let the system end this process when it has used so many more seconds of CPU, even within one operation."""
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + seconds, hard))
    except (ImportError, OSError, ValueError):
        pass  # no such limits here: the caller's own clock remains


def limit_memory() -> None:
    """Refuse this process more than MEMORY_BYTES."""
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, hard))
    except (ImportError, OSError, ValueError):
        pass


def main() -> None:
    """Answer requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asked
    limit_memory()
    compiled = lru_cache(KEPT_TEMPLATES)(environment().from_string)  # what fails to compile is not kept
    inputs, outputs = sys.stdin.buffer, sys.stdout.buffer
    while header := inputs.read(8):
        content = inputs.read(int.from_bytes(header, "little"))
        try:
            request = json.loads(content)
            limit_time(request["cpu_s"])
            answer = json.dumps(render(compiled, request)).encode()
        except MemoryError:
            answer = b'{"error": "it takes too much memory"}'
        outputs.write(len(answer).to_bytes(8, "little") + answer)
        outputs.flush()


if __name__ == "__main__":
    main()
