"""Launch shapes of the products of a decode step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """How a product is cut: output channels of a program, columns of a step (slices * block_k), programs that share a row's columns (splits).

    held: steps (up to 3) whose weights a program keeps in registers, loaded before it waits for the kernel before it.
    lines: cache lines of each weight row that a program asks for before that wait (0: none).
    scalar: ordinary multiply-adds for a single token, instead of matrix instructions.
    """

    block_n: int = 16
    block_k: int = 128
    slices: int = 4
    splits: int = 1
    warps: int = 4
    stages: int = 4
    lines: int = 0
    scalar: bool = False
    held: int = 0


def held_steps(width: int, tile: Tile) -> int:
    """Steps to hold: no more than a split has."""
    return min(tile.held, 3, -(-width // (tile.block_k * tile.slices * tile.splits)))


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def token_block(tokens: int, tile: Tile) -> int:
    """Columns of a program's result: 1 on the ordinary units, else a power of two from 8 on (the narrow side of a matrix instruction)."""
    return 1 if tile.scalar and tokens == 1 else max(8, next_power_of_2(tokens))
