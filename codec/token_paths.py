"""Token ids coded with a model's next-token distribution, in a way that another pass's rounding cannot spoil.

Axes: n tokens, V vocabulary, W bits of the largest id.

A token is a path of yes/no decisions: is it the model's first choice (the candidate)? If not, the W bits of its id from the top, each with the odds
that the model's probabilities, the candidate's taken out, give to the two halves of the ids still possible. A coder needs the same probability on
both sides to the last bit, but logits come from passes of different shapes on different machines. So odds only count in coarse steps, and each
token is coded on the first of several shifted grids of steps that has no border within `margin` of any odds on its path. A token without such a
grid, or whose candidate leads by less than the margin, is written as it is. Logits whose odds are off by less than the margin then give the same ids.
What chance a step stands for is learned while coding, in integers.

Ids are cut into lanes of equal length (the last may be shorter) that know nothing of each other, so that a model can decode many at once; in every
step each lane codes one token. A lane's first token is written as it is. The code's first byte is the number of lanes, its top bit the coarse step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from codec.binary_coder import ONE, Bit, BitCoder, BitDecoder, BitEncoder
from codec.errors import BadInput, CorruptedCode

MAX_LANES = 64
MAX_ODDS = 8.0  # natural logarithm; surer decisions cost nothing worth telling apart
FINE_STEP, COARSE_STEP = 1.0, 2.0
SHIFTS = (0.5, 0.0, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875)  # of the grid's borders, in steps; the first puts none at odds of 0 or MAX_ODDS
PLAIN = len(SHIFTS)
_SMOOTHING = 2.0**-10  # share of the uniform distribution: no token is impossible, and no odds rest on tiny sums
_LEAST = 1e-14
_TRUST = 30  # observations that a step's own odds count for
_COARSE = 128
_REMEDY = "restore it from a copy, or start again without it"
# The lanes' previous tokens -> logits [lanes, V] of their next ones. The first call opens the lanes; later ones may have fewer: the last lane ended.
NextLogits = Callable[[list[int]], Tensor]


@dataclass(frozen=True)
class Paths:
    """What a model says about known tokens: candidate int64 [n]; lead float64 [n], the logits between it and the second choice; odds float64
    [n, 1 + W], natural log-odds of the candidate and of a 1 at each bit of the token's id."""

    candidate: np.ndarray
    lead: np.ndarray
    odds: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Paths]) -> Paths:
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("candidate", "lead", "odds")))

    def at(self, rows: np.ndarray) -> Paths:
        """Some of the rows."""
        return Paths(self.candidate[rows], self.lead[rows], self.odds[rows])

    def drift(self, other: Paths) -> float:
        """Largest difference of the odds, over the tokens where both have the same candidate; where they have not, the smaller lead."""
        same = self.candidate == other.candidate
        odds = np.abs(self.odds - other.odds)[same].max(initial=0.0)
        return float(max(odds, np.minimum(self.lead, other.lead)[~same].max(initial=0.0)))


class Distribution:
    """Answers for the odds of rows of logits [n, V] of any float type; NaN and infinities count as extreme."""

    def __init__(self, logits: Tensor, width: int) -> None:
        logits = logits.double().nan_to_num(-1e4, 1e4, -1e4)
        self.width, vocab_size = width, logits.shape[1]
        top = logits.topk(min(2, vocab_size), dim=1)
        probabilities = torch.softmax(logits, 1) * (1 - _SMOOTHING) + _SMOOTHING / vocab_size
        best = probabilities.gather(1, top.indices[:, :1])[:, 0]
        self.candidate = top.indices[:, 0].cpu().numpy()
        self.lead = (top.values[:, 0] - top.values[:, -1]).cpu().numpy()
        self._best = best.cpu().numpy()
        self.candidate_odds = _odds(self._best, 1 - self._best)
        self._sums = torch.nn.functional.pad(probabilities.cumsum(1), (1, 0)).cpu().numpy()

    def bit_odds(self, rows: np.ndarray, prefix: np.ndarray, depth: int) -> np.ndarray:
        """[m] float64, by rows [m], of a 1 at bit `depth` (0 the highest) of ids whose bits above it are `prefix` [m]; the candidate's own share does
        not count."""
        half = 1 << (self.width - depth - 1)
        low = prefix * (2 * half)
        middle, last = low + half, self._sums.shape[1] - 1
        start, split, end = (self._sums[rows, np.minimum(at, last)] for at in (low, middle, middle + half))
        candidate, best = self.candidate[rows], self._best[rows]
        inside, upper = (candidate >= low) & (candidate < middle + half), candidate >= middle
        return _odds(end - split - best * (inside & upper), split - start - best * (inside & ~upper))

    def paths(self, ids: np.ndarray) -> Paths:
        """What the rows say about tokens ids int64 [n], one a row."""
        rows = np.arange(len(ids))
        bits = [self.bit_odds(rows, ids >> (self.width - depth), depth) for depth in range(self.width)]
        return Paths(self.candidate, self.lead, np.stack([self.candidate_odds, *bits], 1))


def _odds(yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    return np.clip(np.log(np.maximum(yes, _LEAST)) - np.log(np.maximum(no, _LEAST)), -MAX_ODDS, MAX_ODDS)


def width_of(vocab_size: int) -> int:
    """Bits of the largest id."""
    return max(1, (vocab_size - 1).bit_length())


class _TokenCoder:
    """Codes one token at a time; the same steps write and read."""

    def __init__(self, coder: BitCoder, width: int, step: float) -> None:
        self._coder, self._width, self._step = coder, width, step
        self._shifted = [Bit(ONE // 32), *(Bit(ONE // 16) for _ in range(len(SHIFTS) - 1))]
        self._chances: dict[tuple[bool, int], Bit] = {}

    def plain(self, token: int) -> int:
        """A token as it is."""
        for at in reversed(range(self._width)):
            token = token & ~(1 << at) | self._coder.code(token >> at & 1, ONE // 2) << at
        return token

    def token(self, token: int, candidate: int, odds: Callable[[int, int], float], grid: int = 0) -> int:
        """Code a token (any number when reading). odds(depth, prefix): of the candidate at depth -1, of the bits from 0 on. grid: index into
        SHIFTS, or PLAIN; reading finds it out."""
        found = 0
        while found < PLAIN and self._shifted[found].code(self._coder, grid > found):
            found += 1
        if found == PLAIN:
            return self.plain(token)
        if self._decision(token == candidate, odds(-1, 0), True, found):
            return candidate
        prefix = 0
        for depth in range(self._width):
            bit = token >> (self._width - depth - 1) & 1
            prefix = 2 * prefix + self._decision(bit, odds(depth, prefix), False, found)
        return prefix

    def _decision(self, bit: int, odds: float, first: bool, grid: int) -> int:
        key = first, math.floor(odds / self._step + SHIFTS[grid])
        if key not in self._chances:
            self._chances[key] = Bit(round(ONE / (1 + math.exp(-key[1] * self._step))), weight=_TRUST)
        return self._chances[key].code(self._coder, int(bit))


def lane_length(count: int, lanes: int) -> int:
    """Tokens a lane."""
    return max(1, -(-count // lanes))


def lane_order(count: int, lanes: int) -> list[list[int]]:
    """Indices of the tokens coded in each step, lanes in order."""
    length = lane_length(count, lanes)
    return [list(range(at, count, length)) for at in range(min(count, length))]


def _read_head(data: bytes) -> tuple[int, float]:
    """(lanes, step). Raises CorruptedCode."""
    lanes = data[0] & ~_COARSE if data else 0
    if not 1 <= lanes <= MAX_LANES:
        raise CorruptedCode("the header of the token ids is damaged", _REMEDY)
    return lanes, COARSE_STEP if data[0] & _COARSE else FINE_STEP


def encode_paths(ids: Sequence[int], paths: Paths, vocab_size: int, lanes: int, margin: float) -> bytes:
    """Code ids [n]; paths [n]: the model's word on each of them, given those before it in its lane (a lane's first row is not used).

    Raises BadInput for ids outside the vocabulary, or a number of lanes that is not 1 to MAX_LANES.
    """
    if not all(0 <= token < vocab_size for token in ids):
        raise BadInput("token ids outside the vocabulary", f"give ids below {vocab_size}")
    if not 1 <= lanes <= MAX_LANES:
        raise BadInput(f"{lanes} lanes of token ids", f"use 1 to {MAX_LANES}")
    step = FINE_STEP if margin < 1 / 16 else COARSE_STEP
    grids = _grids(np.asarray(ids), paths, step, margin).tolist()
    encoder = BitEncoder()
    coder = _TokenCoder(encoder, width_of(vocab_size), step)
    for at, rows in enumerate(lane_order(len(ids), lanes)):
        for n in rows:
            if at == 0:
                coder.plain(ids[n])
            else:
                coder.token(ids[n], int(paths.candidate[n]), _known(paths.odds[n]), grids[n])
    return bytes([lanes | (_COARSE if step == COARSE_STEP else 0)]) + encoder.finish()


def _grids(ids: np.ndarray, paths: Paths, step: float, margin: float) -> np.ndarray:
    """For each token the first grid, [n] int64, none of whose borders lies within the margin of a decision; PLAIN where there is none."""
    grids = np.full(len(ids), PLAIN)
    for grid in reversed(range(PLAIN)):
        scaled, reach = paths.odds / step + SHIFTS[grid], margin / step
        near = np.floor(scaled - reach) != np.floor(scaled + reach)
        near[paths.candidate == ids, 1:] = False
        grids[~near.any(1)] = grid
    grids[paths.lead < margin] = PLAIN
    return grids


def decode_paths(data: bytes, count: int, vocab_size: int, next_logits: NextLogits) -> list[int]:
    """Inverse of encode_paths, the model supplied by next_logits. Raises CorruptedCode; a wrong model gives that or wrong ids: compare a checksum."""
    lanes, step = _read_head(data)
    width = width_of(vocab_size)
    decoder = BitDecoder(data[1:])
    coder = _TokenCoder(decoder, width, step)
    ids = [0] * count
    for at, rows in enumerate(lane_order(count, lanes)):
        found = Distribution(next_logits([ids[n - 1] for n in rows]), width) if at else None
        for lane, n in enumerate(rows):
            ids[n] = coder.plain(0) if found is None else coder.token(0, int(found.candidate[lane]), _asked(found, lane))
            if ids[n] >= vocab_size:
                raise CorruptedCode("a token id is outside the vocabulary", _REMEDY)
    decoder.finish()
    return ids


def reads_back(data: bytes, ids: Sequence[int], paths: Paths, vocab_size: int) -> bool:
    """Whether decode_paths gives ids when its model says what `paths` records of another pass over them: up to the first wrong token, such a pass
    and a decoder's steps are the same."""
    lanes, step = _read_head(data)
    decoder = BitDecoder(data[1:])
    coder = _TokenCoder(decoder, width_of(vocab_size), step)
    try:
        for at, rows in enumerate(lane_order(len(ids), lanes)):
            for n in rows:
                if ids[n] != (coder.token(0, int(paths.candidate[n]), _known(paths.odds[n])) if at else coder.plain(0)):
                    return False
        decoder.finish()
    except CorruptedCode:
        return False
    return True


def _known(path: np.ndarray) -> Callable[[int, int], float]:
    return lambda depth, _: float(path[depth + 1])


def _asked(found: Distribution, lane: int) -> Callable[[int, int], float]:
    """The odds of one row, worked out when they are asked for."""
    row = np.array([lane])

    def odds(depth: int, prefix: int) -> float:
        return float(found.candidate_odds[lane] if depth < 0 else found.bit_odds(row, np.array([prefix]), depth)[0])

    return odds
