"""The tokenizer of a GGUF file as ordinary Hugging Face tokenizer files.

Written from the file's vocabulary directly, so that the result is the same with every version of transformers (fingerprints include it). Two kinds
are read: byte-level BPE ("gpt2", with merges and a rule that splits text first), and SentencePiece's BPE ("llama", Kudo and Richardson, 2018,
arXiv 1808.06226), which has scores instead of merges.
"""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import ModelNotFound, UnsupportedArchitecture
from engine.inputs import Fields, is_finite, is_whole, named_errors, shown
from engine.text.written import write_tokenizer_files

_AGAIN = "fetch the file again, or use the model's Hugging Face folder"
_USE_FOLDER = "use the model's Hugging Face folder instead of a GGUF file"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "▁"  # SentencePiece's
MAX_PIECE_CHARS = 1 << 10  # every place a piece can be cut at is looked at
_MAX_CUTS = 1 << 25
# control tokens that end a turn of some model, beside those that the file names as its own
_TURN_ENDS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")

# published splitting rules: contractions, words with one leading mark, digits (Qwen2 one, Llama 3 up to three), punctuation, line ends, spaces
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2_SPLIT, _LLAMA3_SPLIT = _SPLIT % r"\p{N}", _SPLIT % r"\p{N}{1,3}"
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_RULES = ("smollm", "qwen2", "gpt-2", *_LLAMA3)


def write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, chat_template.jinja and a note of what transformers makes of them (`engine.text.written`).

    Args:
        metadata: of the GGUF file.
        folder: existing folder to write into.

    Raises:
        UnsupportedArchitecture: another tokenizer model or splitting rule.
        ModelNotFound: a list or an id is missing, of another type, or does not fit the others.
    """
    tokens, kinds = _vocabulary(metadata)
    model = metadata.get("tokenizer.ggml.model")
    fields = Fields(metadata, "the GGUF file", ModelNotFound, _AGAIN)
    if fields.boolean("tokenizer.ggml.add_eos_token", False):
        raise UnsupportedArchitecture("a GGUF tokenizer that ends every prompt with an end token", _USE_FOLDER)
    if model == "gpt2":
        tokenizer = _byte_level(metadata, tokens, kinds)
    elif model == "llama":
        tokenizer = _sentencepiece(metadata, tokens, kinds)
    else:
        raise UnsupportedArchitecture(f"the GGUF tokenizer {shown(model)}", _USE_FOLDER)
    spaced = model == "llama" and not fields.boolean("tokenizer.ggml.add_space_prefix", True)
    added = (_CONTROL, _USER_DEFINED) if model == "gpt2" else (_CONTROL, _USER_DEFINED, _UNKNOWN)
    known = [
        # a run of spaces is one in the normalised text only
        AddedToken(token, normalized=spaced and _SPACE in token, special=kind != _USER_DEFINED)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in added
    ]
    with named_errors(ModelNotFound, "the GGUF file's vocabulary makes no tokenizer", _AGAIN):
        tokenizer.add_tokens(known)
    for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind in added and tokenizer.token_to_id(token) != index:
            raise UnsupportedArchitecture(f"the vocabulary holds {token!r} twice", "use the model's Hugging Face folder")
    ids = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        name = f"tokenizer.ggml.{key}_token_id"
        if metadata.get(name) is not None:
            ids[role] = fields.integer(name, 0, len(tokens) - 1)
    # what llama.cpp does where the file does not say
    begins = fields.boolean("tokenizer.ggml.add_bos_token", model == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA3)
    if begins:
        if "bos" not in ids:
            raise ModelNotFound("the GGUF file's prompts begin with a token that it does not name", _AGAIN)
        first = tokens[ids["bos"]]
        with named_errors(ModelNotFound, "the GGUF file's first token makes no tokenizer", _AGAIN):
            opened = processors.TemplateProcessing(
                single=[first, "$A"], pair=[first, "$A", first, "$B:1"], special_tokens=[(first, ids["bos"])]
            )
            byte_level = processors.ByteLevel(trim_offsets=False)
            tokenizer.post_processor = opened if model == "llama" else processors.Sequence([byte_level, opened])

    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields.integer(f"{metadata.get('general.architecture')}.context_length", 1, 1 << 31),
    }
    config |= {f"{role}_token": tokens[index] for role, index in ids.items()}
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ModelNotFound(f"the GGUF file has the chat template {shown(template)}", _AGAIN)
    write_tokenizer_files(folder, tokenizer, config, template)


def end_token_ids(metadata: dict[str, Any]) -> list[int]:
    """Ids that end a text: those the file names, its end token first, then control tokens that are known to end a turn."""
    tokens, kinds = _vocabulary(metadata)
    fields = Fields(metadata, "the GGUF file", ModelNotFound, _AGAIN)
    ends = [fields.integer("tokenizer.ggml.eos_token_id", 0, len(tokens) - 1)]
    for key in ("eot", "eom"):
        name = f"tokenizer.ggml.{key}_token_id"
        if metadata.get(name) is not None:
            ends.append(fields.integer(name, 0, len(tokens) - 1))
    ends += [i for i, token in enumerate(tokens) if token in _TURN_ENDS and kinds[i] == _CONTROL]
    return list(dict.fromkeys(ends))


def _vocabulary(metadata: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Tokens and their kinds, one of each an id. Raises ModelNotFound when they do not fit each other."""
    tokens, kinds = _strings(metadata, "tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    # of each type one will do: there may be hundreds of thousands
    if not isinstance(kinds, list) or len(kinds) != len(tokens) or not all(map(is_whole, {type(kind): kind for kind in kinds}.values())):
        raise ModelNotFound("the GGUF file does not name a kind for each of its tokens", _AGAIN)
    return tokens, kinds


def _strings(metadata: dict[str, Any], name: str) -> list[str]:
    """A list of strings that may not be empty. Raises ModelNotFound."""
    value = metadata.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise ModelNotFound(f"the GGUF file has no list of strings {name}", _AGAIN)
    return value


def _byte_level(metadata: dict[str, Any], tokens: list[str], kinds: list[int]) -> Tokenizer:
    """Byte-level BPE with the file's merges, and the splitting rule that it names."""
    rule = metadata.get("tokenizer.ggml.pre")
    if rule not in _RULES:
        raise UnsupportedArchitecture(f"the GGUF tokenizer 'gpt2' with splitting rule {shown(rule)}", _USE_FOLDER)
    merges: list[tuple[str, str]] = []
    for merge in _strings(metadata, "tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise ModelNotFound(f"the GGUF file has the merge {shown(merge)}, which is not of two tokens", _AGAIN)
        merges.append((left, right))
    # padding rows of the embedding matrix have names but are no tokens: text must never contain them
    vocabulary = {token: index for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != _UNUSED}
    with named_errors(ModelNotFound, "the GGUF file's vocabulary and merges make no tokenizer", _AGAIN):
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **({"ignore_merges": True} if rule in _LLAMA3 else {})))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if rule == "gpt-2":
        tokenizer.pre_tokenizer = whole
    elif rule == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    else:
        if rule == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        split = Regex(_QWEN2_SPLIT if rule == "qwen2" else _LLAMA3_SPLIT)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(split, behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], kinds: list[int]) -> Tokenizer:
    """SentencePiece's BPE: of neighbouring pieces whose join is a piece, those with the best score are joined first, the leftmost of equals."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens) or not all(map(_is_score, scores)):
        raise ModelNotFound("the GGUF file does not give a score for each of its tokens", _AGAIN)
    unknown = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN]
    given = metadata.get("tokenizer.ggml.unknown_token_id")
    if given is not None:  # some files count it among the control tokens
        unknown = [
            tokens[Fields(metadata, "the GGUF file", ModelNotFound, _AGAIN).integer("tokenizer.ggml.unknown_token_id", 0, len(tokens) - 1)]
        ]
    vocabulary = {token: index for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != _UNUSED}
    pieces = {token: scores[i] for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind in (_NORMAL, _USER_DEFINED)}
    with named_errors(ModelNotFound, "the GGUF file's vocabulary makes no tokenizer", _AGAIN):
        model = models.BPE(
            vocab=vocabulary,
            merges=_merges(pieces),
            byte_fallback=_BYTE in kinds,
            fuse_unk=True,
            **({"unk_token": unknown[0]} if unknown else {}),
        )
    tokenizer = Tokenizer(model)
    spaces: list[Any] = [normalizers.Replace(" ", _SPACE)]
    texts: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if Fields(metadata, "the GGUF file", ModelNotFound, _AGAIN).boolean("tokenizer.ggml.add_space_prefix", True):
        spaces, texts = [normalizers.Prepend(_SPACE), *spaces], [*texts, decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(spaces), decoders.Sequence(texts)
    return tokenizer


def _is_score(score: object) -> bool:
    return isfinite(score) if type(score) is float else is_finite(score)


def _merges(pieces: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of pieces that join to a piece, the best score first.

    Raises:
        ModelNotFound: pieces so long that the pairs could not be listed in bounded time.
    """
    if max(map(len, pieces), default=0) > MAX_PIECE_CHARS or sum(map(len, pieces)) > _MAX_CUTS:
        raise ModelNotFound("the GGUF file's tokens are too long for SentencePiece's", _AGAIN)
    return [
        (left, right)
        for piece, _ in sorted(pieces.items(), key=lambda item: -item[1])  # of equals the first named first
        for cut in range(1, len(piece))
        if (left := piece[:cut]) in pieces and (right := piece[cut:]) in pieces
    ]
