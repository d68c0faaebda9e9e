"""Calibration text in given shares, and the calibration command's mistakes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import calibrate
from engine.errors import InvalidOption
from text_mix import mixed_documents, pieces, shares_of


class Letters:
    """A tokenizer: a token a character."""

    def encode(self, text: str, **_: object) -> list[int]:
        return [ord(letter) for letter in text]


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    for name, letter, lines in (("many", "a", 100), ("few", "b", 100), ("short", "c", 12)):
        (tmp_path / name).mkdir()
        for n in range(2):
            (tmp_path / name / f"{n}.txt").write_text("".join(f"{letter * 30}{n}{i % 10}\n" for i in range(lines)))
    return [str(tmp_path / name) for name in ("many", "few", "short")]


def test_every_source_gives_its_share(sources: list[str]) -> None:
    said: list[str] = []
    docs, digest = mixed_documents(sources, [0.6, 0.2, 0.2], Letters(), 5000, 64, 0, said.append)
    tokens = {letter: sum(len(d) for d in docs if chr(d[0]) in (letter, "0", "1", "\n") and ord(letter) in d) for letter in "abc"}
    assert 3000 <= tokens["a"] < 3600 and 1000 <= tokens["b"] < 1600
    assert 500 < tokens["c"] < 1000 and "of the 1,000 asked for" in said[2] and "asked" not in said[0], "the short source gives what it has"
    kinds = ["a" if ord("a") in d else "-" for d in docs]
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True), "the sources alternate"
    assert mixed_documents(sources, [0.6, 0.2, 0.2], Letters(), 5000, 64, 0, said.append) == (docs, digest)
    assert mixed_documents(sources, [0.2, 0.6, 0.2], Letters(), 5000, 64, 0, said.append)[1] != digest


def test_pieces_lose_nothing(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("".join(f"line {n}\n" for n in range(200)) + "an end without a line's end")
    found = list(pieces([tmp_path / "text"], 100, 3))
    assert all(len(piece) < 110 for piece in found) and len(found) > 10
    assert sorted(line for piece in found for line in piece.splitlines()) == sorted((tmp_path / "text").read_text().splitlines())


def test_shares() -> None:
    assert shares_of("equal", ["x", "y"]) == [0.5, 0.5] and shares_of("3,1", ["x", "y"]) == [0.75, 0.25]
    for words in ("1", "1,2,3", "1,0", "1,-1", "1,much", "1,nan", "1,inf", ""):
        with pytest.raises(InvalidOption, match="--mix"):
            shares_of(words, ["x", "y"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pair", "smollm2", "--out", "p", "--tokens", "many"], "--tokens"),
        (["--pair", "smollm2"], "--out"),
        (["--pair", "nothing", "--out", "p"], "--pair"),
        (["--pair", "smollm2", "--target", "x", "--out", "p"], "not both"),
        (["--pair", "smollm2", "--out", "p", "--mix", "equal"], "--text"),
        (["--pair", "smollm2", "--out", "p", "--text", "a", "b", "--mix", "1"], "--mix"),
    ],
)
def test_mistakes_end_with_one_line(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["calibrate.py", *arguments])
    assert calibrate.main() == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]
