"""A prompt's compiled attention beside its plain meaning, in float64."""

from __future__ import annotations

import pytest
import torch

from kernels.cpu_decode import compiled_available, machine_code, prompts
from kernels.cpu_decode.arguments import ARGUMENTS, REAL
from kernels.cpu_decode.prompts import attend_prompt, attends_prompts
from kernels.dispatch import VARIABLE
from kernels.paged_attention.reference import attend, plan

pytestmark = pytest.mark.skipif(not compiled_available(), reason="llvmlite is not installed here")
PAGE = 16


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    with torch.no_grad():
        yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def drawn(tokens: int, keys: int, heads: int, groups: int, d: int, seed: int = 0) -> list[torch.Tensor]:
    """Queries, keys and values; scores reach some twenty, so that softmax weights differ much."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, heads + groups, d), (keys, groups, d), (keys, groups, d))
    q, k, v = ((3 * torch.randn(*shape, generator=generator)).bfloat16() for shape in shapes)
    return [q[:, :heads], k, v]


def plainly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    (tokens, heads, _), (keys, groups, _) = q.shape, k.shape
    own_k, own_v = (part.double().repeat_interleave(heads // groups, 1).transpose(0, 1) for part in (k, v))
    scores = q.double().transpose(0, 1) @ own_k.transpose(1, 2) * scale
    hidden = torch.ones(tokens, keys, dtype=torch.bool).triu(keys - tokens + 1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ own_v).transpose(0, 1)


def distance(found: torch.Tensor, want: torch.Tensor) -> float:
    assert bool(found.isfinite().all())
    return float((found.double() - want).norm() / want.norm())


SHAPES = [
    (1, 1, 1, 1, 64),
    (7, 7, 3, 3, 64),
    (5, 130, 4, 1, 128),
    (33, 128, 9, 3, 64),
    (97, 300, 10, 2, 64),
    (256, 1000, 2, 1, 192),
    (129, 129, 7, 7, 64),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(shape) -> None:
    q, k, v = drawn(*shape)
    want, found = plainly(q, k, v, 0.11), attend_prompt(q, k, v, 0.11)
    assert found.shape == q.shape and distance(found, want) < 0.004
    one = attend_prompt(q[-1:], k, v, 0.11)  # a row is the same bits alone, and where later keys are not there yet
    assert torch.equal(one, found[-1:])
    if len(q) > 1:
        assert torch.equal(attend_prompt(q[:-1], k[:-1], v[:-1], 0.11), found[:-1])


def test_keys_that_a_row_does_not_see_are_not_looked_at() -> None:
    q, k, v = drawn(40, 200, 3, 1, 64)
    found = attend_prompt(q, k, v, 0.1)
    k[-20:], v[-20:] = 1e4, -1e4
    assert torch.equal(attend_prompt(q, k, v, 0.1)[:20], found[:20])


def test_scores_far_apart() -> None:
    """One key takes all of the weight; and all keys weigh alike."""
    q, k, v = drawn(6, 150, 1, 1, 64)
    k[3] = 100 * q[-1, 0]
    assert torch.equal(attend_prompt(q, k, v, 1.0)[-1, 0], v[3, 0])
    even = attend_prompt(torch.zeros_like(q), k, v, 1.0)
    assert distance(even, plainly(torch.zeros_like(q), k, v, 1.0)) < 0.004


def test_processors_without_products_of_pairs(monkeypatch) -> None:
    """The program for them, compiled here, gives what the other one does but for the last bits of a sum."""

    def step(has):
        return machine_code._step(lambda name: not name.startswith(("avx512bf16", "amx")) and has(name))

    q, k, v = drawn(50, 170, 6, 2, 64)
    found = attend_prompt(q, k, v, 0.1)
    addresses, kept = machine_code.compiled_here(step, ["prompt_attention"])
    import ctypes

    kinds = [ctypes.c_float if name in REAL else ctypes.c_int64 for name in ARGUMENTS["prompt_attention"]]
    other = ctypes.CFUNCTYPE(None, *kinds)(addresses["prompt_attention"])
    monkeypatch.setitem(machine_code.functions(), "prompt_attention", other)
    assert distance(attend_prompt(q, k, v, 0.1), found.double()) < 0.004 and kept is not None


def test_plans_take_it_for_many_tokens_alone(monkeypatch) -> None:
    """Over pages that follow one another or not, a second request of few tokens beside it."""
    generator = torch.Generator().manual_seed(4)
    pools = [torch.randn(12, PAGE, 2, 64, generator=generator).bfloat16() for _ in (0, 1)]
    pages, lens, contexts = [[5, 2, 7, 1, 0], [8, 9, 10]], [60, 3], [75, 40]
    q = torch.randn(63, 4, 64, generator=generator).bfloat16()
    made = []
    for compiled in (True, False):
        found = plan(pages, lens, contexts, PAGE, 2, q.dtype, q.device, compiled=compiled)
        assert [tile.compiled for tile in found.tiles] == [compiled, False]
        made.append(attend(q, *pools, found, 0.125))
    assert distance(made[0], made[1].double()) < 0.004 and torch.equal(made[0][60:], made[1][60:])
    for options in ({"deterministic": True}, {"sliding_window": 8}, {"in_parts": False}):
        assert not any(t.compiled for t in plan(pages, lens, contexts, PAGE, 2, q.dtype, q.device, compiled=True, **options).tiles)
    assert not any(t.compiled for t in plan(pages, lens, contexts, PAGE, 2, torch.float32, q.device, compiled=True).tiles)


def test_where_it_is_used(monkeypatch) -> None:
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    monkeypatch.setattr(prompts, "_multiplies_pairs", lambda: True)
    assert attends_prompts(64, bf16, cpu) and attends_prompts(128, bf16, cpu)
    assert (
        not attends_prompts(96, bf16, cpu)
        and not attends_prompts(64, torch.float32, cpu)
        and not attends_prompts(64, bf16, torch.device("meta"))
    )
    with torch.enable_grad():
        assert not attends_prompts(64, bf16, cpu)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert not attends_prompts(64, bf16, cpu)
    monkeypatch.undo()
    monkeypatch.setenv(VARIABLE, "reference")
    assert not attends_prompts(64, bf16, cpu)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q.float(), k, v),
        lambda q, k, v: (q, k, v[:-1]),
        lambda q, k, v: (q[:, :3], k, v),
        lambda q, k, v: (q, k[..., :32], v[..., :32]),
    ],
)
def test_what_does_not_fit_is_refused(change) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        attend_prompt(*change(*drawn(4, 8, 4, 2, 64)), 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        attend_prompt(*drawn(9, 8, 4, 2, 64), 1.0)
