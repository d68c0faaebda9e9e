"""When coding may use the processor and the device: behind an engine's steps, and beside them for a small share of the time.

Coding runs in a thread of the engine's process. It takes the interpreter's lock and, on a GPU, the device from the step that runs, so every call of a
torch function in it is a place where it can wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode

QUIET_S = 0.05
"""Without a step for so long, an engine counts as idle."""
_PATIENCE_S = 2.0  # the longest that prompts in a row keep coding from its share
_SLICE_S = 0.005  # what coding runs for beside steps, before it waits
_POLL_S = 0.01


class Pace:
    """Steps of an engine as the thread that codes sees them. `began` and `ended` are for the engine's thread, `wait` for the other one.

    Args:
        share: of the time that coding may run for while steps run.
        clock, sleep: of seconds; tests pass their own.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep) -> None:
        self.share, self._clock, self._sleep = share, clock, sleep
        self._ended_at, self._in_step, self._prompt, self._rushed = float("-inf"), False, False, False
        self._resumed = clock()

    def began(self, *, prompt: bool) -> None:
        """A step begins. prompt: it computes a prompt, whose first token somebody waits for."""
        self._in_step, self._prompt = True, prompt

    def ended(self) -> None:
        """The step's work has been handed to the device, which may not have done it yet: a prompt counts until the next step, or until all is quiet."""
        self._in_step, self._ended_at = False, self._clock()

    def rush(self, on: bool = True) -> None:
        """Somebody waits for what is coded: no step is waited for."""
        self._rushed = on

    @property
    def is_rushed(self) -> bool:
        """Whether `rush` was called last."""
        return self._rushed

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs that coding would slow."""
        return self._rushed or not (self._in_step or self._clock() - self._ended_at < QUIET_S)

    def wait(self) -> None:
        """Return at once while the engine is idle; beside steps, after each slice, when the share allows for the next one."""
        if self.is_idle:
            self._resumed = self._clock()
            return
        now = self._clock()
        used = now - self._resumed
        if used < _SLICE_S and not self._prompt:
            return
        until = now + max(used, _SLICE_S) * (1 / self.share - 1) if self.share else float("inf")
        while not self.is_idle:
            now = self._clock()
            if now >= until and (not self._prompt or now >= until + _PATIENCE_S):
                break
            self._sleep(_POLL_S)
        self._resumed = self._clock()


class Yielding(TorchFunctionMode):
    """Within it, every call of a torch function in this thread waits for `Pace.wait` first. The thread must hold no lock that a step takes."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._pace.wait()
        return func(*args, **(kwargs or {}))


__all__ = ["QUIET_S", "Pace", "Yielding"]
