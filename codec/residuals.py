"""What predictions of spans leave over, and its components: each computed once, whoever asks (references, the plan, the quantiser).

Axes: T tokens, D elements of a token, K components.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from codec.errors import BadInput
from codec.spec import KvLayout
from codec.transform import Transform
from codec.weighting import Weighting

Pair = tuple[torch.Tensor, torch.Tensor]
"""Truth and prediction of some tokens, [T, D] each."""

SAMPLED_EVERY = 8
"""Of a span's tokens, one in so many tells whether a fallback basis would make its code shorter."""


class Projection:
    """Residuals to components.

    Args:
        layout, weighting, transform: of the pack, on `device`.
        dtype: of the products with the transform. In bfloat16 a component's error is some thousandths of it, where the quantiser's is tenths.
    """

    def __init__(self, layout: KvLayout, weighting: Weighting, transform: Transform, device: torch.device, dtype: torch.dtype) -> None:
        self.layout, self.weighting, self.device, self.dtype = layout, weighting, device, dtype
        self.transform = transform if dtype == torch.float32 else transform.rounded(dtype)

    def weighted(self, truth: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """Weighted residual, float32 [T, D]. Raises BadInput for tensors of another shape."""
        if truth.shape != prediction.shape or truth.ndim != 2 or truth.shape[1] != self.layout.dim:
            raise BadInput(
                f"truth {tuple(truth.shape)} and prediction {tuple(prediction.shape)} do not fit",
                f"pass two [T, {self.layout.dim}] tensors",
            )
        return self.weighting.whiten(truth.to(self.device, torch.float32) - prediction.to(self.device, torch.float32))

    def components(self, z: torch.Tensor, count: int, rows: torch.Tensor | None = None) -> torch.Tensor:
        """First `count` components, float32 [T, count], of weighted residuals z [T, D]. rows: see `Transform.project`. Raises BadInput when they are
        not finite."""
        c = self.transform.project(z, count, rows)
        if not bool(torch.isfinite(c.sum())):
            raise BadInput("the KV to be coded holds NaN or infinity", "the model overflowed; try float32")
        return c


class Residuals:
    """The residuals of some spans that follow one another, and their components.

    Truth and prediction are read span by span when they are needed, and not kept: of a long session they would be hundreds of megabytes.

    Args:
        projection: to components.
        sizes: tokens of each span.
        read: truth and prediction of the spans [first, last), [T, D] each.
        joined_tokens: of most spans that are read and projected together; 0 for one span at a time.
        ahead: among them those behind the ones that are asked for.
    """

    def __init__(
        self, projection: Projection, sizes: Sequence[int], read: Callable[[int, int], Pair], joined_tokens: int, *, ahead: bool = False
    ) -> None:
        self.projection, self.sizes = projection, list(sizes)
        self._read, self._joined_tokens, self._ahead = read, joined_tokens, ahead
        self._known: list[torch.Tensor | None] = [None] * len(self.sizes)  # components of each, as many as anybody asked for
        self._energy: list[torch.Tensor | None] = [None] * len(self.sizes)
        self._sampled: list[torch.Tensor | None] = [None] * len(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def pair(self, number: int) -> Pair:
        """Truth and prediction of one span."""
        return self._read(number, number + 1)

    def components(self, numbers: Sequence[int], count: int) -> torch.Tensor:
        """First `count` components of some spans, one after the other, float32 [sum T, count]. Raises BadInput as `Projection`."""
        self._find(numbers, count)
        parts = [known[:, :count] for n in numbers if (known := self._known[n]) is not None]
        return torch.cat(parts) if parts else torch.empty(0, count, dtype=torch.float32, device=self.projection.device)

    def energy(self, numbers: Sequence[int]) -> torch.Tensor:
        """Squared length of every token's weighted residual, float32 [sum T]."""
        self._find(numbers, 0)
        return torch.cat([e for n in numbers if (e := self._energy[n]) is not None])

    def sampled_components(self, numbers: Sequence[int]) -> torch.Tensor:
        """All components, the fallback basis's too, of every token of some spans whose number in its span SAMPLED_EVERY divides."""
        rows = self.projection.transform.num_rows
        self._find(numbers, rows)
        z = torch.cat([s for n in numbers if (s := self._sampled[n]) is not None])
        first = torch.cat([known[::SAMPLED_EVERY, :rows] for n in numbers if (known := self._known[n]) is not None])
        return self.projection.components(z, self.projection.transform.num_components, first)

    def _find(self, numbers: Sequence[int], count: int) -> None:
        missing = {n for n in numbers if (known := self._known[n]) is None or known.shape[1] < count}
        if not missing:
            return
        ahead = self._ahead and count <= self.projection.transform.num_rows
        for first in sorted(missing):
            if first not in missing:
                continue
            last, tokens = first + 1, self.sizes[first]
            while last < len(self.sizes) and tokens + self.sizes[last] <= self._joined_tokens:
                if last not in missing and not (ahead and self._known[last] is None):  # which somebody will ask for
                    break
                tokens, last = tokens + self.sizes[last], last + 1
            missing.difference_update(range(first, last))
            self._project(first, last, count)

    def _project(self, first: int, last: int, count: int) -> None:
        """Components of the spans [first, last), which are read together."""
        projection, sizes = self.projection, self.sizes[first:last]
        truth, prediction = self._read(first, last)
        z = projection.weighted(truth, prediction)
        rows = projection.transform.num_rows
        along = [known for own in self._known[first:last] if (known := own) is not None and known.shape[1] >= rows]
        known_rows = torch.cat([own[:, :rows] for own in along]) if count > rows and len(along) == last - first else None
        c = projection.components(z, count, known_rows)
        energy = z.pow(2).sum(1)
        complete = projection.transform.fallback is not None
        for n, own, own_energy, own_z in zip(range(first, last), c.split(sizes), energy.split(sizes), z.split(sizes), strict=True):
            self._known[n], self._energy[n] = own, own_energy
            if complete and self._sampled[n] is None:
                self._sampled[n] = own_z[::SAMPLED_EVERY].clone()

    def keep(self, number: int, count: int) -> None:
        """Give back what nobody needs of a span of which `count` components will be coded."""
        known = self._known[number]
        self._sampled[number] = None
        if known is not None and known.shape[1] > count:
            self._known[number] = known[:, :count].clone()


def residuals_of(pairs: Sequence[Pair], projection: Projection, joined_tokens: int, *, ahead: bool = False) -> Residuals:
    """Of (truth, prediction) [T, D] of each span. Raises BadInput for a pair of different shapes."""
    for truth, prediction in pairs:
        if truth.shape != prediction.shape:
            projection.weighted(truth, prediction)  # says what does not fit
    alike = len({(t.shape[1:], t.dtype) for pair in pairs for t in pair}) <= 1

    def read(first: int, last: int) -> Pair:
        if last == first + 1:
            return pairs[first]
        truth, prediction = (torch.cat([pair[i].to(projection.device) for pair in pairs[first:last]]) for i in (0, 1))
        return truth, prediction

    return Residuals(projection, [len(truth) for truth, _ in pairs], read, joined_tokens if alike else 0, ahead=ahead)
