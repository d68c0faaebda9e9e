"""scripts/calibrate.py: a pack within a restore budget, what it states, and options that do not fit each other."""

from __future__ import annotations

import json

import pytest

from calibrate import main


@pytest.fixture(scope="module")
def command(chat_folders, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("calibrate")
    (folder / "a.txt").write_text(
        "\n".join(f"Line {n} of a text about {n * 7919 % 1000} things and {n * 31 % 17} more." for n in range(300))
    )
    (folder / "b.txt").write_text("\n".join(f"Other words, {n * 104729 % 1000}, in another order: {n * 37 % 19}." for n in range(300)))
    return [
        *("--target", str(chat_folders.target), "--draft", str(chat_folders.draft), "--text", str(folder), "--tokens", "800"),
        *("--context", "64", "--budget", "8", "--weighting", "attention", "--level-strength", "0", "--device", "cpu", "--json"),
    ]


def test_the_best_predictor_within_a_budget_is_made_and_shown(command, tmp_path, capsys):
    out = str(tmp_path / "p")
    assert main([*command, "--restore-budget", "0.9", "--out", out]) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    restore = made["restore"]
    assert restore["restore_flops"] - restore["transform_flops"] <= 0.9 * restore["prefill_flops"] and len(made["search"]) >= 3
    assert main(["--show", out, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["restore"] == restore and shown["digest"] == made["digest"] and shown["pack_bytes"] == made["pack_bytes"]
    assert main(["--show", out]) == 0
    text = capsys.readouterr().out
    assert f"{restore['share_of_prefill']:.0%} of the target's prefill" in text and "near-lossless" in text


def test_the_curve_of_other_texts(command, tmp_path, capsys):
    for name, letters in (("a", "etaoin shrdlu "), ("b", "zqxjkv 0123456789 ")):
        (tmp_path / f"{name}.txt").write_text("".join(letters[n * n * 7919 % len(letters)] for n in range(1500)))
    curves = []
    for more in ([], ["--curve-text", str(tmp_path)]):
        assert main([*command, *more, "--rank", "8", "--out", str(tmp_path / "p")]) == 0
        curves.append(json.loads(capsys.readouterr().out.splitlines()[-1])["divergence"])
    assert curves[0] != curves[1] and all(len(curve["divergence"]) >= 2 for curve in curves)


def test_mistakes_are_named(command, tmp_path, capsys):
    (tmp_path / "no.pack").write_bytes(b"nothing")
    out = ["--out", str(tmp_path / "p")]
    cases = {
        "--out is missing": command,
        "no codec pack": ["--show", str(tmp_path / "no.pack")],
        "is no codec pack that can be read": ["--show", str(tmp_path / "missing")],
        "the cheapest takes": [*command, *out, "--restore-budget", "0.0001"],
        "a restore budget chooses taps": [*command, *out, "--restore-budget", "0.5", "--rank", "8"],
        "features and a curve of its own": [*command, *out, "--restore-budget", "0.5", "--quick"],
        "cannot be completed": [*command, *out, "--complete", str(tmp_path / "no.pack")],
        "fits no predictor": [*command, *out, "--complete", str(tmp_path / "no.pack"), "--rank", "8"],
        "how many layers are recomputed": [*command, *out, "--restore-budget", "0.5", "--recomputed-layers", "1"],
    }
    for said, arguments in cases.items():
        assert main(arguments) == 2, said
        assert said in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
