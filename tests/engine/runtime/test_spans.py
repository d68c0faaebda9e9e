"""Automatic drafts over launched steps: never slower than plain decoding, on a simulated host and device that work side by side.

The loop, the steps' order of launching and reading, and the policy are the engine's own; what is launched takes time on the device alone, and what
the host does takes the host's.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from draft.policy import CostModel
from draft.spans import SpanPolicy
from engine.runtime import block_runner, model_runner, step
from engine.runtime.block_runner import BlockDecoding, Flight
from engine.runtime.metrics import SpeculationMetrics
from engine.runtime.model_runner import CAPTURED_LENGTHS, MAX_ROWS, PlainDecoding
from engine.runtime.sampling import SamplingParams

MS = 1e-3
# milliseconds of a plain step, and of each further draft, on the device, by batch; as on an H200
DEVICE = {1: (0.48, 0.10), 8: (0.52, 0.09), 32: (0.76, 0.20)}


class Machine:
    """A host and a device that runs what was launched in order. hiccups: chance that a step's host work takes ten times as long. period: of a text
    that repeats itself."""

    def __init__(self, batch, *, acceptance, seed=0, hiccups=0.0, period=1 << 30):
        self.now = self.free_at = 0.0
        self.batch, self.acceptance, self.hiccups, self.period = batch, acceptance, hiccups, period
        self.random = random.Random(seed)
        self.plain_ms, self.draft_ms = DEVICE[batch]
        self.launched, self.captured, self.ends = [], set(), {}

    def text(self, at, count):
        """Tokens from index `at` on."""
        return [(at + i) % self.period for i in range(count)]

    def host(self, ms):
        self.now += ms * MS * self.random.uniform(0.95, 1.05)

    def launch(self, kind, ms):
        """Returns when it will be done."""
        self.launched.append(kind)
        self.host(0.03)
        self.free_at = max(self.now, self.free_at) + ms * MS * self.random.uniform(0.97, 1.03)
        return self.free_at

    def wait(self, done_at):
        self.now = max(self.now, done_at)

    def serve(self, tokens):
        """What every step takes of the host for the tokens that it gained: text, events."""
        self.host((0.06 + 0.012 * self.batch + 0.012 * tokens) * (10 if self.random.random() < self.hiccups else 1))


class SimulatedPlain(PlainDecoding):
    def __init__(self, machine):
        self.machine, self._ahead, self._log, self._penalties = machine, None, None, None
        self.target = SimpleNamespace(device=torch.device("cpu"))

    def _launch(self, sequences, starts, tokens, params, seeds, taps, deterministic, after=None, beside=()):
        rows = sum(len(own.tokens) for own in beside)
        if rows:
            self.machine.host(0.2)
        done_at = self.machine.launch("plain", self.machine.plain_ms * (1 + 0.004 * rows))
        found = [self.machine.text(start + 1, 1)[0] for start in starts]
        return model_runner._Ahead(list(sequences), list(params), starts, torch.tensor(found), (done_at, found))


class SimulatedBlocks(BlockDecoding):
    def __init__(self, machine):
        self.machine, self._flight, self._settled, self.drafter, self.on_states = machine, None, block_runner._NOTHING, None, None

    def _takes(self, requests, plan, deterministic, *, behind=None):
        return plan if plan.drafts else None

    def ready(self, requests, deterministic, kind):
        return [k for k in CAPTURED_LENGTHS if len(requests) * (1 + k) <= MAX_ROWS]

    def commit(self, kept):
        pass

    def _gather(self, columns, length):
        self.machine.launch("gather", 0.01)

    def _launch(self, requests, plan, key, *, ahead=False):
        machine, length = self.machine, max([*plan.lengths, *map(len, plan.given)])
        source = "model" if any(plan.lengths) else "given"
        if not ahead and source == "model":
            machine.host(0.3)
            machine.launch("behind", 0.004 * sum(r.behind for r in requests))
            for request in requests:
                request.behind = 0
        elif source == "given":
            for request in requests:
                request.behind += length
        if length not in machine.captured:
            machine.captured.add(length)
            machine.host(20.0)
        done_at = machine.launch(source, machine.plain_ms + machine.draft_ms * length * (0.1 if source == "given" else 1))
        gained, counts = [], []
        for request, own, given in zip(requests, plan.lengths, plan.given, strict=True):
            # a step that is launched ahead begins where the one before it ends
            at = machine.ends[id(request)] if ahead else len(request.token_ids)
            most = own or len(given)
            wrong = [machine.random.random() > machine.acceptance + request.more for _ in range(own)]
            wrong = wrong or [a != b for a, b in zip(given, machine.text(at, most), strict=True)]
            kept = next((i for i in range(most) if wrong[i]), most)
            gained.append([1 + kept, *machine.text(at, 1 + kept)])
            machine.ends[id(request)] = at + 1 + kept
            counts.append(most)
        return Flight(requests, source, length, plan, counts, (done_at, gained), None)


class Sequence:
    def __init__(self, owner, length):
        self.owner, self.length = owner, length
        self.pool = SimpleNamespace(takes_tree_positions=False)

    def advance(self, count):
        self.length += count


class SimulatedRequest:
    """What a step asks of a request."""

    def __init__(self, drafting, new, text):
        self.token_ids, self.conversation, self.prompt_tokens = list(text), self, len(text)
        self.params, self.seed, self.context, self.penalised, self.constraint = SamplingParams(), 0, 1 << 20, False, None
        self.drafting, self.metrics, self.logprobs, self.error = drafting, SpeculationMetrics("simulated"), [], None
        self.end, self.sequence, self.behind = len(self.token_ids) + new, Sequence(self, len(self.token_ids) - 1), 0
        self.more = 0.0  # its own acceptance, beyond the machine's
        self.draft_state = SimpleNamespace(knows_text=True)
        self.joins = False

    @property
    def num_new(self):
        return len(self.token_ids) - self.prompt_tokens

    @property
    def remaining(self):
        return self.end - len(self.token_ids)

    def longest(self, *, drafts):
        return self.end

    def append_tokens(self, run):
        kept = run[: self.remaining]
        self.token_ids += kept
        return len(kept)


class Simulation:
    """An engine's decode loop over a simulated machine."""

    def __init__(self, monkeypatch, machine, policy):
        self.machine, self.policy = machine, policy
        self.plain, self.blocks = SimulatedPlain(machine), SimulatedBlocks(machine)
        self.drafter = SimpleNamespace(
            exit_layer=1, resumes_at=1, feature_taps=(), max_positions=1 << 20, begins_after=0, takes_leaves=False
        )
        self.drafter.takes_given, self.drafter.deterministic = True, False
        plan = policy.plan

        def planned(*args, **options):
            machine.host(0.01 + 0.002 * machine.batch)
            return plan(*args, **options)

        def read_out(ready):
            machine.wait(ready[0])
            return ready[1]

        monkeypatch.setattr(policy, "plan", planned)
        monkeypatch.setattr(model_runner, "read_out", read_out)
        monkeypatch.setattr(block_runner, "read_out", read_out)
        monkeypatch.setattr(step, "step_clock", lambda device: lambda: machine.now)

    def run(self, wanted, new=96, spread=0.0):
        """(seconds of decoding, tokens) of a batch whose requests have a prompt before; until the first ends, or where their acceptance differs (by
        `spread` both ways) until all have."""
        machine, policy = self.machine, self.policy
        policy.interrupted()
        machine.host(5.0)
        requests = [SimulatedRequest(policy.request(wanted, greedy=True), new, machine.text(0, 100)) for _ in range(machine.batch)]
        for i, request in enumerate(requests):
            request.more = spread * (2 * i / max(1, len(requests) - 1) - 1)
        began, tokens = machine.now, 0
        while requests and (spread or all(r.remaining > 0 for r in requests)):
            before = sum(len(r.token_ids) for r in requests)
            target = SimpleNamespace(device=torch.device("cpu"))
            options = {"drafting": policy, "catch_up": 512, "plain": self.plain, "blocks": self.blocks}
            step.decode_step(requests, target, self.drafter, **options)
            count = sum(len(r.token_ids) for r in requests) - before
            for request in requests:
                request.behind += 1 if count == len(requests) else 0
            tokens += count
            machine.serve(count)
            if spread:
                requests = [r for r in requests if r.remaining > 0]
        return machine.now - began, tokens

    def run_full(self, wanted, count):
        """The same of `count` requests of which as many run as the batch has places for: when one ends the next one takes its place."""
        machine, policy, running, tokens, draw = self.machine, self.policy, [], 0, random.Random(count)
        target = SimpleNamespace(device=torch.device("cpu"))
        options = {"drafting": policy, "plain": self.plain, "blocks": self.blocks}
        machine.ends.clear()
        while count > 0 or running:
            late = []
            for _ in range(min(count, machine.batch - len(running))):
                late.append(SimulatedRequest(policy.request(wanted, greedy=True), draw.randrange(48, 144), machine.text(0, 45)))
                late[-1].sequence.length = 0
                count -= 1
            beside = []
            if late and running and step.launches_ahead(running, self.drafter, **options):
                beside = [step.Beside(r, len(r.token_ids) - 1, True) for r in late]
            elif late:
                (policy.joined if running else policy.interrupted)()
                machine.host(0.5)
                machine.wait(machine.launch("prompt", 1.3 * machine.plain_ms))
                for request in late:
                    request.append_tokens([0])
                    request.sequence.length = len(request.token_ids) - 1
            if running:
                before = sum(len(r.token_ids) for r in running)
                ran = step.decode_step(
                    running, target, self.drafter, catch_up=512, beside=beside, ahead=not late or bool(beside), **options
                )
                assert ran == bool(beside)
                gained = sum(len(r.token_ids) for r in running) - before
                tokens += gained
                machine.serve(gained)
            for request in running:
                request.joins = False
            for request in late:
                request.joins = bool(beside)
            running = [r for r in running + late if r.remaining > 0]
            if not count and len(running) < machine.batch:
                return machine.now, tokens


def costs_of(batch, believed):
    """What captured passes take by themselves, times `believed` for drafts: no host, and no launching ahead."""
    plain_ms, draft_ms = DEVICE[batch]
    rows = {n: plain_ms + 0.02 * believed * draft_ms * (n - 1) / batch for n in (1, 2, 4, 8, 16, 32, 64, 128)}
    return CostModel(((1, believed * 0.9 * draft_ms * MS),), tuple((n, ms * MS) for n, ms in rows.items()))


def ratios(monkeypatch, batch, acceptance, *, believed=0.7, turns=20, new=96, ngrams=False, spread=0.0, **options):
    """Rates of automatic drafts over plain decoding's, of turns after the first two."""
    machine = Machine(batch, acceptance=acceptance, **options)
    policy = SpanPolicy(costs_of(batch, believed), measured=True, ngrams=ngrams, lengths=CAPTURED_LENGTHS, most_rows=MAX_ROWS)
    simulation = Simulation(monkeypatch, machine, policy)
    found = []
    for _ in range(turns):
        rates = []
        for wanted in (0, "auto"):
            seconds, tokens = simulation.run(wanted, new, spread)
            rates.append(tokens / seconds)
        found.append(rates[1] / rates[0])
    return found[2:], machine, policy


@pytest.mark.parametrize(
    ("batch", "acceptance", "least"), [(8, 0.2, 0.98), (8, 0.5, 0.98), (8, 0.8, 1.1), (32, 0.2, 0.98), (32, 0.5, 0.98), (32, 0.8, 0.98)]
)
def test_batches_that_are_kept_full_lose_nothing_by_drafts(monkeypatch, batch, acceptance, least):
    """A prompt costs a step without drafts little, and one with drafts a pass of its own and a step that waits for it."""
    rates = []
    for wanted in (0, "auto"):
        machine = Machine(batch, acceptance=acceptance)
        policy = SpanPolicy(costs_of(batch, 0.7), measured=True, lengths=CAPTURED_LENGTHS, most_rows=MAX_ROWS)
        simulation = Simulation(monkeypatch, machine, policy)
        simulation.run_full(wanted, 12 * batch)  # captures
        began = machine.now
        tokens = sum(simulation.run_full(wanted, 12 * batch)[1] for _ in range(5))
        rates.append(tokens / (machine.now - began))
    assert rates[1] / rates[0] > least, rates


@pytest.mark.parametrize(
    ("acceptance", "believed"), [(0.2, 0.7), (0.4, 0.3), (0.4, 0.7), (0.4, 2.0), (0.55, 0.7), (0.7, 0.7), (0.7, 2.0), (0.8, 0.7)]
)
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_automatic_drafts_are_never_slower_than_plain_decoding(monkeypatch, batch, acceptance, believed):
    found, _, _ = ratios(monkeypatch, batch, acceptance, believed=believed)
    middle = sorted(found)[len(found) // 2]
    assert middle > 0.98 and sum(found) / len(found) > 0.98, (middle, sum(found) / len(found), min(found))


@pytest.mark.parametrize(("batch", "acceptance", "least"), [(1, 0.8, 1.5), (1, 0.65, 1.3), (1, 0.95, 1.8), (8, 0.8, 1.5), (8, 0.7, 1.3)])
def test_drafts_that_pay_are_taken(monkeypatch, batch, acceptance, least):
    found, machine, _ = ratios(monkeypatch, batch, acceptance)
    assert sorted(found)[len(found) // 2] > least and machine.launched.count("model") > 300


@pytest.mark.parametrize("acceptance", [0.5, 0.6, 0.7])
def test_requests_that_end_one_by_one_are_counted(monkeypatch, acceptance):
    """Drafts gain while all requests run, but each that ends leaves the others alone."""
    monkeypatch.setitem(DEVICE, 8, (0.55, 0.3))
    found, _, _ = ratios(monkeypatch, 8, acceptance, spread=0.25)
    assert sorted(found)[len(found) // 2] > 0.98 and sum(found) / len(found) > 0.97, found


def test_texts_that_repeat_themselves_are_drafted_from(monkeypatch):
    found, machine, _ = ratios(monkeypatch, 1, 0.3, period=24, ngrams=True, turns=12)
    assert min(found) > 1.5 and machine.launched.count("given") > 50


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_texts_that_repeat_nothing_cost_nothing(monkeypatch, batch):
    found, machine, _ = ratios(monkeypatch, batch, 0.3, ngrams=True)
    assert sum(found) / len(found) > 0.98 and "given" not in machine.launched


def test_hiccups_of_the_host_do_not_decide(monkeypatch):
    found, _, _ = ratios(monkeypatch, 1, 0.8, hiccups=0.02)
    assert sum(found) / len(found) > 1.1
    found, _, _ = ratios(monkeypatch, 8, 0.5, hiccups=0.02)
    assert sum(found) / len(found) > 0.97


def test_texts_of_other_acceptance_are_noticed(monkeypatch):
    """A span that paid ends soon where drafts are no longer accepted, and comes back."""
    machine = Machine(1, acceptance=0.8)
    policy = SpanPolicy(costs_of(1, 0.7), measured=True, lengths=CAPTURED_LENGTHS, most_rows=MAX_ROWS)
    simulation = Simulation(monkeypatch, machine, policy)
    rates = []
    for acceptance, new in ((0.8, 3000), (0.1, 3000), (0.8, 9000)):
        machine.acceptance = acceptance
        machine.launched.clear()
        seconds, tokens = simulation.run("auto", new)
        rates.append(tokens / seconds * machine.plain_ms * MS)
    assert rates[0] > 1.15 and rates[1] > 0.97 and "model" in machine.launched


def test_resting_steps_are_launched_ahead_and_planned_for_rarely(monkeypatch):
    machine = Machine(8, acceptance=0.2)
    policy = SpanPolicy(costs_of(8, 0.7), measured=True, lengths=CAPTURED_LENGTHS, most_rows=MAX_ROWS, ngrams=True)
    simulation = Simulation(monkeypatch, machine, policy)
    simulation.run("auto", 200)
    assert "model" in machine.launched, "drafts are tried once"
    planned, plan, waits = [], policy.plan, []
    monkeypatch.setattr(policy, "plan", lambda *args, **options: planned.append(1) or plan(*args, **options))
    wait = machine.wait
    monkeypatch.setattr(machine, "wait", lambda done_at: waits.append(machine.free_at > done_at) or wait(done_at))
    machine.launched.clear()
    simulation.run("auto", 1000)
    assert set(machine.launched) == {"plain"} and len(machine.launched) <= 1001
    assert sum(waits) >= 998, "each step is read while the next one runs"
    assert len(planned) <= 1000 / 16 and policy.rests(8) > 0
