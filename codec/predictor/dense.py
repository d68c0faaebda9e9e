"""The linear map from features to the target's keys and values at full rank, in 4-bit numbers.

Its spectrum falls slowly (cutting it to a rank of a tenth costs a third more bits of residual), while rounding it against the features' covariance
costs next to nothing: so the budget goes to all directions in few bits, not to few directions in many.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from codec.errors import PredictorError
from codec.predictor.features import FeatureSpec, rms_normalise
from codec.predictor.gptq import LowBitWeights, pack_nibbles, unpack_nibbles
from codec.predictor.low_rank import Predictor, check_target_rows


class DensePredictor:
    """Predicts KV vectors with all of the features at once; `reduce` only normalises them. Same interface as `Predictor`.

    Args:
        spec: the features, the draft's first, then the target's.
        weight: [F, D], for standardised features; its dtype is the one the product runs in.
        mean, std: float32 [F], of the rms-normalised features.
        mu: float32 [D], the mean KV vector.
        draft_size: E of the model that drafts.
        attention: float32 [F] or None: from the same features, the log2 of how much errors in a token's KV matter later, less its mean.
        level_strength: how far a token's step follows that, from 0 to 1.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        weight: Tensor,
        mean: Tensor,
        std: Tensor,
        mu: Tensor,
        draft_size: int,
        attention: Tensor | None = None,
        level_strength: float = 0.0,
    ) -> None:
        self.spec, self.weight, self.mean, self.std, self.mu, self.draft_size = spec, weight, mean, std, mu, draft_size
        self.attention, self.level_strength = attention, level_strength
        self._split = len(spec.taps) * draft_size

    @property
    def rank(self) -> int:
        return min(self.weight.shape)

    @property
    def dim(self) -> int:
        """D, elements of a predicted KV vector."""
        return self.weight.shape[1]

    def reduce(self, rows: Tensor) -> Tensor:
        """float32 [n, taps * E]: hidden states rows [n, taps, E], rms-normalised and standardised."""
        if rows.shape[1:] != (len(self.spec.taps), self.draft_size):
            what = f"features of shape {tuple(rows.shape)} do not fit the predictor"
            raise PredictorError(what, f"take {len(self.spec.taps)} taps of {self.draft_size} channels: {self.spec.taps}")
        flat = rms_normalise(rows.to(self.weight.device)).flatten(1)
        return (flat - self.mean[: self._split]) / self.std[: self._split]

    @property
    def matrix(self) -> Tensor:
        """[F, D]: the prediction is mu + inputs @ matrix."""
        return self.weight

    def inputs(self, latents: Tensor, target_rows: Tensor | None) -> Tensor:
        """float32 [n, F]: standardised features, from reduced ones [n, taps * E] and the target's hidden states [n, target taps, E_t]."""
        parts = [latents.to(self.weight.device, torch.float32)]
        if self.spec.target_taps:
            rows = rms_normalise(check_target_rows(self.spec, target_rows).to(self.weight.device)).flatten(1)
            parts.append((rows - self.mean[self._split :]) / self.std[self._split :])
        return torch.cat(parts, 1)

    def predict(self, latents: Tensor, target_rows: Tensor | None) -> Tensor:
        """KV vectors float32 [n, D] from reduced features [n, taps * E] and the target's hidden states [n, target taps, E_t]."""
        return self.mu + (self.inputs(latents, target_rows).to(self.weight.dtype) @ self.weight).float()

    def predict_features(self, features: Tensor) -> Tensor:
        """KV vectors float32 [n, D] from raw features [n, F] (`join_features`)."""
        return self.mu + (((features - self.mean) / self.std).to(self.weight.dtype) @ self.weight).float()

    def log2_step(self, latents: Tensor, target_rows: Tensor | None) -> Tensor | None:
        """How many octaves each token's quantiser step should lie above the usual one, float32 [n]; None when all are to be treated alike.

        Equal marginal returns put the step at sensitivity ** -1/2; sensitivities that are themselves estimates are followed less far.
        """
        if self.attention is None or self.level_strength <= 0:
            return None
        return -0.5 * self.level_strength * (self.inputs(latents, target_rows) @ self.attention)

    def octaves_of_features(self, features: Tensor) -> Tensor | None:
        """`log2_step` from raw features [n, F] (`join_features`)."""
        if self.attention is None or self.level_strength <= 0:
            return None
        return -0.5 * self.level_strength * (((features - self.mean) / self.std) @ self.attention)

    def to(self, device: torch.device | str) -> DensePredictor:
        """The same predictor with its tensors on `device`."""
        weight, mean, std, mu = (t.to(device) for t in (self.weight, self.mean, self.std, self.mu))
        attention = None if self.attention is None else self.attention.to(device)
        return DensePredictor(self.spec, weight, mean, std, mu, self.draft_size, attention, self.level_strength)

    # --- the pack's form ------------------------------------------------------------------------------------------------

    @staticmethod
    def pack(
        spec: FeatureSpec, draft_size: int, weights: LowBitWeights, mean: Tensor, std: Tensor, mu: Tensor, attention: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and settings to store. Raises PredictorError for other than 4 bits."""
        if weights.bits != 4:
            raise PredictorError(f"a predictor of {weights.bits} bits", "round it to 4")
        tensors = {
            "dense": pack_nibbles(weights.codes),
            "dense.scale": weights.scale,
            "mean": mean.float(),
            "std": std.float(),
            "mu": mu.float(),
        }
        if attention is not None:
            tensors["attention"] = attention.float()
        return tensors, spec.as_settings() | {"draft_size": draft_size, "group": weights.group}

    @classmethod
    def from_pack(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], device: torch.device | str = "cpu") -> DensePredictor:
        """Inverse of `pack`; the product runs in bfloat16 on a GPU and float32 on a CPU. Raises PredictorError when something is missing."""
        try:
            t = {name: tensor.to(device) for name, tensor in tensors.items()}
            spec = FeatureSpec.from_settings(settings)
            codes = unpack_nibbles(t["dense"], len(t["mu"]))
            dtype = torch.bfloat16 if t["mu"].is_cuda else torch.float32
            weight = LowBitWeights(codes, t["dense.scale"], 4, int(settings["group"])).dense(dtype)
            strength = float(settings.get("level_strength", 0.0))
            return cls(spec, weight, t["mean"], t["std"], t["mu"], int(settings["draft_size"]), t.get("attention"), strength)
        except KeyError as error:
            raise PredictorError(f"the pack holds no predictor: {error.args[0]} is missing", "calibrate the pack again") from error


_REMEDY = "calibrate the pack again"

AnyPredictor = DensePredictor | Predictor


def predictor_spec(settings: Mapping[str, Any]) -> FeatureSpec:
    """Which features a pack's predictor looks at, without its weights. Raises PredictorError where the pack does not say, or names impossible
    layers."""
    for name in ("taps", "target_taps"):
        taps = settings.get(name)
        if not isinstance(taps, (list, tuple)) or not all(isinstance(i, int) and 0 <= i < 1 << 16 for i in taps):
            raise PredictorError(f"the pack's predictor has the {name} {taps!r}", _REMEDY)
    return FeatureSpec.from_settings(settings)


def load_predictor(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], device: torch.device | str = "cpu") -> AnyPredictor:
    """The predictor of a pack, whichever form it has.

    Raises:
        PredictorError: something is missing, of another shape or type, or not finite.
    """
    try:
        predictor_spec(settings)
        made: AnyPredictor = (DensePredictor if "dense" in tensors else Predictor).from_pack(tensors, settings, device)
        if isinstance(made, DensePredictor):
            num_features = made.weight.shape[0]
            right = made.weight.ndim == 2 and made.mean.shape == made.std.shape == (num_features,) and made.mu.shape == (made.dim,)
            right = right and bool((made.std > 0).all()) and 0 <= made.level_strength <= 1
            right = right and (made.attention is None or made.attention.shape == (num_features,))
            numbers = [made.weight, made.mean, made.std, made.mu, *([] if made.attention is None else [made.attention])]
        else:
            num_features = made.down.shape[0]
            right = made.down.ndim == made.up.ndim == 2 and made.offset.shape == (made.down.shape[1],) == (made.rank,)
            right = right and made.mu.shape == (made.dim,)
            numbers = [made.down, made.offset, made.up, made.mu]
        # what the draft's taps leave is the target's, in equal parts
        own = num_features - len(made.spec.taps) * made.draft_size
        right = right and made.draft_size >= 1 and own >= 0 and own % max(len(made.spec.target_taps), 1) == 0
        right = right and (own > 0) == bool(made.spec.target_taps) and all(bool(t.isfinite().all()) for t in numbers)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, RuntimeError) as error:
        if isinstance(error, PredictorError):
            raise
        raise PredictorError(f"the pack holds no predictor that can be used: {error}", _REMEDY) from error
    if not right:
        raise PredictorError("the pack's predictor contradicts itself, or holds numbers that are not finite", _REMEDY)
    return made
