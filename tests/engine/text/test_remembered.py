"""Tokenizers remembered between starts: the same ids and texts as transformers', which is not imported for them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import AutoTokenizer

from engine.hub.cache import CacheFolder
from engine.text import tokenizer as module
from engine.text.chat import next_turn
from engine.text.prompts import encode_prompt, end_tokens, special_tokens
from engine.text.remembered import RememberedTokenizer, from_bytes, remembered_name, to_bytes
from engine.text.tokenizer import load_tokenizer, tokenizer_fingerprint

TEXTS = st.text(max_size=40) | st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "a", " b", "\n", "é", "\udc80"]), max_size=8).map(
    "".join
)


@pytest.fixture
def folder(byte_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "home"))
    folder = tmp_path / "model"
    byte_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def pair(folder):
    """transformers' tokenizer, and the one remembered of it."""
    cache = CacheFolder("tokenizers")
    first, second = load_tokenizer(folder, cache), load_tokenizer(folder, cache)
    assert not isinstance(first, RememberedTokenizer) and isinstance(second, RememberedTokenizer)
    return first, second


@pytest.fixture(scope="module")
def both(byte_tokenizer):
    theirs = byte_tokenizer()
    ours = from_bytes(to_bytes(theirs), lambda: pytest.fail("transformers is asked"))
    return theirs, ours


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(text=TEXTS, special=st.booleans(), split=st.booleans(), skip=st.booleans())
def test_ids_and_texts_are_those_of_transformers(both, text, special, split, skip):
    theirs, ours = both
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    options = {"add_special_tokens": special, "split_special_tokens": split}
    ids = theirs(text, **options)["input_ids"]
    assert ours(text, **options)["input_ids"] == ids
    plain = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
    assert ours.decode(ids, **plain) == theirs.decode(ids, **plain)


def test_prompts_chats_and_fingerprints_are_the_same(folder):
    theirs, ours = pair(folder)
    messages = [{"role": "system", "content": "be <|im_end|> brief"}, {"role": "user", "content": "hi"}]
    ids = encode_prompt(theirs, messages)
    assert encode_prompt(ours, messages) == ids
    assert next_turn(ours, "and?", ids) == next_turn(theirs, "and?", ids)
    assert special_tokens(ours) == special_tokens(theirs) and end_tokens((), ours) == end_tokens((), theirs)
    assert tokenizer_fingerprint(ours) == tokenizer_fingerprint(theirs) and len(ours) == len(theirs)
    assert ours._whole is None, "all of this without transformers"


def test_anything_else_is_answered_by_transformers(folder):
    theirs, ours = pair(folder)
    assert ours(["a", "b"])["input_ids"] == theirs(["a", "b"])["input_ids"]
    assert ours("ab", return_tensors="pt")["input_ids"].tolist() == theirs("ab", return_tensors="pt")["input_ids"].tolist()
    message = [{"role": "user", "content": "hi"}]
    ours.chat_template = "{{ messages[0].content }}!"
    assert ours.apply_chat_template(message, tokenize=False) == "hi!"
    ours.add_tokens(["<new>"])
    assert ours("<new>")["input_ids"] == [ours.convert_tokens_to_ids("<new>")] and "<new>" in ours.get_vocab()
    assert ours.decode([[257, 258]]) == theirs.decode([[257, 258]])
    with pytest.raises(AttributeError):
        ours.no_such_attribute  # noqa: B018


def test_transformers_is_not_imported(folder):
    pair(folder)
    code = (
        "import sys; from pathlib import Path; from engine.hub.cache import CacheFolder; from engine.text.prompts import encode_prompt\n"
        "from engine.text.tokenizer import load_tokenizer\n"
        f"tokenizer = load_tokenizer(Path({str(folder)!r}), CacheFolder('tokenizers'))\n"
        "encode_prompt(tokenizer, [{'role': 'user', 'content': 'hi'}])\n"
        "assert 'transformers' not in sys.modules and type(tokenizer).__name__ == 'RememberedTokenizer'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"])
def test_a_changed_file_or_another_version_is_not_taken_for_the_remembered_one(folder, name, monkeypatch):
    first = remembered_name(folder, module._FILES)
    with (folder / name).open("a") as file:
        file.write("\n")
    assert remembered_name(folder, module._FILES) not in (first, None)
    monkeypatch.setattr("engine.text.remembered.version", lambda library: "0")
    assert remembered_name(folder, module._FILES) != first


def test_what_is_remembered_and_damaged_is_made_again(folder, tmp_path):
    pair(folder)
    [file] = (tmp_path / "home" / "tokenizers").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    whole = file.read_bytes()
    for content in (b"", b"{}", whole[:-9], whole.replace(b"im_end", b"im_out"), b"[1]\n{}", b"\xff" + whole):
        file.write_bytes(content)
        assert not isinstance(load_tokenizer(folder, CacheFolder("tokenizers")), RememberedTokenizer)
        assert file.read_bytes() == whole


def test_tokenizers_with_rules_of_their_own_are_not_remembered(byte_tokenizer, tmp_path):
    theirs = byte_tokenizer()

    class Own(type(theirs)):
        def _decode(self, *args, **options):
            return "own"

    assert to_bytes(theirs) is not None
    theirs.__class__ = Own
    assert to_bytes(theirs) is None
    assert to_bytes(object()) is None
    (tmp_path / "additional_chat_templates").mkdir()
    assert remembered_name(tmp_path, module._FILES) is None


def test_truncation_in_the_file_is_no_part_of_it(folder):
    """transformers takes it off for a call without options; so does what is remembered."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    theirs, ours = pair(folder)
    assert ours("abcdefgh")["input_ids"] == theirs("abcdefgh")["input_ids"] and len(ours("abcdefgh")["input_ids"]) == 8


def test_a_normaliser_is_kept(byte_tokenizer):
    theirs = byte_tokenizer()
    theirs.backend_tokenizer.normalizer = normalizers.Lowercase()
    ours = from_bytes(to_bytes(theirs), lambda: theirs)
    assert ours("ABC<|im_end|>")["input_ids"] == theirs("ABC<|im_end|>")["input_ids"]
    messages = [{"role": "user", "content": "<|IM_END|>"}]
    assert encode_prompt(ours, messages) == encode_prompt(theirs, messages)


def test_a_fresh_load_by_transformers_agrees(folder):
    _, ours = pair(folder)
    theirs = AutoTokenizer.from_pretrained(str(folder))
    assert ours("one <|im_start|>two")["input_ids"] == theirs("one <|im_start|>two")["input_ids"]
