"""`python -m engine.cli.fit_pack MODELS`: fits the codec pack of a pair into the cache, beside an engine that serves (`engine.sessions.fitting`).

MODELS: a JSON object of `engine.config.LoadedAs`. Gives way to other processes, and ends with the one that started it, whose end closes its
standard input. Standard output says what went wrong; status 0, else 1.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from contextlib import suppress


def _give_way() -> None:
    """Let other processes run ten times as long; threads that are started later do the same."""
    if hasattr(os, "nice"):
        with suppress(OSError):
            os.nice(10)


def _end_with_parent() -> None:
    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(models: str) -> int:
    """Fit; returns the exit status."""
    import torch

    from engine.config import LoadedAs
    from engine.engine import Engine
    from engine.errors import ForetoldError
    from engine.sessions.codec_params import find_pack

    torch.set_num_threads(1)
    try:
        given = LoadedAs(**json.loads(models))
        engine = Engine.from_pretrained(
            given.target, given.draft, device="cpu", dtype=given.dtype, exit_layer=given.exit_layer, weights=given.weights
        )
        find_pack(engine.core, log=lambda _: None)
    except (ForetoldError, MemoryError, OSError) as error:
        print(str(error) or type(error).__name__)
        return 1
    return 0


if __name__ == "__main__":
    _give_way()
    _end_with_parent()
    status = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(status)  # the thread that reads standard input holds its lock
