"""Errors of the draft package; the engine turns them into its own named errors."""

from __future__ import annotations

from kernels.errors import ForetoldError, InvalidOption


class DraftError(ForetoldError, ValueError):
    """A drafter cannot do what was asked of it."""


class ExitLayerError(DraftError, InvalidOption):
    """The exit layer does not leave layers both below and above it."""


class FeatureTapError(DraftError, InvalidOption):
    """Features were asked for at a layer the drafter does not run."""


class DraftHeadError(DraftError):
    """A draft head's folder cannot be used."""


class DraftHeadNotFound(DraftHeadError):
    """The folder lacks a file of the draft head."""


class CorruptedDraftHead(DraftHeadError):
    """The files are cut short, altered, or do not belong together."""


class ForeignDraftHead(DraftHeadError):
    """The folder holds something else."""


class NewerDraftHead(DraftHeadError):
    """The files were written by a later version of the program."""


class DraftHeadMismatch(DraftHeadError):
    """The draft head was trained for a target of another shape."""


class TrainingError(DraftError):
    """A draft head cannot be trained this way."""


class TrainingDataError(TrainingError):
    """The documents to train on are too few, damaged, or not documents."""


class CheckpointMismatch(TrainingError):
    """A checkpoint is damaged, or belongs to a training with other options or data."""
