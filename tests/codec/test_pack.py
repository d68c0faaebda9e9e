"""Codec packs: saving changes nothing, damage and strangers are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from codec.codec import KvCodec
from codec.errors import CodecError, CorruptedCode, ForeignCode, NewerCode, PackMismatch
from codec.pack import CodecPack
from codec.rows import dequantise_rows, quantise_rows


@pytest.mark.parametrize("kind", ["global", "per_layer"])
def test_a_loaded_pack_decodes_what_the_saved_one_wrote(tmp_path: Path, make_source, make_pack, kind: str) -> None:
    source = make_source(4)
    pack = make_pack(source, kind, coarse_from=50)
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


@pytest.mark.parametrize("bits,bound", [(8, 2e-4), (4, 2.5e-2)])
@pytest.mark.parametrize("columns", [64, 65])
def test_rows(bits: int, bound: float, columns: int) -> None:
    x = torch.randn(30, columns, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 30)[:, None]
    codes, scale = quantise_rows(x, bits)
    back = dequantise_rows(codes, scale, columns)
    assert codes.numel() <= 30 * (columns + 1) * bits / 8
    relative = (back - x).pow(2).sum(1) / x.pow(2).sum(1)
    assert float(relative.mean()) < bound
