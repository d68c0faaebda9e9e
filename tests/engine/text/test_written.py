"""Tokenizers of folders that were written here: the same ids and texts as transformers makes of the files, which is not imported for them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from engine.hub.cache import CacheFolder
from engine.hub.gguf_tokenizer import write_tokenizer
from engine.text.prompts import special_tokens
from engine.text.remembered import RememberedTokenizer
from engine.text.tokenizer import load_tokenizer, tokenizer_fingerprint
from engine.text.written import _LATEST, NOTE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPELLING = bytes_to_unicode()
TEMPLATE = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"


def metadata(kind: str, **changes) -> dict:
    if kind == "llama":
        pieces = ["▁", "a", "b", "▁a", "ab", "▁ab"]
        tokens = ["<unk>", "<s>", "</s>", "<tool>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
        named = {"tokens": tokens, "token_type": [UNKNOWN, CONTROL, CONTROL, USER_DEFINED] + [BYTE] * 256 + [NORMAL] * len(pieces)}
        named |= {"scores": [0.0] * 260 + [-float(rank) for rank in range(len(pieces))], "unknown_token_id": 0}
    else:
        # transformers' class of Qwen2 adds <|endoftext|> where a vocabulary lacks it
        tokens = ["<unk>", "<s>", "</s>", "<tool>", *SPELLING.values(), "ab", "Ġa", "<|endoftext|>"]
        named = {"tokens": tokens, "merges": ["a b", "Ġ a"], "pre": kind}
        named["token_type"] = [CONTROL] * 3 + [USER_DEFINED] + [NORMAL] * 258 + [CONTROL]
    named |= {"model": "llama" if kind == "llama" else "gpt2", "bos_token_id": 1, "eos_token_id": 2, "chat_template": TEMPLATE} | changes
    keys = {key: f"tokenizer.{key}" if key == "chat_template" else f"tokenizer.ggml.{key}" for key in named}
    return {"general.architecture": "llama", "llama.context_length": 64} | {keys[key]: value for key, value in named.items()}


def written(folder, kind: str, model_type: str = "llama", **changes):
    folder.mkdir(exist_ok=True)
    write_tokenizer(metadata(kind, **changes), folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(
    scope="module", params=[("llama", "llama"), ("llama-bpe", "llama"), ("qwen2", "qwen2"), ("smollm", "llama")], ids=lambda p: p[0]
)
def both(request, tmp_path_factory):
    """transformers' tokenizer of a folder, and the one that was read from its files."""
    folder = written(tmp_path_factory.mktemp("written"), *request.param)
    load_tokenizer(folder, CacheFolder("tokenizers"))  # the object that the files were written from
    return AutoTokenizer.from_pretrained(str(folder)), load_tokenizer(folder, CacheFolder("tokenizers"))


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    parts=st.lists(st.sampled_from(["a", "ab", " ", "é", "漢", "\n", "12", "</s>", "<tool>", "<unk>"]), max_size=12), special=st.booleans()
)
def test_ids_and_texts_are_those_of_transformers(both, parts, special):
    theirs, ours = both
    text = "".join(parts)
    ids = theirs(text, add_special_tokens=special)["input_ids"]
    assert isinstance(ours, RememberedTokenizer) and ours(text, add_special_tokens=special)["input_ids"] == ids
    for skip in (True, False):
        options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
        assert ours.decode(ids, **options) == theirs.decode(ids, **options)


def test_facts_are_those_of_transformers(both):
    theirs, ours = both
    assert special_tokens(ours) == special_tokens(theirs) and ours.eos_token_id == theirs.eos_token_id == 2
    assert ours.special_tokens_map.items() <= {name: str(token) for name, token in theirs.special_tokens_map.items()}.items()
    assert ours.special_tokens_map["bos_token"] == "<s>" and ours.chat_template == theirs.chat_template == TEMPLATE
    assert tokenizer_fingerprint(ours) == tokenizer_fingerprint(theirs) and len(ours) == len(theirs)
    assert ours._whole is None, "all of this without transformers"
    assert ours.convert_tokens_to_ids("ab") == theirs.convert_tokens_to_ids("ab"), "and the rest by transformers"


def test_the_object_that_was_written_is_handed_over_once_and_reads_as_its_files_do(tmp_path):
    folder, cache = written(tmp_path / "own", "llama"), CacheFolder("tokenizers")
    first, second = load_tokenizer(folder, cache), load_tokenizer(folder, cache)
    assert first.backend_tokenizer is not second.backend_tokenizer
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    written(tmp_path / "one", "llama")
    for kind in ("smollm", "qwen2", "llama-bpe"):
        written(tmp_path / kind, kind)
    assert len(_LATEST) == 2, "no more objects are held than those of a target and its draft"
    assert load_tokenizer(tmp_path / "one", cache)("ab")["input_ids"] == first("ab")["input_ids"]


def test_transformers_is_not_imported(tmp_path):
    folder = written(tmp_path / "own", "qwen2", "qwen2")
    code = (
        "import sys; from pathlib import Path; from engine.hub.cache import CacheFolder; from engine.text.tokenizer import load_tokenizer\n"
        f"assert load_tokenizer(Path({str(folder)!r}), CacheFolder('tokenizers'))('ab')['input_ids'] == [260]\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize(
    "change", ["tokenizer_config.json", "chat_template.jinja", "added_tokens.json", "no note", "note of another version"]
)
def test_changed_files_are_left_to_transformers(tmp_path, change):
    folder, cache = written(tmp_path / "own", "smollm"), CacheFolder("tokenizers")
    assert isinstance(load_tokenizer(folder, cache), RememberedTokenizer)
    if change == "tokenizer_config.json":
        config = json.loads((folder / change).read_text()) | {"eos_token": "<s>"}
        (folder / change).write_text(json.dumps(config))
    elif change == "chat_template.jinja":
        (folder / change).write_text("other")
    elif change == "added_tokens.json":
        (folder / change).write_text("{}")
    elif change == "no note":
        (folder / NOTE).unlink()
    else:
        note = json.loads((folder / NOTE).read_text()) | {"version": 0}
        (folder / NOTE).write_text(json.dumps(note))
    found = load_tokenizer(folder, cache)
    assert not isinstance(found, RememberedTokenizer)
    assert found.eos_token_id == (1 if change == "tokenizer_config.json" else 2)
    assert found.chat_template == ("other" if change == "chat_template.jinja" else TEMPLATE)


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1}', "null", '{"version": 1, "files": {}, "facts": {}}', "[" * 100_000])
def test_a_damaged_note_is_left_to_transformers(tmp_path, content):
    folder = written(tmp_path / "own", "smollm")
    (folder / NOTE).write_text(content)
    assert not isinstance(load_tokenizer(folder, CacheFolder("tokenizers")), RememberedTokenizer)


@pytest.mark.parametrize("role", [{"bos_token_id": 3}, {"padding_token_id": 10}])
def test_special_tokens_that_the_file_does_not_call_special_are_left_to_transformers(tmp_path, role):
    folder = written(tmp_path / "own", "smollm", **role)
    assert not (folder / NOTE).exists()
    [token] = (metadata("smollm")["tokenizer.ggml.tokens"][number] for number in role.values())
    assert token in special_tokens(load_tokenizer(folder, CacheFolder("tokenizers")))
