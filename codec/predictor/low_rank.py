"""The linear map from features to the target's pre-RoPE keys and values, a product of rank r in 8-bit numbers.

prediction = mu + (features - mean) / std @ down @ up; standardisation is folded into `down` and `offset`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from codec.errors import PredictorError
from codec.predictor.features import EPS, FeatureSpec, join_features, rms_normalise
from kernels.dispatch import use_triton
from kernels.normed_linear import SplitWeight, normed_linear, split

_TILED_ROWS = 64  # fewer do not fill a tile of the GPU's kernel


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, M] and one float32 scale a row [N] of x [N, M]."""
    scale = x.abs().amax(1).clamp_min(1e-30).float() / 127
    return torch.round(x / scale[:, None]).clamp_(-127, 127).to(torch.int8), scale


class Predictor:
    """Predicts KV vectors in two steps: `reduce` hidden states to r numbers when they appear, `predict` when KV is coded or decoded.

    Args:
        spec: the features.
        down: float32 [F, r], for rms-normalised features, taps first, then the embedding; scaled by 1 / std already.
        offset: float32 [r], minus the features' means through `down`.
        up: float32 [r, D].
        mu: float32 [D], the mean KV vector.
        draft_size: E of the model that drafts.
    """

    def __init__(self, spec: FeatureSpec, down: Tensor, offset: Tensor, up: Tensor, mu: Tensor, draft_size: int) -> None:
        self.spec, self.down, self.offset, self.up, self.mu, self.draft_size = spec, down, offset, up, mu, draft_size
        self._split = len(spec.taps) * draft_size

    @property
    def rank(self) -> int:
        return self.up.shape[0]

    @property
    def dim(self) -> int:
        """D, elements of a predicted KV vector."""
        return self.up.shape[1]

    def reduce(self, rows: Tensor) -> Tensor:
        """float32 [n, r] from hidden states rows [n, taps, E]: the taps' share of the latent vector."""
        if rows.shape[1:] != (len(self.spec.taps), self.draft_size):
            what = f"features of shape {tuple(rows.shape)} do not fit the predictor"
            raise PredictorError(what, f"take {len(self.spec.taps)} taps of {self.draft_size} channels: {self.spec.taps}")
        return self._product(rows.to(self.down.device), 0) + self.offset

    def _product(self, rows: Tensor, part: int) -> Tensor:
        """float32 [n, r]: normalised hidden states [n, states, E] times their rows of `down`: part 0 the taps', 1 the target's. On a GPU of states in
        bfloat16 by its matrix units, to 16 bits: a float32 product of all taps took half as long there as the pass that makes them."""
        if rows.dtype == torch.bfloat16 and len(rows) >= _TILED_ROWS and use_triton(rows, self.down):
            return normed_linear(rows, self._split_down[part], EPS)
        return rms_normalise(rows).flatten(1) @ (self.down[: self._split], self.down[self._split :])[part]

    @cached_property
    def _split_down(self) -> tuple[SplitWeight, SplitWeight]:
        return split(self.down[: self._split]), split(self.down[self._split :])

    @property
    def matrix(self) -> Tensor:
        """[r, D]: the prediction is mu + inputs @ matrix."""
        return self.up

    def inputs(self, latents: Tensor, target_rows: Tensor | None) -> Tensor:
        """float32 [n, r] from reduced features [n, r] and the target's hidden states [n, target taps, E_t] (None without such taps)."""
        total = latents.to(self.down.device, torch.float32)
        if self.spec.target_taps:
            rows = check_target_rows(self.spec, target_rows).to(self.down.device)
            total = total + self._product(rows, 1)
        return total

    def predict(self, latents: Tensor, target_rows: Tensor | None) -> Tensor:
        """KV vectors float32 [n, D] from what `inputs` takes."""
        return torch.addmm(self.mu, self.inputs(latents, target_rows), self.up)

    def predict_features(self, features: Tensor) -> Tensor:
        """KV vectors float32 [n, D] from raw features [n, F] (`join_features`)."""
        return torch.addmm(self.mu, features @ self.down + self.offset, self.up)

    def log2_step(self, latents: Tensor, target_rows: Tensor | None) -> Tensor | None:
        """None: a low-rank predictor knows nothing of how much a token's errors matter."""
        return None

    def octaves_of_features(self, features: Tensor) -> Tensor | None:
        """As `log2_step`."""
        return None

    def __call__(self, rows: Tensor, target_rows: Tensor | None) -> Tensor:
        """`predict(reduce(rows), target_rows)`: float32 [n, D] from hidden states [n, taps, E] and [n, target taps, E_t]."""
        return self.predict(self.reduce(rows), target_rows)

    def to(self, device: torch.device | str) -> Predictor:
        """The same predictor with its tensors on `device`."""
        moved = (t.to(device) for t in (self.down, self.offset, self.up, self.mu))
        down, offset, up, mu = moved
        return Predictor(self.spec, down, offset, up, mu, self.draft_size)

    # --- the pack's form ------------------------------------------------------------------------------------------------

    @staticmethod
    def pack(
        spec: FeatureSpec, draft_size: int, down: Tensor, offset: Tensor, up: Tensor, mu: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and settings to store: `down` in 8 bits with a scale a row, `up` in 8 bits with a scale a row and a scale a column.

        KV channels differ in size by orders of magnitude, hence the columns' own scales.
        """
        column = up.pow(2).mean(0).sqrt().clamp_min(1e-12)
        down_codes, down_scale = to_int8(down)
        up_codes, up_scale = to_int8(up / column)
        tensors = {
            "down": down_codes,
            "down.scale": down_scale,
            "offset": offset.float(),
            "up": up_codes,
            "up.scale": up_scale,
            "up.column": column.float(),
            "mu": mu.float(),
        }
        return tensors, spec.as_settings() | {"draft_size": draft_size}

    @classmethod
    def from_pack(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], device: torch.device | str = "cpu") -> Predictor:
        """Inverse of `pack` up to the rounding. Raises PredictorError when something is missing."""
        try:
            t = {name: tensor.to(device) for name, tensor in tensors.items()}
            spec = FeatureSpec.from_settings(settings)
            down = t["down"].float() * t["down.scale"][:, None]
            up = t["up"].float() * t["up.scale"][:, None] * t["up.column"]
            return cls(spec, down, t["offset"], up, t["mu"], int(settings["draft_size"]))
        except KeyError as error:
            raise PredictorError(f"the pack holds no predictor: {error.args[0]} is missing", "calibrate the pack again") from error


def check_target_rows(spec: FeatureSpec, target_rows: Tensor | None) -> Tensor:
    """target_rows [n, target taps, E_t] themselves. Raises PredictorError when they are not what the spec asks for."""
    if target_rows is None or target_rows.ndim != 3 or target_rows.shape[1] != len(spec.target_taps):
        raise PredictorError("the predictor needs the target's hidden states", f"pass target_rows of taps {spec.target_taps}")
    return target_rows


def zero_prediction(tensors: Mapping[str, Tensor], num_tokens: int) -> Tensor:
    """The mean KV vector for every token, float32 [n, D]: what is predicted where no features exist, and the baseline to compare with."""
    return tensors["mu"].expand(num_tokens, -1).clone()


__all__ = ["FeatureSpec", "Predictor", "check_target_rows", "join_features", "to_int8", "zero_prediction"]
