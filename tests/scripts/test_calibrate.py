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
    assert made["command"] == "python scripts/calibrate.py " + " ".join(
        word.rsplit("/", 1)[-1] for word in [*command, "--restore-budget", "0.9", "--out", out]
    )
    assert made["versions"]["torch"]
    restore = made["restore"]
    assert restore["restore_flops"] - restore["transform_flops"] <= 0.9 * restore["prefill_flops"] and len(made["search"]) >= 3
    assert main(["--show", out, "--json", "--json-out", str(tmp_path / "shown.json")]) == 0
    assert (
        json.loads((tmp_path / "shown.json").read_text())["command"] == "python scripts/calibrate.py --show p --json --json-out shown.json"
    )
    shown = json.loads(capsys.readouterr().out)
    assert shown["restore"] == restore and shown["digest"] == made["digest"] and shown["pack_bytes"] == made["pack_bytes"]
    assert main(["--show", out]) == 0
    text = capsys.readouterr().out
    assert f"{restore['share_of_prefill']:.0%} of the target's prefill" in text and "near-lossless" in text


def test_the_curve_of_other_texts(command, tmp_path, capsys):
    for name, letters in (("a", "etaoin shrdlu "), ("b", "zqxjkv 0123456789 "), ("c", "wycfgmpb ,.;")):
        (tmp_path / f"{name}.txt").write_text("".join(letters[n * n * 7919 % len(letters)] for n in range(1500)))
    curves = []
    for more in ([], ["--curve-text", str(tmp_path)], ["--curve-text", str(tmp_path), "--curve-tokens", "65"]):
        assert main([*command, *more, "--rank", "8", "--out", str(tmp_path / "p")]) == 0
        curves.append(json.loads(capsys.readouterr().out.splitlines()[-1])["divergence"])
    assert curves[0] != curves[1] != curves[2] and all(len(curve["divergence"]) >= 2 for curve in curves)


def test_long_documents_are_calibrated_on_as_well(command, tmp_path, capsys):
    for name in "ab":
        text = "".join(f"Entry {n * 7919 % 1000} of {name}: so it went on for a while. " for n in range(16))
        (tmp_path / f"{name}.txt").write_text(text)
    counts = []
    for more in ([], ["--long-text", str(tmp_path), "--long-context", "512", "--long-tokens", "1000"]):
        assert main([*command, *more, "--rank", "8", "--out", str(tmp_path / "p")]) == 0
        printed = capsys.readouterr()
        counts.append(json.loads(printed.out.splitlines()[-1])["tokens"])
        assert ("2 long documents give 1,024 tokens" in printed.err) == bool(more)
    assert counts[1] == counts[0] + 1024
    for words, said in ((("64",), "more than the 64"), (("4096",), "no file of 2048 tokens")):
        assert (
            main([*command, "--long-text", str(tmp_path), "--long-tokens", "1000", "--long-context", *words, "--out", str(tmp_path / "p")])
            == 2
        )
        assert said in capsys.readouterr().err


def test_mistakes_are_named(command, tmp_path, capsys):
    (tmp_path / "no.pack").write_bytes(b"nothing")
    out = ["--out", str(tmp_path / "p")]
    cases = {
        "of no --curve-text": [*command, *out, "--curve-tokens", "100"],
        "--out is missing": command,
        "no codec pack": ["--show", str(tmp_path / "no.pack")],
        "is no codec pack that can be read": ["--show", str(tmp_path / "missing")],
        "the cheapest takes": [*command, *out, "--restore-budget", "0.0001"],
        "a restore budget chooses taps": [*command, *out, "--restore-budget", "0.5", "--rank", "8"],
        "text, features and a curve of its own": [*command, *out, "--restore-budget", "0.5", "--quick"],
        "cannot be completed": [*command, *out, "--complete", str(tmp_path / "no.pack")],
        "fits no predictor": [*command, *out, "--complete", str(tmp_path / "no.pack"), "--rank", "8"],
        "how many layers are recomputed": [*command, *out, "--restore-budget", "0.5", "--recomputed-layers", "1"],
    }
    for said, arguments in cases.items():
        assert main(arguments) == 2, said
        assert said in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
