"""Tokenizers that this project wrote into a folder itself: what transformers would make of its files is known from writing them.

Beside tokenizer.json lies a note with the few facts that transformers takes from the other files, and the digests of all of them. Where these agree the
tokenizer is made of tokenizer.json alone; a file that was changed or added since leaves the answer to transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from engine.text.remembered import RememberedTokenizer

NOTE = "foretold-tokenizer.json"
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_VERSION = 1
_MOST_BYTES = 1 << 20
# digest of tokenizer.json -> the object it was written from, until that is asked for: reading hundreds of thousands of tokens takes a second
_LATEST: dict[str, Any] = {}
_MOST_HELD = 2  # of a target and its draft


def write_tokenizer_files(folder: Path, backend: Any, config: dict[str, Any], template: str | None) -> None:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja where there is a template, and the note of what they make.

    Args:
        folder: existing folder without tokenizer files.
        backend: the `tokenizers.Tokenizer`.
        config: tokenizer_config.json, of the class PreTrainedTokenizerFast; `<role>_token` names special tokens. Where one of them is no special token
            of the backend, transformers makes it one, and there is no note.
        template: chat template.
    """
    written = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"}
    if template is not None:
        written["chat_template.jinja"] = template
    digests = {}
    for name, text in written.items():
        content = text.encode()
        (folder / name).write_bytes(content)
        digests[name] = sha256(content).hexdigest()
    special = {role: config[role] for role in _ROLES if role in config}
    if not set(special.values()) <= {token.content for token in backend.get_added_tokens_decoder().values() if token.special}:
        return
    facts = {
        "special_tokens_map": special,
        "eos_token_id": backend.token_to_id(special["eos_token"]) if "eos_token" in special else None,
        "chat_template": template,
        "cleans_up": config["clean_up_tokenization_spaces"],
    }
    (folder / NOTE).write_text(json.dumps({"version": _VERSION, "files": digests, "facts": facts}) + "\n", encoding="utf-8")
    _LATEST[digests["tokenizer.json"]] = backend
    while len(_LATEST) > _MOST_HELD:
        _LATEST.pop(next(iter(_LATEST)), None)


def written_tokenizer(folder: Path, files: Sequence[str], original: Callable[[], Any]) -> RememberedTokenizer | None:
    """The tokenizer of a folder whose files are those that `write_tokenizer_files` wrote; None for any other.

    files: names of all files that tokenizers are made from. original: loads transformers' tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        if (folder / NOTE).stat().st_size > _MOST_BYTES or (folder / "additional_chat_templates").exists():
            return None
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        contents = {name: (folder / name).read_bytes() for name in files if (folder / name).is_file()}
        digests = {name: sha256(content).hexdigest() for name, content in contents.items()}
        if note["version"] != _VERSION or digests != note["files"]:
            return None
        backend = _LATEST.pop(digests["tokenizer.json"], None)
        if backend is None:
            backend = Tokenizer.from_str(contents["tokenizer.json"].decode())
        return RememberedTokenizer(backend, note["facts"], original)
    except Exception:  # tokenizers raises plain exceptions
        return None
