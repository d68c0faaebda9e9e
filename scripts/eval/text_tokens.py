"""Text files to token windows, with a held-out split that depends on content only.

Split rule. With separate calibration text: everything in --text is test, and a file that occurs in both (same bytes) is refused.
Without: files are split by the SHA-256 of their content, about one quarter (first byte below 64) test and the rest calibration; a
single file is cut at three quarters of its tokens. Windows of `context` tokens do not overlap and never cross a file; which ones
are used is drawn with a fixed seed. An .npz with int arrays `train` and `test`, both [sequences, >= context], is taken as it is.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.errors import InvalidOption

SUFFIXES = {
    ".c",
    ".cpp",
    ".go",
    ".h",
    ".html",
    ".java",
    ".js",
    ".json",
    ".log",
    ".md",
    ".py",
    ".rs",
    ".rst",
    ".sh",
    ".toml",
    ".ts",
    ".txt",
    ".yaml",
    ".yml",
}
_TEST_BELOW = 64
_SEED = 0
_MAX_WINDOWS_PER_FILE = 64


@dataclass(frozen=True)
class TokenSplit:
    """Windows of exactly `context` tokens: test, and calibration (maybe empty)."""

    test: list[list[int]]
    calibration: list[list[int]]


def read_files(paths: list[str]) -> dict[str, str]:
    """{content digest: text} of files, and of the text files below folders (SUFFIXES); duplicates once. InvalidOption when none."""
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
        elif path.is_file():
            found.append(path)
        else:
            raise InvalidOption(f"no text at {name}", "give an existing file or folder")
    texts = {}
    for path in found:
        data = path.read_bytes()
        if data and b"\0" not in data[:4096]:
            texts[hashlib.sha256(data).hexdigest()] = data.decode("utf-8", errors="replace")
    if not texts:
        raise InvalidOption(f"no text in {', '.join(paths)}", f"give text files; folders are searched for {' '.join(sorted(SUFFIXES))}")
    return texts


def windows(sequences: list[list[int]], context: int, count: int) -> list[list[int]]:
    """At most `count` windows of `context` tokens, drawn over all sequences with a fixed seed."""
    cut = [s[i : i + context] for s in sequences for i in range(0, min(len(s), context * _MAX_WINDOWS_PER_FILE) - context + 1, context)]
    random.Random(_SEED).shuffle(cut)
    return cut[:count]


def split_tokens(
    text: list[str],
    calibration_text: list[str],
    context: int,
    test_tokens: int,
    calibration_tokens: int,
    encode: Callable[[str], list[int]],
) -> TokenSplit:
    """Test and calibration windows after the rule above.

    Args:
        text, calibration_text: files and folders (or one .npz); calibration_text may be empty.
        context: tokens of a window.
        test_tokens, calibration_tokens: how many tokens of each at most (whole windows).
        encode: text to token ids.
    """
    num_test, num_calibration = test_tokens // context, calibration_tokens // context
    if num_test < 1:
        raise InvalidOption(f"{test_tokens} tokens are less than one window of {context}", "raise --tokens or lower --context")
    if len(text) == 1 and text[0].endswith(".npz"):
        arrays = np.load(text[0])
        test, train = (
            [[int(t) for t in row[:context]] for row in arrays[name][:count] if len(row) >= context]
            for name, count in (("test", num_test), ("train", num_calibration))
        )
    else:
        texts = read_files(text)
        if calibration_text:
            other = read_files(calibration_text)
            shared = texts.keys() & other.keys()
            if shared:
                raise InvalidOption(f"{len(shared)} files are in both the test and the calibration text", "keep the two apart")
            parts = [list(texts.values()), list(other.values())]
        else:
            held_out = {digest for digest in texts if int(digest[:2], 16) < _TEST_BELOW}
            parts = [[t for d, t in texts.items() if (d in held_out) == wanted] for wanted in (True, False)]
        tokens = [[encode(t) for t in part] for part in parts]
        if not calibration_text and not (tokens[0] and tokens[1]):
            whole = tokens[0] + tokens[1]
            tokens = [[s[len(s) * 3 // 4 :] for s in whole], [s[: len(s) * 3 // 4] for s in whole]]
        test, train = windows(tokens[0], context, num_test), windows(tokens[1], context, num_calibration)
    if not test:
        raise InvalidOption(f"the test text has no file of {context} tokens", "give more text or lower --context")
    return TokenSplit(test, train)


def digest(sequences: list[list[int]]) -> str:
    """Short SHA-256 of token windows."""
    return hashlib.sha256(np.asarray(sequences, np.int64).tobytes()).hexdigest()[:16]
