"""Products of a few rows with a weight matrix, added to the residual stream; `reference.py` says what they mean."""

from kernels.skinny_linear.tiles import Tile

__all__ = ["Tile"]
