"""The base of every error that names what is wrong and what to do about it, for all packages."""

from __future__ import annotations


class ForetoldError(Exception):
    """Base of all errors meant for a user: `str(error)` is one line, "what (remedy)"; the command line prints it and exits with status 2.

    Args:
        what: what went wrong, naming the offending value.
        remedy: what the user can do; may be empty, and the brackets are then left out.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what = " ".join(what.split())
        self.remedy = " ".join(remedy.split())
        # Exception.args keep the constructor's form, so that the error survives pickling and copying
        super().__init__(self.what, self.remedy)

    def __str__(self) -> str:
        return f"{self.what} ({self.remedy})" if self.remedy else self.what


class InvalidOption(ForetoldError):
    """An option has a value outside its range, or two options exclude each other."""
