"""The tokenizer of a GGUF file as ordinary Hugging Face tokenizer files.

Written from the file's vocabulary and merges directly, so that the result is the same with every version of transformers
(fingerprints include it).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import ModelNotFound, UnsupportedArchitecture
from engine.inputs import Fields, is_whole, named_errors, shown

_AGAIN = "fetch the file again, or use the model's Hugging Face folder"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

# Qwen2's published splitting rule: contractions, words with one leading mark, single digits, punctuation runs, line ends, spaces
_QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Args:
        metadata: of the GGUF file; byte-level BPE with the `smollm` or `qwen2` splitting rule.
        folder: existing folder to write into.

    Raises:
        UnsupportedArchitecture: another tokenizer model or splitting rule.
        ModelNotFound: a list or an id is missing, of another type, or does not fit the others.
    """
    tokens, kinds = _vocabulary(metadata)
    merges: list[tuple[str, str]] = []
    for merge in _strings(metadata, "tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise ModelNotFound(f"the GGUF file has the merge {shown(merge)}, which is not of two tokens", _AGAIN)
        merges.append((left, right))
    # padding rows of the embedding matrix have names but are no tokens: text must never contain them
    vocabulary = {token: index for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != _UNUSED}

    with named_errors(ModelNotFound, "the GGUF file's vocabulary and merges make no tokenizer", _AGAIN):
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.decoder = decoders.ByteLevel()
    _set_splitting(tokenizer, metadata)
    for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == _CONTROL)])
            if tokenizer.token_to_id(token) != index:
                raise UnsupportedArchitecture(f"the vocabulary holds {token!r} twice", "use the model's Hugging Face folder")
    tokenizer.save(str(folder / "tokenizer.json"))

    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": Fields(metadata, "the GGUF file", ModelNotFound, _AGAIN).integer(
            f"{metadata.get('general.architecture')}.context_length", 1, 1 << 31
        ),
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        name = f"tokenizer.ggml.{key}_token_id"
        if metadata.get(name) is not None:
            token_id = Fields(metadata, "the GGUF file", ModelNotFound, _AGAIN).integer(name, 0, len(tokens) - 1)
            config[f"{role}_token"] = tokens[token_id]
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        if not isinstance(template, str):
            raise ModelNotFound(f"the GGUF file has the chat template {shown(template)}", _AGAIN)
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def end_token_ids(metadata: dict[str, Any]) -> list[int]:
    """Ids that end a text: the file's end token, then `<|endoftext|>` where that is another control token."""
    tokens, kinds = _vocabulary(metadata)
    ends = [Fields(metadata, "the GGUF file", ModelNotFound, _AGAIN).integer("tokenizer.ggml.eos_token_id", 0, len(tokens) - 1)]
    ends += [i for i, token in enumerate(tokens) if token == "<|endoftext|>" and kinds[i] == _CONTROL and i not in ends]
    return ends


def _vocabulary(metadata: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Tokens and their kinds, one of each an id. Raises ModelNotFound when they do not fit each other."""
    tokens, kinds = _strings(metadata, "tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, list) or len(kinds) != len(tokens) or not all(is_whole(kind) for kind in kinds):
        raise ModelNotFound("the GGUF file does not name a kind for each of its tokens", _AGAIN)
    return tokens, kinds


def _strings(metadata: dict[str, Any], name: str) -> list[str]:
    """A list of strings that may not be empty. Raises ModelNotFound."""
    value = metadata.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise ModelNotFound(f"the GGUF file has no list of strings {name}", _AGAIN)
    return value


def _set_splitting(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    model, rule = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or rule not in ("smollm", "qwen2") or metadata.get("tokenizer.ggml.add_bos_token"):
        raise UnsupportedArchitecture(
            f"the GGUF tokenizer {shown(model)} with splitting rule {shown(rule)}",
            "use the model's Hugging Face folder instead of a GGUF file",
        )
    if rule == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    else:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
