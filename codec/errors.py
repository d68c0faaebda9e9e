"""Named errors of the codec. Each says what is wrong and what to do about it."""

from __future__ import annotations

from kernels.errors import ForetoldError


class CodecError(ForetoldError, ValueError):
    """Base of every error this package raises on bad input."""


class TruncatedCode(CodecError):
    """The bytes end before what their header announces."""


class CorruptedCode(CodecError):
    """A checksum does not match, or the content contradicts itself."""


class ForeignCode(CodecError):
    """The bytes are not of this format at all."""


class NewerCode(CodecError):
    """The bytes were written by a later version of the format."""


class PackMismatch(CodecError):
    """A code and a pack, or a pack and its models, do not belong together."""


class UnknownQuality(CodecError):
    """The quality's name is not one of codec.spec.QUALITIES."""


class BadInput(CodecError):
    """Tensors handed to the codec have the wrong shape, or hold NaN or infinity."""


class PredictorError(CodecError):
    """A predictor cannot be fitted, stored or applied to what it was given."""
