"""Text for calibration: files and folders given by the user, or what every machine with Python has, cut into token documents."""

from __future__ import annotations

import functools
import pydoc
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from engine.errors import InvalidOption
from engine.inputs import is_file, is_folder, shown

MAX_FILE_BYTES = 4_000_000
MIN_DOCUMENT_TOKENS = 64
_LIBRARY_FOLDERS_LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "__pycache__", "lib2to3", "turtledemo", "pydoc_data", "encodings"}


def text_files(sources: Iterable[str | Path]) -> list[Path]:
    """Readable text files among files and folders (searched in depth), in a fixed order.

    Raises:
        InvalidOption: a source does not exist, or nothing readable was found.
    """
    files: list[Path] = []
    for source in map(Path, sources):
        if is_file(source):
            files.append(source)
        elif is_folder(source):
            files += sorted(
                p for p in source.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(source).parts)
            )
        else:
            raise InvalidOption(f"there is no file or folder {shown(str(source), 200)}", "check --text")
    readable = [f for f in files if 0 < f.stat().st_size <= MAX_FILE_BYTES and is_text(f)]
    if not readable:
        raise InvalidOption("the sources hold no text files", f"give text files of at most {MAX_FILE_BYTES // 1_000_000} MB")
    return readable


def is_text(path: Path) -> bool:
    """Whether the file begins with UTF-8 text."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
        head[:4000].decode("utf-8", "strict" if len(head) < 4000 else "ignore")
        return b"\0" not in head
    except (OSError, UnicodeDecodeError):
        return False


def read_texts(files: Sequence[Path], seed: int = 0) -> Iterator[str]:
    """Contents of the files in an order shuffled by `seed`."""
    order = list(files)
    random.Random(seed).shuffle(order)
    for path in order:
        yield path.read_text(encoding="utf-8", errors="replace")


@functools.cache
def _library_files() -> tuple[Path, ...]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    return tuple(p for p in sorted(folder.rglob("*.py")) if not _LIBRARY_FOLDERS_LEFT_OUT & set(p.relative_to(folder).parts))


def library_texts(seed: int = 0) -> Iterator[str]:
    """Python source and plain documentation of the interpreter's own library, in turns: the text that every machine has."""
    files = list(_library_files())
    if not files:
        raise InvalidOption("the interpreter's library has no sources", "calibrate with scripts/calibrate.py --text")
    random.Random(seed).shuffle(files)
    for path in files:
        source = path.read_text(encoding="utf-8", errors="replace")
        if len(source) < 2000:
            continue
        yield source
        documentation = _documentation(source)
        if len(documentation) > 1000:
            yield documentation


def _documentation(source: str) -> str:
    """Docstrings of a module's source as running text."""
    import ast

    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
    return "\n\n".join(pydoc.cram(text, 4000) for node in nodes if (text := ast.get_docstring(node)))


def documents(texts: Iterable[str], tokenizer: Any, num_tokens: int, context: int, per_text: int = 4) -> tuple[list[list[int]], str]:
    """Token documents of at most `context` tokens, at least `num_tokens` in all where the text suffices.

    A text gives at most `per_text` documents, evenly spread over it, so that one long file does not dominate.

    Returns:
        the documents, and a digest of the text they came from.

    Raises:
        InvalidOption: too little text for two documents.
    """
    found: list[list[int]] = []
    total, digest = 0, sha256()
    for text in texts:
        # tokenizing a whole long file would cost more than the forward passes it is used for
        ids = tokenizer.encode(text[: per_text * context * 12], add_special_tokens=False)
        pieces = [ids[a : a + context] for a in range(0, len(ids), context)]
        stride = max(1, len(pieces) // per_text)
        for piece in pieces[::stride][:per_text]:
            if len(piece) >= min(MIN_DOCUMENT_TOKENS, context):
                found.append(piece)
                total += len(piece)
                digest.update(repr(piece).encode())
        if total >= num_tokens:
            break
    if len(found) < 2:
        raise InvalidOption("the text is too short to calibrate on", "give more text")
    return found, digest.hexdigest()
