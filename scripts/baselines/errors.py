"""Named errors of the baselines, beside those of codec/errors.py (truncated, corrupted and foreign codes, bad input, pack mismatch)."""

from codec.errors import CodecError


class UnknownBaseline(CodecError):
    """The name is not in the registry; the message lists the names that are."""


class NotFitted(CodecError):
    """The baseline needs calibration (a mean, a basis, histograms, predictors) and fit() was not called."""


class TooLittleCalibration(CodecError):
    """The calibration holds fewer tokens than the fit can use, or lacks the sample a baseline asks for."""
