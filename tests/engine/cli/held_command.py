"""The command's answers, held before their end until something breaks them off: however long a test is kept from running, it is not too late."""

from __future__ import annotations

import os
import select
import sys
import time
from typing import Any


def hold_answers(tokens: int, answers: int, go_on: str = "") -> None:
    """None of this process's first so many answers gets more tokens than that, until a signal's exception or a reader who leaves ends it, or a file is
    there."""
    from engine.runtime.scheduler import Scheduler

    step, seen = Scheduler.step, list[Any]()

    def held(scheduler: Scheduler) -> None:
        for request in scheduler.running:
            if request not in seen:
                seen.append(request)
            if request in seen[:answers]:
                while request.num_new >= tokens and not _reader_is_gone() and not os.path.exists(go_on):
                    time.sleep(0.01)
        step(scheduler)

    Scheduler.step = held  # type: ignore[method-assign]


def _reader_is_gone() -> bool:
    poll = select.poll()
    poll.register(1, 0)  # errors alone
    return bool(poll.poll(0))


if __name__ == "__main__":
    from engine.generate import main

    hold_answers(int(os.environ["HELD_TOKENS"]), int(os.environ["HELD_ANSWERS"]))
    sys.exit(main())
