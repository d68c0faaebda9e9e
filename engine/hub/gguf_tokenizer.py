"""The tokenizer of a GGUF file as ordinary Hugging Face tokenizer files.

Written from the file's vocabulary and merges directly, so that the result is the same with every version of transformers
(fingerprints include it).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import UnsupportedArchitecture

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
    """
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds: list[int] = metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    # padding rows of the embedding matrix have names but are no tokens: text must never contain them
    vocabulary = {token: index for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != _UNUSED}

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
        "model_max_length": metadata[f"{metadata['general.architecture']}.context_length"],
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            config[f"{role}_token"] = tokens[token_id]
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def end_token_ids(metadata: dict[str, Any]) -> list[int]:
    """Ids that end a text: the file's end token, then `<|endoftext|>` where that is another control token."""
    ends = [int(metadata["tokenizer.ggml.eos_token_id"])]
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    ends += [i for i, token in enumerate(tokens) if token == "<|endoftext|>" and kinds[i] == _CONTROL and i not in ends]
    return ends


def _set_splitting(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    model, rule = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or rule not in ("smollm", "qwen2") or metadata.get("tokenizer.ggml.add_bos_token"):
        raise UnsupportedArchitecture(
            f"the GGUF tokenizer {model!r} with splitting rule {rule!r}", "use the model's Hugging Face folder instead of a GGUF file"
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
