"""Threads that run a compiled step together: every part once, the same bits as alone, used while they pay; interrupts and copies of a process."""

from __future__ import annotations

import os
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("llvmlite")

from kernels.cpu_decode import crew
from kernels.cpu_decode.crew import Crew, Judge, num_threads
from kernels.cpu_decode.step import CompiledLayers, StepShape, head
from kernels.cpu_decode.tiles import TILES_4, TILES_8, TileWeight

HEADS, KV_HEADS, D, WIDTH, INNER = 6, 3, 32, 224, 352  # not whole sixteens for every part, and heads that no two threads share equally


class Always(Judge):
    def together(self, key):
        return True

    def observe(self, key, together, seconds):
        assert together and seconds > 0


@pytest.fixture
def all_threads(monkeypatch):
    """A crew that always works together, whatever it takes."""
    if not crew.keeps_code():
        pytest.skip("several threads on Linux and x86-64 alone")
    own = Crew()
    own.judge = Always()
    monkeypatch.setattr("kernels.cpu_decode.step.CREW", own)
    return own


def layers_of(kind, biased, generator):
    def matrix(outputs, inputs):
        weight = (torch.randn(outputs, inputs, generator=generator) * inputs**-0.5).bfloat16()
        return weight if kind is None else TileWeight.of(weight, kind)

    def vector(count):
        return torch.rand(count, generator=generator).bfloat16() + 0.5

    found = []
    for _ in range(2):
        qkv = (HEADS + 2 * KV_HEADS) * D
        found.append(
            SimpleNamespace(
                input_norm=vector(WIDTH),
                qkv=matrix(qkv, WIDTH),
                qkv_bias=vector(qkv) if biased else None,
                qk_norm=torch.stack((vector(D), vector(D))) if biased else None,
                o=matrix(WIDTH, HEADS * D),
                o_bias=vector(WIDTH) if biased else None,
                post_norm=vector(WIDTH),
                gate_up=matrix(2 * INNER, WIDTH),
                down=matrix(WIDTH, INNER),
            )
        )
    return found


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", [None, TILES_8])
def test_layers_are_the_same_bits_for_any_number_of_threads(kind, biased, all_threads, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    layers = layers_of(kind, biased, generator)
    for rows in (1, 2, 7, 20):
        stream = torch.randn(rows, WIDTH, generator=generator).bfloat16().float()
        positions = np.arange(rows, dtype=np.int64) + 5
        angles = torch.rand(rows, D // 2, generator=generator), torch.rand(rows, D // 2, generator=generator)
        pages = [[torch.randn(3, 16, KV_HEADS, D, generator=generator).bfloat16() for _ in range(2)] for _ in layers]
        found = []
        for threads in (1, 2, 3, 4):
            monkeypatch.setattr("kernels.cpu_decode.step.num_threads", lambda _, threads=threads: threads)
            own = [(keys.clone(), values.clone()) for keys, values in pages]
            compiled = CompiledLayers(layers, own, StepShape(HEADS, KV_HEADS, D, INNER, 1e-5, D**-0.5))
            out = stream.clone()
            compiled.run(range(2), out, angles, positions, positions, np.zeros(rows, np.int64), np.array([[2, 0]], np.int64))
            found.append((out, own))
        for out, own in found[1:]:
            assert torch.equal(out, found[0][0]) and not torch.equal(out, stream)
            assert all(torch.equal(a, b) for pair, first in zip(own, found[0][1], strict=True) for a, b in zip(pair, first, strict=True))


@pytest.mark.parametrize("kind", [None, TILES_4])
def test_a_head_is_the_same_bits_for_any_number_of_threads(kind, all_threads, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(496, 96, generator=generator).bfloat16()
    weight = weight if kind is None else TileWeight.of(weight, kind)
    stream, norm = torch.randn(5, 96, generator=generator), torch.rand(96, generator=generator).bfloat16()
    found = []
    for threads in (1, 2, 3, 4):
        monkeypatch.setattr("kernels.cpu_decode.step.num_threads", lambda _, threads=threads: threads)
        found.append(head(stream, norm, weight, 1e-5))
    assert all(torch.equal(own, found[0]) for own in found[1:]) and found[0].isfinite().all()


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16], ids=str)
def test_a_caller_s_default_dtype_is_nothing_to_the_steps(kind):
    """They write float32 into memory that PyTorch gives them."""
    generator = torch.Generator().manual_seed(3)
    layers, weight = layers_of(None, False, generator), torch.randn(496, WIDTH, generator=generator).bfloat16()
    stream, norm = torch.randn(7, WIDTH, generator=generator).bfloat16().float(), torch.rand(WIDTH, generator=generator).bfloat16()
    at, requests, table = np.arange(7, dtype=np.int64), np.zeros(7, np.int64), np.array([[1, 0]], np.int64)
    angles = torch.rand(7, D // 2, generator=generator), torch.rand(7, D // 2, generator=generator)
    found = []
    for default in (torch.float32, kind):
        torch.set_default_dtype(default)
        try:
            pages = [
                (torch.zeros(2, 16, KV_HEADS, D, dtype=torch.bfloat16), torch.zeros(2, 16, KV_HEADS, D, dtype=torch.bfloat16))
                for _ in layers
            ]
            out = stream.clone()
            CompiledLayers(layers, pages, StepShape(HEADS, KV_HEADS, D, INNER, 1e-5, D**-0.5)).run(
                range(2), out, angles, at, at, requests, table
            )
            found.append((out, head(out, norm, weight, 1e-5), pages[1][0]))
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_threads_are_pytorchs_where_these_are_few(monkeypatch):
    monkeypatch.setattr(crew, "keeps_code", lambda: True)
    for threads, wanted in ((1, 1), (2, 2), (4, 4), (8, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert num_threads(1 << 24) == wanted and num_threads(1000) == 1
    monkeypatch.setattr(crew, "keeps_code", lambda: False)
    assert num_threads(1 << 24) == 1


def test_together_only_while_that_pays():
    judge = Judge()

    def steps(count, all_s, alone_s=1.0):
        together = 0
        for _ in range(count):
            both = judge.together("key")
            judge.observe("key", both, all_s if both else alone_s)
            together += both
        return together

    assert steps(1000, 0.6) >= 990
    assert steps(1000, 3.0) < 25, "beside others' work they are tried hardly ever"
    assert steps(3000, 3.0) <= 9, "and rarer each time"
    assert steps(10000, 0.6) > 5000, "but again"
    assert not judge.together("another"), "each kind of step on its own"


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_of_one_part_is_the_steps(all_threads, failing):
    """It comes out of the step, whichever thread it is raised in, and the helpers serve the next one."""

    def call(part, parts, counter):
        if part == failing:
            raise ValueError(f"part {part}")

    def steps():
        with pytest.raises(ValueError, match=f"part {failing}"):
            all_threads.run(3, "key", call)
        all_threads.run(3, "key", lambda part, parts, counter: ran.append(part))

    ran = []
    thread = threading.Thread(target=steps)
    thread.start()
    thread.join(300)
    assert not thread.is_alive() and sorted(ran) == [0, 1, 2]


def test_layers_follow_pytorchs_threads(all_threads, monkeypatch):
    """They were laid out while there was another number of these."""
    generator, asked, before = torch.Generator().manual_seed(4), [], torch.get_num_threads()
    all_threads.run = lambda threads, key, call: asked.append(threads) or call(0, 1, 0)
    pages = [(torch.zeros(1, 16, KV_HEADS, D).bfloat16(), torch.zeros(1, 16, KV_HEADS, D).bfloat16()) for _ in range(2)]
    compiled = CompiledLayers(layers_of(None, False, generator), pages, StepShape(HEADS, KV_HEADS, D, INNER, 1e-5, D**-0.5))
    assert compiled.num_threads == 1, "layers as small as these are run by one thread"
    monkeypatch.setattr(crew, "LEAST_BYTES", 0)
    stream, one, found = torch.randn(1, WIDTH, generator=generator).bfloat16().float(), np.zeros(1, np.int64), []
    try:
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            found.append(stream.clone())
            compiled.run(range(2), found[-1], (torch.ones(1, D // 2), torch.zeros(1, D // 2)), one, one, one, np.zeros((1, 1), np.int64))
    finally:
        torch.set_num_threads(before)
    assert asked == [1, 3, 2] and all(torch.equal(out, found[0]) for out in found) and not torch.equal(found[0], stream)


def test_steps_over_longer_texts_are_judged_apart(all_threads):
    generator, keys = torch.Generator().manual_seed(2), []
    all_threads.run = lambda threads, key, call: keys.append(key)
    layers = layers_of(None, False, generator)
    pages = [[torch.zeros(40, 16, KV_HEADS, D).bfloat16() for _ in range(2)] for _ in layers]
    compiled = CompiledLayers(layers, pages, StepShape(HEADS, KV_HEADS, D, INNER, 1e-5, D**-0.5))
    for position in (40, 41, 400):
        at, table = np.array([position], np.int64), np.arange(40, dtype=np.int64)[None]
        angles = torch.rand(1, D // 2, generator=generator), torch.rand(1, D // 2, generator=generator)
        compiled.run(range(2), torch.zeros(1, WIDTH), angles, at, at, np.zeros(1, np.int64), table)
    assert keys[0] == keys[1] != keys[2]


def test_every_part_runs_once_and_one_step_has_the_helpers(all_threads):
    ran, inner = [], []

    def call(part, parts, counter):
        ran.append((part, parts))
        if part == 0:  # another step meanwhile
            other = threading.Thread(target=all_threads.run, args=(2, "other", lambda *told: inner.append(told)))
            other.start()
            other.join(300)

    for _ in range(20):
        all_threads.run(3, "key", call)
        assert sorted(ran) == [(0, 3), (1, 3), (2, 3)] and inner == [(0, 1, 0)]
        ran.clear(), inner.clear()


def test_an_interrupt_leaves_nobody_waiting(all_threads):
    def interrupted(part, parts, counter):
        if part == 0:
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            all_threads.run(2, "key", interrupted)
        ran = list[tuple[int, ...]]()
        all_threads.run(2, "key", lambda *told, ran=ran: ran.append(told[:2]))
        assert sorted(ran) == [(0, 2), (1, 2)]


def test_whoever_meets_an_interrupted_one_goes_on(all_threads, monkeypatch):
    """Layers of one thread alone, whose partner never comes: the step ends when it is told."""
    generator = torch.Generator().manual_seed(2)
    pages = [(torch.zeros(1, 16, KV_HEADS, D).bfloat16(), torch.zeros(1, 16, KV_HEADS, D).bfloat16()) for _ in range(2)]
    compiled = CompiledLayers(layers_of(None, False, generator), pages, StepShape(HEADS, KV_HEADS, D, INNER, 1e-5, D**-0.5))
    stream, one, ended = torch.randn(1, WIDTH, generator=generator).bfloat16().float(), np.zeros(1, np.int64), []

    def lonely(threads, key, call):
        meeting = np.zeros(2, np.int64)
        waiting = threading.Thread(target=lambda: (call(0, 2, meeting.ctypes.data), ended.append(True)))
        waiting.start()
        while not meeting[0] and waiting.is_alive():
            waiting.join(0.01)
        waiting.join(0.2)
        assert waiting.is_alive() and meeting[0] == 1
        meeting[1] = 1
        waiting.join(300)

    all_threads.run = lonely
    monkeypatch.setattr("kernels.cpu_decode.step.num_threads", lambda _: 2)
    angles = torch.ones(1, D // 2), torch.zeros(1, D // 2)
    compiled.run(range(2), stream, angles, one, one, one, np.zeros((1, 1), np.int64))
    assert ended


@pytest.mark.parametrize("kind", [KeyboardInterrupt, TimeoutError])
@pytest.mark.parametrize("threads", [2, 3, 4])
def test_an_interrupt_of_the_wait_waits_for_whoever_still_writes(all_threads, kind, threads):
    """And the next step has helpers that have ended it, whatever the interrupt is."""
    ended, go_on, others = [], threading.Event(), set(threading.enumerate())

    def slow(part, parts, counter):
        if part:
            go_on.wait(20)
            ended.append(part)
        else:
            signal.setitimer(signal.ITIMER_REAL, 0.05)

    def interrupt(signal, frame):
        go_on.set()
        raise kind

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(3):
            ended.clear(), go_on.clear()
            with pytest.raises(kind):
                all_threads.run(threads, "key", slow)
            assert sorted(ended) == list(range(1, threads)), "memory is the caller's again"
            ran = list[int]()
            all_threads.run(threads, "key", lambda part, parts, counter, ran=ran: ran.append(part))
            assert sorted(ran) == list(range(threads))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)  # drops one that has not been delivered, which could end the process
        signal.signal(signal.SIGALRM, before)
    own = [thread for thread in threading.enumerate() if thread not in others and thread.name.startswith("foretold-step")]
    assert len(own) == threads - 1, "no interrupt leaves threads behind"


def test_an_interrupted_first_step_is_no_time_of_one_thread():
    own = Crew()

    def interrupted(part, parts, counter):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        own.run(2, "key", interrupted)
    ran = []
    for _ in range(4):
        own.run(2, "key", lambda part, parts, counter: ran.append((part, parts)))
    assert ran[0] == (0, 1) and (1, 2) in ran


def test_a_cold_first_step_is_not_what_one_thread_takes():
    judge = Judge()
    for seconds in (2.2, 1.0):
        assert not judge.together("key")
        judge.observe("key", False, seconds)
    together = 0
    for _ in range(500):
        both = judge.together("key")
        judge.observe("key", both, 2.0 if both else 1.0)
        together += both
    assert together < 20


def test_one_thread_where_no_other_can_be_had(all_threads, monkeypatch):
    ran = []
    with all_threads.alone():
        all_threads.run(3, "key", lambda part, parts, counter: ran.append((part, parts)))

    def refuse(self):
        raise RuntimeError("can't start new thread")

    own = Crew()
    own.judge.together = lambda key: True
    own.judge.observe = lambda key, together, seconds: None
    monkeypatch.setattr(threading.Thread, "start", refuse)
    own.run(3, "key", lambda part, parts, counter: ran.append((part, parts)))
    assert ran == [(0, 1), (0, 1)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are copied by fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_copy_of_the_process_makes_its_own_helpers(all_threads):
    all_threads.run(2, "key", lambda *told: None)
    pid = os.fork()
    if not pid:
        ran = []
        all_threads.run(2, "key", lambda *told: ran.append(told[:2]))
        os._exit(0 if sorted(ran) == [(0, 2), (1, 2)] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
