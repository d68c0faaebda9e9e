"""The base of every error that names what is wrong and what to do about it, for all packages."""

from __future__ import annotations


class ForetoldError(Exception):
    """Base of all errors meant for a user: `str(error)` is one line, "what (remedy)"; the command line prints it and exits with status 2.

    Args:
        what: what went wrong, naming the offending value.
        remedy: what the user can do; may be empty, and the brackets are then left out.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what = _printable(what)
        self.remedy = _printable(remedy)
        # Exception.args keep the constructor's form, so that the error survives pickling and copying
        super().__init__(self.what, self.remedy)

    def __str__(self) -> str:
        return f"{self.what} ({self.remedy})" if self.remedy else self.what


def _printable(text: str) -> str:
    """The text on one line; control characters and lone surrogates, which file names may hold, as escapes instead of to the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


class InvalidOption(ForetoldError):
    """An option has a value outside its range, or two options exclude each other."""
