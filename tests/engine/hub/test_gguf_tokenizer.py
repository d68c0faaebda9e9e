"""Tokenizers from GGUF metadata: SentencePiece's BPE against its definition, Llama 3's splitting and first token, and what is no vocabulary."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from engine.errors import ForetoldError, ModelNotFound, UnsupportedArchitecture
from engine.hub.gguf_tokenizer import end_token_ids, write_tokenizer
from engine.text.tokenizer import load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
PIECES = ["▁", "a", "b", "c", "é", "▁a", "ab", "bc", "abc", "▁ab", "aa", "aaa", "▁b", "aab", "ca"]  # best score first
SPECIAL = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), ("<tool>", USER_DEFINED), ("<row9>", UNUSED)]


def sentencepiece(space_prefix: bool, **changes) -> dict:
    tokens = [name for name, _ in SPECIAL] + [f"<0x{byte:02X}>" for byte in range(256)] + PIECES
    kinds = [kind for _, kind in SPECIAL] + [BYTE] * 256 + [NORMAL] * len(PIECES)
    scores = [0.0] * (len(SPECIAL) + 256) + [-float(rank) for rank in range(len(PIECES))]
    named = {"model": "llama", "tokens": tokens, "token_type": kinds, "scores": scores, "add_space_prefix": space_prefix}
    named |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} | changes
    return {"general.architecture": "llama", "llama.context_length": 64} | {f"tokenizer.ggml.{key}": value for key, value in named.items()}


def by_definition(metadata: dict, text: str) -> list[int]:
    """SentencePiece's encoding of a text without special tokens: join the neighbours whose join has the best score, the leftmost of equals."""
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    symbols = list(("▁" if metadata["tokenizer.ggml.add_space_prefix"] and text else "") + text.replace(" ", "▁"))
    while True:
        joins = [(PIECES.index(a + b), i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in PIECES]
        if not joins:
            break
        _, i = min(joins)
        symbols[i : i + 2] = ["".join(symbols[i : i + 2])]
    found: list[int] = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in PIECES else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


@pytest.fixture(scope="module", params=[True, False], ids=["space prefix", "no space prefix"])
def pieces(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    metadata = sentencepiece(request.param)
    write_tokenizer(metadata, folder)
    return metadata, load_tokenizer(folder)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(text=st.text(st.sampled_from("aaabc é漢\n"), max_size=30))
def test_sentencepiece_ids_are_those_of_its_definition(pieces, text):
    metadata, tokenizer = pieces
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == by_definition(metadata, text)
    assert tokenizer(text)["input_ids"] == [1, *by_definition(metadata, text)]
    assert tokenizer.decode(by_definition(metadata, text)) == text


def test_special_tokens_of_sentencepiece(pieces):
    metadata, tokenizer = pieces
    prefix = metadata["tokenizer.ggml.add_space_prefix"]
    assert tokenizer("<tool>ab</s>", add_special_tokens=False)["input_ids"] == [3, *by_definition(metadata, "ab"), 2]
    assert tokenizer.tokenize("ab") == ["▁ab" if prefix else "ab"]
    assert set(tokenizer.all_special_tokens) == {"<unk>", "<s>", "</s>"} and "<row9>" not in tokenizer.get_vocab()
    assert end_token_ids(metadata) == [2] and end_token_ids(metadata | {"tokenizer.ggml.eot_token_id": 3}) == [2, 3]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"scores": None}, ModelNotFound),
        ({"scores": [0.0]}, ModelNotFound),
        ({"scores": [float("nan")] * (len(SPECIAL) + 256 + len(PIECES))}, ModelNotFound),
        ({"unknown_token_id": 10**6}, ModelNotFound),
        ({"bos_token_id": None}, ModelNotFound),
        ({"add_bos_token": "yes"}, ModelNotFound),
        ({"add_eos_token": True}, UnsupportedArchitecture),
        ({"model": "bert"}, UnsupportedArchitecture),
    ],
)
def test_bad_sentencepiece_metadata_is_named(tmp_path, changes, error):
    with pytest.raises(error):
        write_tokenizer(sentencepiece(True, **changes), tmp_path)


def test_pieces_too_long_to_be_cut_everywhere_are_named(tmp_path):
    metadata = sentencepiece(True)
    metadata["tokenizer.ggml.tokens"][-1] = "a" * 1_000_000
    with pytest.raises(ModelNotFound, match="too long"):
        write_tokenizer(metadata, tmp_path)


@settings(max_examples=100, deadline=10_000, derandomize=True, database=None)
@given(
    st.dictionaries(
        st.sampled_from(
            ["tokens", "scores", "token_type", "unknown_token_id", "bos_token_id", "eos_token_id", "add_space_prefix", "model", "pre"]
        ),
        st.none()
        | st.integers(-3, 300)
        | st.booleans()
        | st.text(max_size=3)
        | st.lists(st.text(max_size=2) | st.floats() | st.integers(0, 7), max_size=4),
        max_size=3,
    )
)
def test_any_metadata_makes_a_tokenizer_or_is_named(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("any")
    try:
        metadata = sentencepiece(True, **changes)
        write_tokenizer(metadata, folder)
        end_token_ids(metadata)
    except ForetoldError:
        return
    Tokenizer.from_file(str(folder / "tokenizer.json")).encode("ab")


def test_llama_3_takes_three_digits_whole_tokens_and_a_first_token(tmp_path):
    spelling = bytes_to_unicode()
    tokens = [*(spelling[byte] for byte in range(256)), "12", "123", "xyz", "<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"]
    named = {"model": "gpt2", "pre": "llama-bpe", "tokens": tokens, "token_type": [NORMAL] * 259 + [CONTROL] * 3, "merges": ["1 2", "12 3"]}
    named |= {"bos_token_id": 259, "eos_token_id": 261}
    metadata = {"general.architecture": "llama", "llama.context_length": 64} | {
        f"tokenizer.ggml.{key}": value for key, value in named.items()
    }
    write_tokenizer(metadata, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    # "xyz" has no merges: a word that is a token is taken whole
    assert tokenizer.tokenize("1234 xyzA") == ["123", "4", "Ġ", "x", "y", "z", "A"] and tokenizer.tokenize("xyz") == ["xyz"]
    assert tokenizer("1")["input_ids"] == [259, 49] and tokenizer("1", add_special_tokens=False)["input_ids"] == [49]
    assert end_token_ids(metadata) == [261, 260]
