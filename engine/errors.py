"""Every mistake a user can make ends in one of these errors, each saying what is wrong and what to do about it."""

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


# --- models -----------------------------------------------------------------------------------------------------------


class UnknownPair(ForetoldError):
    """The name is none of the known target and draft pairs."""


class ModelNotFound(ForetoldError):
    """The folder or hub id holds no usable model: missing folder, missing config, weights or tokenizer."""


class DownloadFailed(ForetoldError):
    """A download gave no usable file: no network, an unknown package, an answer cut short."""


class HashMismatch(ForetoldError):
    """Downloaded bytes are not the ones this version was made for."""


class DiskFull(ForetoldError):
    """The cache folder has no room for the download or the conversion."""


class CacheNotWritable(ForetoldError):
    """The cache folder cannot be made or written to."""


class UnsupportedArchitecture(ForetoldError):
    """The model's architecture, or an option in its config, is one our decoder does not run."""


class VocabularyMismatch(ForetoldError):
    """Target and draft do not give the same token the same id."""


class KernelsPackageClash(ForetoldError):
    """Another published package, also imported as `kernels`, lies over ours."""


# --- requests ---------------------------------------------------------------------------------------------------------


class EmptyPrompt(ForetoldError):
    """There is no prompt, or it has no tokens."""


class PromptTooLong(ForetoldError):
    """The prompt, with the tokens to be generated, does not fit the model's context."""


class InvalidOption(ForetoldError):
    """An option has a value outside its range, or two options exclude each other."""


class NonFiniteLogits(ForetoldError):
    """The model gave logits that are NaN or infinite: its weights, or the keys and values it was given, are no numbers."""


class PoolExhausted(ForetoldError):
    """The paged KV pool has no free page left and may not grow."""


# --- sessions and packs -----------------------------------------------------------------------------------------------


class BadAdapter(ForetoldError):
    """A trained trunk draft is missing, damaged, newer than the program, or made for another target."""


class PackMismatch(ForetoldError):
    """The codec pack was made for another target, draft or tokenizer."""


class BadSessionFile(ForetoldError):
    """The file cannot be resumed; the subclasses say why."""


class Truncated(BadSessionFile):
    """The session file ends early."""


class Corrupted(BadSessionFile):
    """A checksum in the session file does not match its bytes, or the file is no session file at all."""


class ForeignModel(BadSessionFile):
    """The session was suspended with another target, draft, tokenizer or pack."""


class NewerVersion(BadSessionFile):
    """The session file was written by a newer version of its format."""
