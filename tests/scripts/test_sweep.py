"""scripts/sweep_predictor.py: parts of one matrix of moments are what the features alone would give, and rows say what they should."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import sweep_predictor
from codec.quantize import quantise
from codec.rate import laplace_probabilities
from engine.calibrate.search import laplace_bits
from eval.sweep_fits import FULL, early_exit_sets, separate_sets, sweep
from sweep_predictor import gather, main

STEP = 1.0


@pytest.fixture(scope="module")
def target(random_decoder):
    return random_decoder(0, vocab_size=300)


@pytest.fixture(scope="module")
def draft(random_decoder):
    return random_decoder(1, vocab_size=300)


@pytest.fixture(scope="module")
def docs() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 300, (48,), generator=generator).tolist() for _ in range(60)]


def test_code_lengths_are_those_of_the_entropy_model() -> None:
    x = torch.tensor([[0.0, 0.57, 0.59, -1.7, 6.2]])
    for scale in (0.3, 1.0, 4.0):
        table = -np.log2(laplace_probabilities(scale, 8))
        expected = [table[8 + int(q)] for q in quantise(x)[0]]
        torch.testing.assert_close(
            laplace_bits(x, torch.full((5,), scale))[0], torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-4
        )


def test_parts_of_the_whole_are_what_each_set_gives_alone(target, draft, docs) -> None:
    sets = separate_sets(draft.config.num_layers, [1])
    assert [one.name for one in sets][-1] == "all states + target's 1 layers" and len({one.name for one in sets}) == len(sets)
    whole, tokens = gather(target, draft, sets, docs, 300, 1000)
    assert tokens == sum(map(len, docs)) - 6 * 48 and len(whole.y) == 6 * 44
    for one in (sets[1], sets[-1]):
        alone, _ = gather(target, draft, [one], docs, 300, 1000)
        part, mine = whole.part(one), alone.part(one)
        torch.testing.assert_close(part[0].ff, mine[0].ff, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(part[0].fy, mine[0].fy, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(part[1], mine[1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(part[2], mine[2])
        coded = target.config.num_layers - one.first_layer
        assert (
            part[2].shape[1] == coded * target.config.kv_width
            and len(part[3].sensitivity_sqrt) * target.config.head_dim == part[2].shape[1]
        )


def test_rows(target, draft, docs) -> None:
    """A draft that is the target itself predicts the keys of the text: more directions, more of them and fewer bits."""
    sets = separate_sets(target.config.num_layers, [1])
    whole, _ = gather(target, target, sets, docs, 300, 1000)
    elements = target.config.num_layers * target.config.kv_width
    rows = {one.name: list(sweep(whole, one, [4, 16, FULL], STEP, elements)) for one in sets}
    own = rows["all states"]
    assert [(r["rank"], r["storage_bits"]) for r in own] == [(4, 8), (16, 8), (FULL, 4), (FULL, 8)]
    bits, r2 = [r["ideal_bits_per_element"] for r in own], [r["r2_k"] + r["r2_v"] for r in own]
    assert bits[0] > bits[1] > bits[3] and r2[0] < r2[1] < r2[3] and r2[3] > r2[2] - 1e-3 > r2[1]
    sizes = [r["predictor_bytes"] for r in own]
    assert sizes[0] < sizes[1] and 1.5 * sizes[2] < sizes[3]
    assert rows["embedding"][-1]["ideal_bits_per_element"] > bits[3] and rows["embedding"][-1]["num_features"] == target.config.hidden_size


def test_layers_that_run_again_cost_nothing(target, draft, docs) -> None:
    sets = [one for one in separate_sets(draft.config.num_layers, [1]) if one.name.startswith("all")]
    whole, _ = gather(target, draft, sets, docs, 300, 1000)
    plain, hybrid = (list(sweep(whole, one, [FULL], 0.25, target.config.num_layers * target.config.kv_width))[-1] for one in sets)
    assert 0 < hybrid["ideal_bits_per_element"] < plain["ideal_bits_per_element"]
    assert (plain["first_layer"], hybrid["first_layer"]) == (0, 1) and hybrid["num_features"] > plain["num_features"]


def test_command(chat_folders, tmp_path, capsys) -> None:
    (tmp_path / "text.txt").write_text(
        "\n".join(f"Line {n} of a text about {n * 7919 % 1000} things and {n * 31 % 17} more." for n in range(900))
    )
    (tmp_path / "more.txt").write_text("\n".join(f"Other words, {n * 104729 % 1000}, in another order: {n * 37 % 19}." for n in range(900)))
    out = tmp_path / "sweep.json"
    command = [
        "--target",
        str(chat_folders.target),
        "--draft",
        "trunk",
        "--exit-layer",
        "1",
        "--text",
        str(tmp_path),
        "--tokens",
        "1200",
        "--context",
        "64",
        "--held-out-tokens",
        "128",
        "--ranks",
        "8,full",
        "--device",
        "cpu",
        "--json-out",
        str(out),
        "--plot",
        str(tmp_path / "sweep.png"),
    ]
    assert main(command) == 0
    document = json.loads(out.read_text())
    assert {row["features"] for row in document["rows"]} == {one.name for one in early_exit_sets(1)}
    assert all(row["predictor_share"] == row["predictor_bytes"] / document["target_bytes"] for row in document["rows"])
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    for change, said in ((["--ranks", "8,lots"], "--ranks"), (["--sets", "none such"], "--sets"), (["--tokens", "5"], "at least 256")):
        capsys.readouterr()
        assert sweep_predictor.main([*command, *change]) == 2
        assert said in capsys.readouterr().err
