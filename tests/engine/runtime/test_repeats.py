"""In bf16, where another batch shape is other rounding: text under a seed, and all text in deterministic mode, depends on what it may depend on."""

from __future__ import annotations

import pytest
import torch

from draft.policy import CostModel
from engine.engine import Engine
from engine.hub.resolve import resolve_pair
from engine.model.decoder import Decoder
from engine.runtime.sampling import SamplingParams

COSTS = CostModel(draft=((1, 0.1),), verify=((1, 1.0), (64, 3.0)), runs_last_draft=True)
SAMPLED = {"temperature": 0.9, "top_p": 0.95}


@pytest.fixture(scope="module")
def decoder(random_decoder):
    """A bf16 decoder whose products round differently in another number of rows."""
    return lambda seed, layers: random_decoder(
        seed, 0.15, hidden_size=96, intermediate_size=256, vocab_size=700, num_hidden_layers=layers
    ).to(torch.bfloat16)


def prompts(count, length=11):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 700, (length + i % 5,), generator=generator).tolist() for i in range(count)]


def texts(engine, given, batch, **options):
    """Token ids of every prompt, served `batch` at a time."""
    found = []
    for start in range(0, len(given), batch):
        group = given[start : start + batch]
        seeds = [start + i if options.get("seeded", True) else None for i in range(len(group))]
        params = [SamplingParams(max_new_tokens=9, seed=s, **{k: v for k, v in options.items() if k != "seeded"}) for s in seeds]
        found += [r.token_ids for r in engine.generate(group, params)]
    return found


@pytest.fixture(scope="module")
def alone(decoder):
    """`alone(deterministic=False, **options)` -> what the target says to each of `prompts(10)` without drafts and neighbours; made once."""
    made: dict[tuple, list] = {}

    def make(deterministic=False, **options):
        key = (deterministic, *sorted(options.items()))
        if key not in made:
            made[key] = texts(Engine(decoder(1, 3), page_size=16, deterministic=deterministic), prompts(10), 1, draft_length=0, **options)
        return made[key]

    return make


@pytest.mark.parametrize("kind", ["none", "model", "exit"])
@pytest.mark.parametrize("options", [{}, SAMPLED, SAMPLED | {"repetition_penalty": 1.2}], ids=["greedy", "sampled", "penalised"])
def test_a_seed_names_the_same_text_in_every_batch_and_with_every_draft_length(decoder, alone, kind, options):
    target = decoder(1, 3)
    draft = {"none": None, "model": decoder(2, 1), "exit": 1}[kind]
    given = prompts(10)
    engine = Engine(target, draft=draft, page_size=16, costs=COSTS)
    for batch, length in ((10, 0),) if kind == "none" else ((1, "auto"), (3, 4), (10, "auto"), (10, 2)):
        some = given[: 3 * batch]  # a prompt alone costs a pass a token: a few of them say it
        found = texts(engine, some, batch, draft_length=length, **options)
        assert found == alone(**options)[: len(some)], f"batches of {batch}, draft length {length}"


def test_a_seeded_request_repeats_beside_others_without_a_seed(decoder):
    engine = Engine(decoder(1, 3), draft=1, page_size=16)
    own = SamplingParams(max_new_tokens=14, seed=3, draft_length=3, **SAMPLED)
    [alone] = engine.generate([prompts(1)[0]], own)
    others = [SamplingParams(max_new_tokens=n, draft_length=n % 4, **SAMPLED) for n in range(5, 12)]
    together = engine.generate(prompts(8), [own, *others])
    assert together[0].token_ids == alone.token_ids


@pytest.mark.parametrize("kind", ["none", "model", "exit"])
def test_greedy_text_in_deterministic_mode_depends_on_no_batch_and_no_draft(decoder, alone, kind):
    target = decoder(1, 3)
    draft = {"none": None, "model": decoder(2, 1), "exit": 1}[kind]
    given = prompts(10)
    engine = Engine(target, draft=draft, page_size=16, costs=COSTS, deterministic=True)
    for batch, length in ((1, 0 if kind == "none" else "auto"), (10, 0 if kind == "none" else 3)):
        some = given[: 3 * batch]
        assert texts(engine, some, batch, draft_length=length, seeded=False) == alone(deterministic=True, seeded=False)[: len(some)]


@pytest.mark.parametrize("kind", ["model", "exit"])
def test_under_a_seed_every_pass_that_has_a_say_in_the_text_is_batch_invariant(decoder, kind, monkeypatch):
    """Rounding may happen to agree on the machine that runs the tests; which arithmetic is asked for does not depend on it."""
    target = decoder(1, 3)
    engine = Engine(target, draft=1 if kind == "exit" else decoder(2, 1), page_size=16, costs=COSTS)
    forward, asked = Decoder.forward, []

    def spied(self, *args, **options):
        if self is target:
            asked.append(options.get("deterministic", False))
        return forward(self, *args, **options)

    monkeypatch.setattr(Decoder, "forward", spied)
    for seed, wanted in ((None, False), (5, True), (None, False)):
        asked.clear()
        [result] = engine.generate([prompts(1)[0]], SamplingParams(max_new_tokens=8, seed=seed, draft_length=2, temperature=0.9))
        assert result.speculation.proposed > 0 and len(asked) > 3 and set(asked) == {wanted}


def test_the_real_pair_repeats_under_a_seed():
    """smollm2 with its trained draft: batches of 1 and 3, with and without drafts, greedy and sampled."""
    paths = resolve_pair("smollm2")
    engine = Engine.from_pretrained(paths.target_dir, paths.draft, device="cpu", dtype="bfloat16", costs=COSTS)
    assert engine.dtype == torch.bfloat16
    given = [engine.encode(text) for text in ("The old harbour of", "def parse(line):", "In 1969 the")]
    for options in ({}, {"temperature": 0.8}):
        alone = texts(engine, given, 1, draft_length=0, **options)
        assert texts(engine, given, 3, draft_length=3, **options) == alone
        assert texts(engine, given, 3, draft_length="auto", **options) == alone
