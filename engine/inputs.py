"""Doors for files and values that others wrote: opened, bounded and typed here, so that what is ill-formed ends as one named error.

Every reader takes the error class to raise, as the same fault in a model folder and in a session file has two names.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO, cast

from engine.errors import ForetoldError, InvalidOption

MAX_JSON_BYTES = 64 << 20
MAX_NESTING = 64
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def shown(value: object, limit: int = 80) -> str:
    """`repr` of a value for an error, cut to `limit` characters, without control characters."""
    try:
        text = repr(value)
    except Exception:  # a number of more digits than Python prints, a broken __repr__
        text = f"<{type(value).__name__}>"
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(c if c.isprintable() else "?" for c in text)


def named_path(value: object, what: str) -> Path:
    """The path of an option that names a file or a folder. Raises InvalidOption for what is no path."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise InvalidOption(f"{what} cannot be {shown(value)}", "give a path")
    return Path(os.fspath(value))


def is_file(path: Path) -> bool:
    """Whether a regular file is there; False for names that no system takes (too long, a zero byte), where `Path.is_file` raises."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether a folder is there; False for names that no system takes, as `is_file`."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def open_regular(path: Path, error: type[ForetoldError], remedy: str, *, max_bytes: int | None = None) -> BinaryIO:
    """A regular file, opened for reading; a pipe or a device is refused at once instead of waited for.

    Raises:
        error: there is no such file, it may not be read, it is no regular file, or it is larger than `max_bytes`.
    """
    try:
        # a pipe without a writer would block the opening itself
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as failure:
        raise error(f"{shown(str(path), 200)} cannot be read: {failure.strerror or failure}", remedy) from failure
    except ValueError as failure:
        raise error(f"{shown(str(path), 200)} is no file name", remedy) from failure
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        why = os.strerror(errno.EISDIR) if stat.S_ISDIR(status.st_mode) else "it is not a regular file"
        raise error(f"{shown(str(path), 200)} cannot be read: {why}", remedy)
    if max_bytes is not None and status.st_size > max_bytes:
        os.close(descriptor)
        raise error(f"{shown(str(path), 200)} has {status.st_size:,} bytes, more than the {max_bytes:,} such a file may have", remedy)
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, error: type[ForetoldError], remedy: str, *, max_bytes: int) -> bytes:
    """Content of a regular file of at most `max_bytes`. Raises `error` as `open_regular`, and when reading fails."""
    with open_regular(path, error, remedy, max_bytes=max_bytes) as file:
        try:
            # one byte more, as the file may have grown since its size was looked at
            content = file.read(max_bytes + 1)
        except OSError as failure:
            raise error(f"{shown(str(path), 200)} cannot be read: {failure.strerror or failure}", remedy) from failure
    if len(content) > max_bytes:
        raise error(f"{shown(str(path), 200)} has more than the {max_bytes:,} bytes such a file may have", remedy)
    if content.startswith(_LFS_POINTER):
        raise lfs_pointer(path, error)
    return content


def lfs_pointer(path: Path, error: type[ForetoldError]) -> ForetoldError:
    """The error for a git-lfs pointer that lies where a file's content should be."""
    return error(f"{path} is a git-lfs pointer, not the file itself", "fetch the content with: git lfs pull")


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file begins as git-lfs pointers do."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except (OSError, ValueError):
        return False


def parse_json(content: bytes | str, where: str, error: type[ForetoldError], remedy: str) -> Any:
    """The value of a JSON text. NaN and infinity are read as Python reads them: the fields' own bounds refuse them.

    Raises:
        error: no UTF-8, no JSON, or nested more than MAX_NESTING deep.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = json.loads(text)
        if text.count("[") + text.count("{") > MAX_NESTING:  # else it cannot be nested so deep
            _check_nesting(value)
        return value
    except (ValueError, RecursionError) as failure:  # ValueError: bad syntax, bad encoding, a number of thousands of digits
        raise error(f"{where} is not valid JSON: {shown(str(failure), 120)[1:-1]}", remedy) from failure


def _check_nesting(value: Any) -> None:
    """ValueError for a value nested too deep; without recursion, as what it looks for would end that."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_NESTING:
            raise ValueError(f"it is nested more than {MAX_NESTING} deep")
        inner: list[Any] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
            inner += [child for child in children if isinstance(child, (dict, list))]
        level = inner


def read_json_object(path: Path, error: type[ForetoldError], remedy: str, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises `error` as `read_bytes` and `parse_json`, and when it is no object."""
    value = parse_json(read_bytes(path, error, remedy, max_bytes=max_bytes), str(path), error, remedy)
    if not isinstance(value, dict):
        raise error(f"{path} is not valid JSON of a configuration: it holds {shown(value)}", remedy)
    return value


class Fields:
    """Typed and bounded reading of a mapping's values, whichever they are; null counts as absent.

    Args:
        values: the mapping.
        where: what the mapping describes, for errors.
        error, remedy: what is raised for a value that does not fit.
    """

    def __init__(self, values: Mapping[str, Any], where: str, error: type[ForetoldError], remedy: str) -> None:
        self._values, self._where, self._error, self._remedy = values, where, error, remedy

    def get(self, name: str) -> Any:
        """The raw value, None when absent."""
        return self._values.get(name)

    def refuse(self, name: str, why: str) -> ForetoldError:
        """The error that a field of this name and value deserves."""
        if self._values.get(name) is None:
            return self._error(f"{self._where} lacks {name!r}", self._remedy)
        return self._error(f"{self._where} has {name} {shown(self._values[name])}: {why}", self._remedy)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number from low to high; booleans, floats and strings are none."""
        value: Any = self._values.get(name)
        if value is None and default is not None:
            return default
        if not is_whole(value) or not low <= value <= high:
            raise self.refuse(name, f"a whole number from {low:,} to {high:,} is needed")
        return int(value)

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number from low to high."""
        value: Any = self._values.get(name)
        if value is None and default is not None:
            return default
        if not is_finite(value) or not low <= value <= high:
            raise self.refuse(name, f"a number from {low:g} to {high:g} is needed")
        return float(value)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._values.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false is needed")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self._values.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.refuse(name, "a string is needed")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """An object with string keys; empty when absent."""
        value = self._values.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise self.refuse(name, "an object is needed")
        return dict(value)

    def texts(self, name: str, most: int) -> list[str]:
        """A list of at most `most` strings; empty when absent."""
        value = self._values.get(name)
        if value is None:
            return []
        if not isinstance(value, (list, tuple)) or len(value) > most or not all(isinstance(item, str) for item in value):
            raise self.refuse(name, f"a list of at most {most:,} strings is needed")
        return list(value)

    def integers(self, name: str, low: int, high: int, most: int) -> list[int]:
        """A list of at most `most` whole numbers from low to high; empty when absent."""
        value = self._values.get(name)
        if value is None:
            return []
        if not isinstance(value, (list, tuple)) or len(value) > most or not all(is_whole(item) and low <= item <= high for item in value):
            raise self.refuse(name, f"a list of at most {most:,} whole numbers from {low:,} to {high:,} is needed")
        return [int(item) for item in value]

    def ids(self, name: str) -> tuple[int, ...]:
        """One token id or a list of them; -1, by which some configs say "none", is left out."""
        value = self._values.get(name)
        given = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
        if len(given) > 4096 or not all(is_whole(i) and -1 <= i < 2**31 for i in given):
            raise self.refuse(name, "a token id or a list of token ids is needed")
        return tuple(int(i) for i in given if i >= 0)


def is_whole(value: object) -> bool:
    """Whether the value is a whole number of any type (numpy's among them); a boolean is none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_")


def are_whole(values: Collection[object]) -> bool:
    """Whether all of them are whole numbers, as `is_whole`; of Python's own a hundred thousand are looked at in two milliseconds."""
    return set(map(type, values)) <= {int} or all(map(is_whole, values))


def is_finite(value: object) -> bool:
    """Whether the value is a finite number of any type; a boolean is none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(cast(Any, value)))
    except (OverflowError, ValueError):
        return False


def plain_number(value: Any) -> Any:
    """Python's own int or float for a number of numpy or a tensor of one; anything else, booleans among them, as it is."""
    if getattr(value, "shape", None) == () and hasattr(value, "tolist"):
        value = value.tolist()
    if is_whole(value):
        return int(value)
    return float(value) if is_finite(value) and not isinstance(value, float) else value


class named_errors:
    """Context: whatever a foreign library raises leaves it as one error of ours; our own errors and interrupts pass unchanged.

    Panics of Rust libraries are no `Exception`, so everything but the wish to end is caught.

    Args:
        error: class to raise.
        what: what was being done, a clause that the library's own words follow.
        remedy: what the user can do.
    """

    def __init__(self, error: type[ForetoldError], what: str, remedy: str) -> None:
        self._error, self._what, self._remedy = error, what, remedy

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, (ForetoldError, KeyboardInterrupt, SystemExit, GeneratorExit)):
            return
        lines = str(error).strip().splitlines()
        said = lines[0][:160] if lines else type(error).__name__
        raise self._error(f"{self._what}: {said}", self._remedy) from error
