"""Compiling Triton kernels before they are launched, several at once.

A kernel is compiled at its first launch, some .65 s each, one after another. Inside `compile_ahead` what launches kernels can be run once without
launching any: each is given to a pool of threads, which all but a fifth of a compilation leaves free to run beside each other.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

_MOST_THREADS = 16
_EMPTY = {torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty, torch.Tensor.new_empty_strided}
_thread = threading.local()
_Built = TypeVar("_Built")


def compiling_ahead() -> bool:
    """Whether this thread is inside `compile_ahead`: its kernels are compiled, not launched."""
    return getattr(_thread, "compiling", False)


@contextmanager
def compile_ahead() -> Iterator[None]:
    """Have this thread's launches of Triton kernels compile and do nothing else; at the end all are compiled.

    What kernels would have written is zero: memory allocated inside is cleared, so that a token id read from it is one. A kernel that does not compile
    raises at its first launch, as it does without. Where Triton cannot compile several kernels at once, launches stay what they are.
    """
    try:
        from triton.runtime._async_compile import AsyncCompileMode
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield
        return
    if compiling_ahead():
        yield
        return
    num_threads = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0))))
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(num_threads, "compile"))
        stack.enter_context(_launches_compile(JITFunction))
        stack.enter_context(AsyncCompileMode(pool, ignore_errors=True))
        stack.enter_context(_ClearedMemory())
        yield


def built(build: Callable[[], _Built], compiled: bool, *, captures: bool) -> _Built:
    """What `build` captures. Unless its kernels are `compiled`, it is built once before without a launch, by which they are, several at once."""
    if captures and not compiled and not compiling_ahead():
        with compile_ahead():
            build()
    return build()


@contextmanager
def _launches_compile(function: Any) -> Iterator[None]:
    """Launches of this thread are calls of Triton's `warmup`; those of other threads run as ever."""
    global _depth, _run
    with _lock:
        if not _depth:
            _run = function.run
            function.run = _run_or_compile
        _depth += 1
    _thread.compiling = True
    try:
        yield
    finally:
        _thread.compiling = False
        with _lock:
            _depth -= 1
            if not _depth:
                function.run = _run


_lock = threading.Lock()
_depth = 0  # threads inside
_run: Callable[..., Any]


def _run_or_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    return _run(self, *args, grid=grid, warmup=warmup or compiling_ahead(), **options)


class _ClearedMemory(TorchFunctionMode):
    """Memory that is allocated without being written is cleared."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        return found.zero_() if function in _EMPTY else found
