"""Tokenizers remembered as the tokenizers library writes them, so that a start need not import transformers.

transformers makes its tokenizers from several files by rules of each model's class, and then hands text to a `tokenizers.Tokenizer`. That object is
kept as transformers made it, with the few facts that lie outside it, under a name that all files it was made from and both libraries' versions are
part of. What the engine asks for is answered from these as transformers' methods answer it; anything else goes to transformers' own tokenizer, which
is then loaded and answers from there on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_VERSION = 1
# what a class must not have changed for the answers here to be its own
_METHODS = ("__call__", "_encode_plus", "decode", "_decode", "get_vocab", "added_tokens_decoder", "special_tokens_map", "eos_token_id")


class RememberedTokenizer:
    """Encodes and decodes as the tokenizer of transformers it was made from.

    Args:
        backend: the `tokenizers.Tokenizer`.
        facts: special_tokens_map, eos_token_id, chat_template, cleans_up (whether decoding alters spaces unless told not to).
        original: loads transformers' tokenizer.
    """

    is_fast = True

    def __init__(self, backend: Any, facts: dict[str, Any], original: Callable[[], Any]) -> None:
        self._backend, self._load = backend, original
        self._whole: Any | None = None
        self.special_tokens_map: dict[str, Any] = facts["special_tokens_map"]
        self.eos_token_id: int | None = facts["eos_token_id"]
        self._template: str | dict[str, str] | None = facts["chat_template"]
        self._cleans_up: bool = facts["cleans_up"]

    @property
    def original(self) -> Any:
        """transformers' tokenizer, loaded when first asked for. Raises ModelNotFound where its files have gone."""
        if self._whole is None:
            whole = self._load()
            whole.chat_template = self._template
            self._whole = whole
        return self._whole

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """A text, or named texts; can be set."""
        return self._template if self._whole is None else self._whole.chat_template

    @chat_template.setter
    def chat_template(self, template: str | dict[str, str] | None) -> None:
        self._template = template
        if self._whole is not None:
            self._whole.chat_template = template

    @property
    def backend_tokenizer(self) -> Any:
        """Of the tokenizers library."""
        return self._backend if self._whole is None else self._whole.backend_tokenizer

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Id -> added token."""
        return dict(self.backend_tokenizer.get_added_tokens_decoder())

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, added ones included."""
        return dict(self.backend_tokenizer.get_vocab(with_added_tokens=True))

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    def __call__(self, text: Any, *args: Any, add_special_tokens: bool = True, split_special_tokens: bool = False, **options: Any) -> Any:
        """{"input_ids": [...]} of a text; everything but a single text is transformers' to answer."""
        if self._whole is not None or args or options or not isinstance(text, str):
            return self.original(text, *args, add_special_tokens=add_special_tokens, split_special_tokens=split_special_tokens, **options)
        if self._backend.encode_special_tokens != split_special_tokens:  # not without need: another thread may be decoding
            self._backend.encode_special_tokens = split_special_tokens
        # of its ways to encode a text the one that lets other threads run meanwhile, and works out no places in the text
        return {"input_ids": self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids}

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, *, clean_up_tokenization_spaces: bool | None = None, **options: Any
    ) -> Any:
        """Text of a list of ids, whose spaces are left as they are; everything else is transformers' to answer."""
        cleans_up = self._cleans_up if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        if self._whole is not None or cleans_up or options or not _are_ids(token_ids):
            options |= {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": clean_up_tokenization_spaces}
            return self.original.decode(token_ids, **options)
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of copying and pickling, before there is anything to ask
            raise AttributeError(name)
        return getattr(self.original, name)


def _are_ids(token_ids: Any) -> bool:
    return isinstance(token_ids, Sequence) and all(type(token) is int for token in token_ids)


def remembered_name(folder: Path, files: Sequence[str]) -> str | None:
    """The name for a folder's tokenizer: a digest of its files and of the libraries' versions. None where it has files that are not looked at.

    files: names of all files that tokenizers are made from; config.json, which may name the class, comes on top.
    """
    if (folder / "additional_chat_templates").exists():
        return None
    digest = sha256()
    try:
        parts = [str(_VERSION), *(version(library) for library in ("transformers", "tokenizers"))]
        for name in (*files, "config.json"):
            if (folder / name).is_file():
                with (folder / name).open("rb") as file:
                    parts += [name, sha256(file.read()).hexdigest()]
    except (OSError, PackageNotFoundError):
        return None
    digest.update("\n".join(parts).encode())
    return f"{digest.hexdigest()[:32]}.tokenizer"


def follows_library(tokenizer: Any) -> bool:
    """Whether a tokenizer encodes and decodes as its `tokenizers.Tokenizer` does: it is one of transformers without rules of its own, or remembered of
    one. That library is not imported to know: who has one has imported it."""
    if isinstance(tokenizer, RememberedTokenizer):
        return True
    library = sys.modules.get("transformers")
    if library is None or not isinstance(tokenizer, library.PreTrainedTokenizerFast):
        return False
    kind, plain = type(tokenizer), library.PreTrainedTokenizerFast
    unchanged = all(getattr(kind, name, None) is getattr(plain, name, None) for name in _METHODS)
    return unchanged and not getattr(tokenizer, "split_special_tokens", False)


def to_bytes(tokenizer: Any) -> bytes | None:
    """What `from_bytes` reads; None for a tokenizer that answers by rules of its own, or does not come back from its text as it was."""
    from tokenizers import Tokenizer

    if isinstance(tokenizer, RememberedTokenizer) or not follows_library(tokenizer):
        return None
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    text = backend.to_str()
    special = {str(name): token if isinstance(token, list) else str(token) for name, token in tokenizer.special_tokens_map.items()}
    facts = {
        "special_tokens_map": special,
        "eos_token_id": tokenizer.eos_token_id,
        "chat_template": tokenizer.chat_template,
        "cleans_up": bool(tokenizer.clean_up_tokenization_spaces),
    }
    try:
        head = json.dumps(facts | {"digest": _digest(facts, text)}).encode()
    except (TypeError, ValueError):
        return None
    if Tokenizer.from_str(text).to_str() != text or json.loads(head) | {"digest": ""} != facts | {"digest": ""}:
        return None
    return head + b"\n" + text.encode()


def from_bytes(content: bytes, original: Callable[[], Any]) -> RememberedTokenizer | None:
    """The tokenizer of what `to_bytes` gave; None where it is damaged. original: loads transformers' tokenizer."""
    from tokenizers import Tokenizer

    head, _, body = content.partition(b"\n")
    try:
        facts, text = json.loads(head), body.decode()
        if facts.pop("digest") != _digest(facts, text):
            return None
        return RememberedTokenizer(Tokenizer.from_str(text), facts, original)
    except Exception:  # tokenizers raises plain exceptions
        return None


def _digest(facts: dict[str, Any], text: str) -> str:
    return sha256(json.dumps(facts, sort_keys=True).encode() + b"\n" + text.encode()).hexdigest()
