"""scripts/bench_codec.py from end to end on a two-layer random model: rows of the contract, resuming, stale rows, bad input, the picture."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

KEYS = {
    "method",
    "quality",
    "bits_per_element",
    "ideal_bits_per_element",
    "kl",
    "nll",
    "nll_untouched",
    "top1_agreement",
    "encode_tokens_per_s",
    "decode_tokens_per_s",
}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return importlib.import_module("bench_codec")


class Words:
    """A tokenizer: a token a word, by a stable hash."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [sum(map(ord, word)) % 96 for word in text.split()]}


@pytest.fixture
def tiny(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a small run whose target is a random decoder."""
    from transformers import LlamaConfig

    from engine.model.config import DecoderConfig
    from engine.model.decoder import Decoder

    config = DecoderConfig.from_hf(
        LlamaConfig(
            num_hidden_layers=3,
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=96,
            vocab_size=96,
            max_position_embeddings=512,
            tie_word_embeddings=False,
        )
    )
    target = Decoder.from_config(config, dtype=torch.float32, seed=0)
    monkeypatch.setattr(bench.Decoder, "from_pretrained", classmethod(lambda cls, path, **_: target))
    monkeypatch.setattr(bench, "resolve_model", Path)
    monkeypatch.setattr(bench, "load_tokenizer", lambda path: Words())
    generator = torch.Generator().manual_seed(0)
    for name, words in (("test.txt", 300), ("calibration.txt", 1200)):
        numbers = torch.randint(0, 500, (words,), generator=generator).tolist()
        (tmp_path / name).write_text(" ".join(f"w{n}" for n in numbers))
    return [
        "--target",
        "tiny",
        "--text",
        str(tmp_path / "test.txt"),
        "--calibration-text",
        str(tmp_path / "calibration.txt"),
        "--tokens",
        "256",
        "--calibration-tokens",
        "1152",
        "--context",
        "64",
        "--device",
        "cpu",
        "--json-out",
        str(tmp_path / "out.json"),
    ]


def read(arguments: list[str]) -> dict[str, Any]:
    return json.loads(Path(arguments[-1]).read_text())


def test_rows_resume_and_picture(bench: ModuleType, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(tiny[-1])
    methods = ["bf16+zstd", "fp8", "turboquant-mean", "kvtc-2bit"]
    assert bench.main([*tiny, "--methods", ",".join(methods)]) == 0
    document = read(tiny)
    rows = {(r["method"], r["quality"]): r for r in document["rows"]}
    assert len(rows) == 7 and all(row.keys() >= KEYS for row in rows.values())
    assert {"pair", "context", "versions", "rows"} <= document.keys()
    exact, coarse = rows["bf16+zstd", ""], rows["turboquant-mean", "2bit"]
    assert abs(exact["kl"]) < 1e-6 and exact["top1_agreement"] > 0.97 and exact["kl"] < rows["turboquant-mean", "3bit"]["kl"] < coarse["kl"]
    assert exact["nll_untouched"] == coarse["nll_untouched"] == pytest.approx(exact["nll"], abs=0.01)
    # 48 of 64 tokens replaced: 4 exact, 44 at 2 bits and a 16-bit norm for 16 channels; headers below 64 bytes a sequence
    headers = coarse["bits_per_element"] - (4 * 16 + 44 * 3) / 48
    assert 0 < headers < 64 * 8 / (48 * 192)
    assert coarse["sink_bits_per_element"] == pytest.approx(4 * 16 / 48)

    picture = out.with_suffix(".png")
    capsys.readouterr()
    assert bench.main([*tiny, "--methods", "fp8,turboquant-mean-2bit,aqua-kv", "--plot", str(picture)]) == 0
    assert capsys.readouterr().err.count("kept from") == 2
    after = {(r["method"], r["quality"]): r for r in read(tiny)["rows"]}
    assert after["fp8", ""] == rows["fp8", ""] and len(after) == 10
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 20_000


def test_our_own_codec(bench: ModuleType, tiny: list[str], tmp_path: Path) -> None:
    """A pack calibrated on other tokens, with the first layer recomputed: its KV is neither coded nor changed."""
    from engine.calibrate.recipe import CalibrationOptions, calibrate

    target = bench.Decoder.from_pretrained("tiny")
    docs = torch.randint(0, 96, (24, 128), generator=torch.Generator().manual_seed(3)).tolist()
    options = CalibrationOptions(context=128, rank=24, held_out_tokens=512, budget=10.0)
    pack = calibrate(target, None, docs, recomputed_layers=1, options=options, fingerprints={}, log=lambda _: None)
    pack.save(tmp_path / "tiny.pack")
    pack_option = ["--pack", str(tmp_path / "tiny.pack")]
    qualities = "foretold-near-lossless,foretold-tiny"
    assert bench.main([*tiny, "--methods", qualities, *pack_option, "--breakdown"]) == 2  # a span of a quality has settings of its own
    assert bench.main([*tiny, "--methods", qualities, *pack_option]) == 0
    named = {r["quality"]: r for r in read(tiny)["rows"] if r["method"] == "foretold"}
    assert named["near-lossless"]["kl"] < 0.005 and named["tiny"]["kl"] < 0.025
    assert named["near-lossless"]["bits_per_element"] >= named["tiny"]["bits_per_element"]
    assert bench.main([*tiny, "--methods", "foretold-step0.1,foretold-step2.0,foretold-nopred-step2.0", *pack_option, "--breakdown"]) == 0
    rows = {(r["method"], r["quality"]): r for r in read(tiny)["rows"] if r["quality"].startswith("step")}
    fine, coarse = rows["foretold", "step0.1"], rows["foretold", "step2.0"]
    assert fine["kl"] < coarse["kl"] and fine["bits_per_element"] > coarse["bits_per_element"]
    assert coarse["bits_per_element"] < rows["foretold-nopred", "step2.0"]["bits_per_element"]
    for row in rows.values():
        assert row["sink_bits_per_element"] == 0  # run again at a resume, not stored
        assert row["ideal_bits_per_element"] < row["bits_per_element"]
        assert row["inputs"] == pack.digest[:16]
        parts, elements = row["breakdown"], row["tokens"] * 3 * 64
        assert sum(parts["bytes"].values()) * 8 == pytest.approx(row["bits_per_element"] * elements) and min(parts["bytes"].values()) >= 0
        by_component = sum(c["bits"] for c in parts["components"].values())
        assert by_component == pytest.approx(sum(map(sum, parts["layers"])), rel=1e-3)
        ideal = row["ideal_bits_per_element"] * elements
        assert 0.8 * ideal < by_component <= ideal, "what is missing are the tokens' gains"
        assert len(parts["layers"]) == 2 and parts["tokens"] == 4 * 44


def test_comparisons_interpolate_and_never_extrapolate() -> None:
    from codec_compare import bits_at, comparisons

    points = [(0.01, 0.4), (0.04, 0.1), (0.02, 0.9)]  # the last is beaten in both
    assert bits_at(points, 0.02) == pytest.approx(0.2) and bits_at(points, 0.01) == pytest.approx(0.4)
    assert bits_at(points, 0.009) is None and bits_at(points, 0.041) is None
    rows = [
        {"method": m, "kl": kl, "bits_per_element": bits, "sink_bits_per_element": sink}
        for m, kl, bits, sink in (
            ("foretold", 0.01, 0.1, 0.0),
            ("foretold", 0.04, 0.025, 0.0),
            ("fp8", 0.02, 8.0, 1.0),
            ("kvtc", 0.01, 0.5, 0.1),
            ("kvtc", 0.04, 0.2, 0.1),
        )
    ]
    found = {one["method"]: one for one in comparisons(rows, (0.02,))}
    assert found["kvtc"]["times_smaller"] == pytest.approx((0.5 * 0.2) ** 0.5 / 0.05)
    assert found["kvtc"]["times_smaller_without_sinks"] == pytest.approx((0.4 * 0.1) ** 0.5 / 0.05)
    assert found["fp8"]["times_smaller"] is None and comparisons(rows[2:], (0.02,)) == []


def test_runs_side_by_side_are_joined(bench: ModuleType, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare = importlib.import_module("codec_compare")
    files = [str(tmp_path / name) for name in ("a.json", "b.json", "c.json")]
    assert bench.main([*tiny[:-1], files[0], "--methods", "fp8"]) == 0
    assert bench.main([*tiny[:-1], files[1], "--methods", "fp8,turboquant-2bit"]) == 0
    assert compare.main([*files[:2], "--json-out", files[2], "--plot", str(tmp_path / "c.png")]) == 0
    joined = json.loads(Path(files[2]).read_text())
    assert [r["method"] for r in joined["rows"]] == ["fp8", "turboquant"] and (tmp_path / "c.png").stat().st_size > 10_000
    assert bench.main([*tiny[:-1], files[1], "--methods", "fp8", "--context", "128", "--restart"]) == 0
    capsys.readouterr()
    assert compare.main(files[:2]) == 2 and "other settings" in capsys.readouterr().err
    assert compare.main([str(tmp_path / "nothing.json")]) == 2


def test_other_calibration_replaces_only_fitted_rows(bench: ModuleType, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*tiny, "--methods", "fp8,aqua-kv-2bit"]) == 0
    changed = [a if a != "1152" else "640" for a in tiny]
    capsys.readouterr()
    assert bench.main([*changed, "--methods", "fp8,aqua-kv-2bit"]) == 0
    assert capsys.readouterr().err.count("kept from") == 1
    assert len(read(tiny)["rows"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--methods", "gzip"], "unknown method"),
        (["--methods", "foretold"], "needs? a codec pack"),
        (["--methods", "foretold-best"], "unknown quality"),
        (["--methods", "fp8", "--context", "8"], "context"),
        (["--methods", "fp8", "--text", "/nowhere"], "no text"),
        (["--methods", "fp8", "--tokens", "10"], "less than one window"),
        (["--methods", "fp8", "--context", "512", "--tokens", "512"], "no file"),
    ],
)
def test_mistakes_end_with_one_line(
    bench: ModuleType, tiny: list[str], change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert bench.main([*tiny, *change]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and re.search(message, lines[0])
    assert not Path(tiny[-1]).exists()


def test_rows_of_another_run_are_not_mixed(bench: ModuleType, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*tiny, "--methods", "fp8"]) == 0
    capsys.readouterr()
    assert bench.main([*tiny, "--methods", "fp8", "--context", "128"]) == 2
    assert "context" in capsys.readouterr().err
    assert bench.main([*tiny, "--methods", "fp8", "--context", "128", "--restart"]) == 0
    assert read(tiny)["context"] == 128
    Path(tiny[-1]).write_text("{}")
    assert bench.main([*tiny, "--methods", "fp8"]) == 2


def test_test_and_calibration_text_never_meet(bench: ModuleType, tmp_path: Path) -> None:
    from engine.errors import InvalidOption
    from eval.text_tokens import split_tokens

    for n in range(40):
        (tmp_path / f"{n}.txt").write_text(" ".join(f"{n}x{i}" for i in range(64)))
    ids: dict[str, int] = {}

    def encode(text: str) -> list[int]:
        return [ids.setdefault(word, len(ids)) for word in text.split()]

    split = split_tokens([str(tmp_path)], [], 32, 10_000, 10_000, encode)
    assert len(split.test) + len(split.calibration) == 80 and 4 <= len(split.test) <= 40
    assert not {t for w in split.test for t in w} & {t for w in split.calibration for t in w}
    alone = split_tokens([str(tmp_path / "1.txt")], [], 16, 10_000, 10_000, encode)
    assert (len(alone.test), len(alone.calibration)) == (1, 3)
    with pytest.raises(InvalidOption, match="both"):
        split_tokens([str(tmp_path / "1.txt")], [str(tmp_path)], 16, 100, 100, encode)
