"""The measured acceptance of a draft head is what the engine's own drafting meets; mistakes end as one line."""

from __future__ import annotations

import json
import sys

import pytest

import eval_acceptance
from engine.runtime.sampling import SamplingParams

MESSAGES = ("Hello there!", "What is a bridge?", "Count to five.", "Name two rivers.")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, chat_folders):
    """`run(option, ...)` -> (status, printed, complained) of the script on the tiny target's four messages."""
    prompts = tmp_path / "messages.txt"
    prompts.write_text("\n".join(MESSAGES))

    def call(*options: object) -> tuple[int, str, str]:
        given = ["--target", chat_folders.target, "--prompts", prompts, "--device", "cpu", "--dtype", "float32", *options]
        monkeypatch.setattr(sys, "argv", ["eval_acceptance.py", *map(str, given)])
        status = eval_acceptance.main()
        return status, *capsys.readouterr()

    return call


def test_greedy_figures_are_what_drafting_meets(run, chat_folders, chat_engine, tmp_path):
    status, said, complained = run(
        "--draft", chat_folders.head, "--temperature", 0, "--max-new-tokens", 40, "--json-out", tmp_path / "f.json"
    )
    assert status == 0 and complained == ""
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["answers"] == 4 and figures["target"] == "target" and str(tmp_path) not in (tmp_path / "f.json").read_text()
    assert f"acceptance {figures['acceptance']:.3f}" in said and 0 < figures["covered"] < 1 and 0 <= figures["coverage"] <= 1
    engine = chat_engine("head")
    chats = [[{"role": "user", "content": message}] for message in MESSAGES]
    made = engine.generate(chats, SamplingParams(max_new_tokens=40, draft_length=4))
    assert figures["positions"] == sum(len(result.token_ids) for result in made)
    accepted = sum(result.speculation.accepted for result in made) / sum(result.speculation.steps for result in made)
    assert figures["tokens_per_step"] == pytest.approx(1 + accepted, rel=0.15)
    engine.close()


def test_answers_at_temperature_1_are_the_seeds(run, chat_folders, tmp_path):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        status, _, _ = run(
            *("--draft", chat_folders.head, "--max-new-tokens", 12, "--repeats", 2, "--seed", seed, "--json-out", tmp_path / name)
        )
        assert status == 0
        found.append(json.loads((tmp_path / name).read_text()))
    assert found[0] == found[1] and found[0]["acceptance"] != found[2]["acceptance"] and found[0]["answers"] == 8


def test_mistakes_are_named(run, chat_folders, tmp_path, monkeypatch):
    monkeypatch.setattr("draft.pretrained.FOLDER", tmp_path / "none")
    for options, what in (
        ((), "no draft head ships"),
        (("--pair", "smollm2"), "either --pair or --target"),
        (("--draft", chat_folders.head, "--repeats", 0), "--repeats cannot be 0"),
        (("--draft", chat_folders.head, "--prompts", tmp_path / "gone.txt"), "gone.txt cannot be read"),
        (("--draft", tmp_path), "config.json"),
    ):
        status, said, complained = run(*options)
        assert status == 2 and said == "" and complained.startswith("error: ") and what in complained, complained
