"""Every mistake a user can make ends in one of these errors, each saying what is wrong and what to do about it."""

from __future__ import annotations

from codec.errors import PackMismatch
from draft.errors import DraftHeadError as BadDraftHead
from kernels.errors import ForetoldError, InvalidOption

__all__ = [
    "BadDraftHead",
    "BadSessionFile",
    "BadStore",
    "CacheNotWritable",
    "Corrupted",
    "DiskFull",
    "DownloadFailed",
    "EmptyPrompt",
    "ForeignModel",
    "ForetoldError",
    "HashMismatch",
    "InvalidOption",
    "KernelsPackageClash",
    "ModelNotFound",
    "NewerVersion",
    "NonFiniteLogits",
    "PackMismatch",
    "PagesNotReserved",
    "PoolExhausted",
    "PromptTooLong",
    "SessionBusy",
    "SessionClosed",
    "SessionInUse",
    "Truncated",
    "UnknownPair",
    "UnsupportedArchitecture",
    "VocabularyMismatch",
]

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


class NonFiniteLogits(ForetoldError):
    """The model gave logits that are NaN or infinite: its weights, or the keys and values it was given, are no numbers."""


class PoolExhausted(ForetoldError):
    """The paged KV pool has no free page left and may not grow."""


class PagesNotReserved(ForetoldError):
    """A forward pass would write into pages that its sequence does not own, or not alone: its caller reserves them first."""


# --- sessions and packs -----------------------------------------------------------------------------------------------


class BadSessionFile(ForetoldError):
    """The file cannot be resumed; the subclasses say why."""


class SessionInUse(ForetoldError):
    """Another process holds the session file."""


class SessionBusy(ForetoldError):
    """The session is answering; it gives one answer at a time."""


class SessionClosed(ForetoldError):
    """The session was closed: its KV is gone."""


class Truncated(BadSessionFile):
    """The session file ends early."""


class Corrupted(BadSessionFile):
    """A checksum in the session file does not match its bytes, or the file is no session file at all."""


class ForeignModel(BadSessionFile):
    """The session was suspended with another target, draft, tokenizer or pack."""


class NewerVersion(BadSessionFile):
    """The session file was written by a newer version of its format."""


# --- the store --------------------------------------------------------------------------------------------------------


class BadStore(ForetoldError):
    """The folder is no store: other files lie in it, a newer version wrote it, or it is no folder at all."""
