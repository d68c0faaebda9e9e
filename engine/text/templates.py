"""Chat templates rendered in bounded time and memory, by a worker process (`engine.text.template_worker`) that is started once and kept."""

from __future__ import annotations

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.errors import InvalidOption
from engine.inputs import named_errors
from engine.text.remembered import RememberedTokenizer

CPU_S = 1  # of the worker, for one rendering
WALL_S = 60.0  # however busy the machine is
SPARE_CHARS, GROWTH = 1 << 20, 4  # a rendering may have so many characters, and so many times those of template and messages
MAX_TEMPLATE_CHARS = 1 << 20
_MARK = "end-of-message-placeholder"
_REMEDY = "use --raw and write the turns out, or use a model with another template"


def has_template(tokenizer: Any | None) -> bool:
    """Whether a tokenizer comes with a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(
    tokenizer: Any, messages: Sequence[dict[str, Any]], *, failing: str = "cannot be used", continue_final_message: bool = False
) -> str:
    """The messages as text, with the assistant's turn opened; or, where the last message is to be continued, up to its end.

    A tokenizer of transformers has its template rendered by the worker; any other object's own `apply_chat_template` is called.

    Args:
        tokenizer: with a chat template: a text, or named texts with a "default".
        messages: checked ones (`engine.text.messages`).
        failing: what the template does when it fails, for the error.

    Raises:
        InvalidOption: no template, or one that refuses these messages, is no valid template, writes too much or takes too long; or a last message
            that the template leaves out or writes other than as it is, and so cannot be continued.
    """
    if continue_final_message:
        return _unclosed(tokenizer, messages, failing)
    return _rendered(tokenizer, messages, failing, opened=True)


def _unclosed(tokenizer: Any, messages: Sequence[dict[str, Any]], failing: str) -> str:
    """The rendering up to the end of the last message, as transformers' `continue_final_message` cuts it: a mark is put behind the message; where the
    template trims messages the mark's own space is gone, and so is what was blank before it."""
    *before, last = messages
    content = last.get("content")
    if not isinstance(content, str):
        raise InvalidOption("the last message has no text to continue", "give it some, or leave the message out")
    text = _rendered(tokenizer, [*before, last | {"content": f"{content}{_MARK} "}], failing, opened=False)
    at = text.rfind(_MARK)
    if at < 0 or content.strip() not in text[:at]:
        raise InvalidOption("the model's chat template leaves out or changes the last message, so it cannot be continued", _REMEDY)
    spaced = text[at + len(_MARK) :].startswith(" ")
    return text[:at] if spaced else text[:at].rstrip()


def _rendered(tokenizer: Any, messages: Sequence[dict[str, Any]], failing: str, *, opened: bool) -> str:
    """opened: with the opening of the assistant's turn at the end."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise InvalidOption("the model's tokenizer has no chat template", "use --raw, or an instruction-tuned model")
    if not _of_transformers(tokenizer):
        with named_errors(InvalidOption, f"the tokenizer's chat template {failing}", _REMEDY):
            return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opened))
    if isinstance(template, dict):
        if "default" not in template:
            names = ", ".join(sorted(str(name) for name in template))
            raise InvalidOption(f"the model has several chat templates and none called default: {names}", _REMEDY)
        template = template["default"]
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE_CHARS:
        raise InvalidOption("the model's chat template is not a text of reasonable length", _REMEDY)
    with named_errors(InvalidOption, "the messages hold values that are no JSON", "give strings, numbers, lists and mappings"):
        special = {str(name): token if isinstance(token, list) else str(token) for name, token in tokenizer.special_tokens_map.items()}
        values = special | {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": opened}
        written = json.dumps(values, ensure_ascii=False)
        limits = {"cpu_s": CPU_S, "max_chars": SPARE_CHARS + GROWTH * (len(template) + len(written))}
        encoded = f'{json.dumps({"template": template, **limits})[:-1]}, "values": {written}}}'.encode()
    answer = _WORKER.ask(encoded)
    if "text" not in answer:
        raise InvalidOption(f"the model's chat template {failing}: {answer['error']}", _REMEDY)
    return answer["text"]


def start_worker() -> None:
    """Start the worker now, to be ready when the first template is rendered: its imports take as long as a small model's loading."""
    with suppress(InvalidOption):  # a template that is rendered later says what is wrong
        _WORKER.start()


def _of_transformers(tokenizer: Any) -> bool:
    """Whether it is one of transformers' tokenizers, or remembered of one. That library is not imported to know: who has one has imported it."""
    library = sys.modules.get("transformers")
    return isinstance(tokenizer, RememberedTokenizer) or (library is not None and isinstance(tokenizer, library.PreTrainedTokenizerBase))


class _Worker:
    """The process, started at the first request and again after one that it did not survive; one request at a time."""

    def __init__(self) -> None:
        self._lock, self._owner = threading.Lock(), 0
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> dict[str, str]:
        """The worker's answer to an encoded request; an answer with "error" when the process was ended by its limits."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            try:
                try:
                    left = memoryview(len(request).to_bytes(8, "little") + request)
                    while left:  # a signal may cut a write short
                        left = left[process.stdin.write(left) :]
                    deadline = time.monotonic() + WALL_S
                    size = int.from_bytes(_read(process, 8, deadline), "little")
                    return dict(json.loads(_read(process, size, deadline)))
                except (OSError, EOFError):
                    return {"error": f"it takes more than {CPU_S} s, or too much memory"}
            except BaseException:
                self.stop()  # an interrupt between question and answer: the next answer would be to this question
                raise
            finally:
                if self._process is not None and self._process.poll() is not None:
                    self.stop()

    def start(self) -> None:
        """Have the process running. Raises InvalidOption where none can be started."""
        with self._lock:
            self._running()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            if self._owner == os.getpid():
                self.stop()
            elif not self._owner:
                atexit.register(self.stop)
            # -P: this folder's own names must not hide the standard library's
            command = [sys.executable or "python", "-P", str(Path(__file__).with_name("template_worker.py"))]
            with named_errors(InvalidOption, "no process for rendering chat templates can be started", "use --raw, or free memory"):
                self._process = subprocess.Popen(
                    command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, close_fds=True
                )
            self._owner = os.getpid()
        return self._process

    def stop(self) -> None:
        """End the process, if this one started it."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        process.kill()
        process.wait()


def _read(process: subprocess.Popen[bytes], count: int, deadline: float) -> bytes:
    """Exactly `count` bytes of the process's output; EOFError when it ends first or the deadline passes."""
    assert process.stdout is not None
    pieces, left = [], count
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while left:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                process.kill()
                process.wait()
                raise EOFError
            piece = os.read(process.stdout.fileno(), min(left, 1 << 20))
            if not piece:
                process.wait()
                raise EOFError
            pieces.append(piece)
            left -= len(piece)
    return b"".join(pieces)


_WORKER = _Worker()
