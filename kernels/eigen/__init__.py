"""Truncated eigendecomposition, shared by the codec's transform and the predictor's rank reduction."""

from kernels.eigen.reference import leading_eigenvectors

__all__ = ["leading_eigenvectors"]
