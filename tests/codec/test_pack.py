"""Codec packs: saving changes nothing, damage and strangers are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from codec.codec import KvCodec
from codec.errors import CodecError, CorruptedCode, ForeignCode, NewerCode, PackMismatch
from codec.pack import CodecPack
from codec.rows import ENERGY_LOST, ROW_BITS, allocate_bits, dequantise_rows, quantise_rows, row_bytes


@pytest.mark.parametrize("kind", ["global", "per_layer"])
def test_a_loaded_pack_decodes_what_the_saved_one_wrote(tmp_path: Path, make_source, make_pack, kind: str) -> None:
    source = make_source(4)
    pack = make_pack(source, kind, room=0.7)
    pack.save(tmp_path / "a.pack")
    loaded = CodecPack.load(tmp_path / "a.pack")
    rows = source.draw(40)
    zero = torch.zeros_like(rows)
    assert loaded.digest == pack.digest and loaded.layout == pack.layout and loaded.predictor_settings == {"taps": [1]}
    assert (tmp_path / "a.pack").stat().st_size == pytest.approx(pack.nbytes, abs=4000)
    span = KvCodec(pack).encode(rows, zero, "balanced")
    assert KvCodec(loaded).encode(rows, zero, "balanced") == span
    assert torch.equal(KvCodec(loaded).decode(span, zero), KvCodec(pack).decode(span, zero))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pack"]


def test_fingerprints(pack: CodecPack) -> None:
    pack.check({"target": "t", "draft": "d"})
    with pytest.raises(PackMismatch, match="draft"):
        pack.check({"target": "t", "draft": "other"})
    with pytest.raises(PackMismatch, match="tokenizer"):
        pack.check({"tokenizer": "x"})


def test_damage(tmp_path: Path, pack: CodecPack) -> None:
    path = tmp_path / "a.pack"
    pack.save(path)
    data = path.read_bytes()
    for at in range(200, len(data), len(data) // 40):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(CodecError):
            CodecPack.load(path)
    for size in (0, 4, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CorruptedCode):
            CodecPack.load(path)
    with pytest.raises(FileNotFoundError):
        CodecPack.load(tmp_path / "none")


def test_foreign_and_newer(tmp_path: Path, pack: CodecPack) -> None:
    save_file({"x": torch.zeros(3)}, tmp_path / "other")
    with pytest.raises(ForeignCode):
        CodecPack.load(tmp_path / "other")
    pack.save(tmp_path / "a.pack")
    meta = {"kind": "foretold-codec-pack", "version": 99}
    save_file(load_file(tmp_path / "a.pack"), tmp_path / "new", {"foretold": json.dumps(meta), "digest": ""})
    with pytest.raises(NewerCode, match="99"):
        CodecPack.load(tmp_path / "new")


@pytest.mark.parametrize("bits", ROW_BITS)
@pytest.mark.parametrize("columns", [1, 64, 65, 300])
def test_rows(bits: int, columns: int) -> None:
    x = torch.randn(40, columns, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 40)[:, None]
    x[7] = 0
    parts = quantise_rows(x, bits)
    back = dequantise_rows(parts, columns)
    assert sum(t.numel() * t.element_size() for t in parts.values()) == 40 * row_bytes(columns, bits)
    torch.testing.assert_close(back.norm(dim=1)[x.norm(dim=1) > 0], x.norm(dim=1)[x.norm(dim=1) > 0], rtol=1e-3, atol=0)
    cosine = (back * x).sum(1)[x.norm(dim=1) > 0] / x.pow(2).sum(1)[x.norm(dim=1) > 0]
    assert float((1 - cosine**2).mean()) < 1.3 * ENERGY_LOST[bits], "energy turned away"


@pytest.mark.parametrize("columns", [1, 63, 64, 200])
@pytest.mark.parametrize("bits", ROW_BITS)
def test_rows_are_the_same_in_blocks(bits: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = quantise_rows(torch.randn(23, columns, generator=torch.Generator().manual_seed(columns)), bits)
    made = []
    for numbers in (1, 5 * columns, 1 << 17):
        monkeypatch.setattr("codec.rows._CACHED_NUMBERS", numbers)
        made.append(dequantise_rows(parts, columns))
    assert torch.equal(made[0], made[2]) and torch.equal(made[1], made[2]) and bool(made[2].any())


def test_rows_of_uneven_size_keep_their_small_parts() -> None:
    """A component may live in one layer: numbers there are hundreds of times those elsewhere, and each group has its own step."""
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(1))
    x[:, 64:] *= 0.003
    back = dequantise_rows(quantise_rows(x, 4), 512)
    assert float((back - x)[:, 64:].pow(2).sum() / x[:, 64:].pow(2).sum()) < 0.03


def test_row_bits_follow_the_room() -> None:
    variance = [100 * 0.97**n for n in range(600)]
    whole = allocate_bits(variance, 512, 1e9, 0.6)
    assert set(whole) == {8}
    assert 0.8 < variance[len(whole)] / (0.6**2 / 12) <= 1.02, "rows go down to the quantiser's own error, and no further"
    for share in (0.8, 0.5, 0.3):
        room = share * len(whole) * row_bytes(512, 8)
        bits = allocate_bits(variance, 512, room, 0.6)
        assert bits == sorted(bits, reverse=True) and 0.9 * room < sum(row_bytes(512, b) for b in bits) <= room
    assert 0 < len(bits) < len(whole) and len(set(bits)) > 1
    assert allocate_bits(variance, 512, 10, 0.6) == []


def test_figures_measured_later_change_no_digest_and_are_checked(completed_pack, tmp_path) -> None:
    curve = {"distortion": [0.1, 0.2], "divergence": [0.01, 0.03], "rounding": 0.002}
    later = completed_pack.with_later({"divergence": curve})
    later.save(tmp_path / "a.pack")
    loaded = CodecPack.load(tmp_path / "a.pack")
    assert loaded.digest == completed_pack.digest and loaded.later == {"divergence": curve} and loaded.info == completed_pack.info
    assert loaded.curve is not None and loaded.curve.rounding == 0.002
    with safe_open(tmp_path / "a.pack", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "a.pack")
    for name, text in (("later", json.dumps({"divergence": None})), ("later", "[" * 9), ("later", "[]"), ("later_digest", "")):
        save_file(tensors, tmp_path / "b.pack", metadata | {name: text})
        with pytest.raises(CorruptedCode):
            CodecPack.load(tmp_path / "b.pack")


def test_figures_measured_later_stay_unless_they_are_stated_anew(pack, completed_pack) -> None:
    curve = {"distortion": [0.1, 0.2], "divergence": [0.01, 0.03], "rounding": 0.002}
    later = completed_pack.with_info({"tokens": 5}).with_later({"divergence": curve, "restore": 1})
    fallback = completed_pack.transform.fallback
    assert fallback is not None
    others = {
        "figures": later.with_info({"tokens": 6}),
        "tables": later.with_model(pack.model),
        "basis": later.with_fallback(fallback, later.transform.variance, later.model),
    }
    for what, other in others.items():
        assert other.later == later.later and other.curve == later.curve is not None, what
    assert others["figures"].figures["tokens"] == 6 and later.info["tokens"] == 5
    anew = later.with_info({"divergence": None, "restore": 2})
    assert anew.curve is None and anew.figures["restore"] == 2, "figures of before do not hide those of the pack as it is now"
    assert later.curve is not None
