"""A codec pack: all that coding and decoding one pair's KV needs, in one safetensors file.

Weights, transform and entropy tables belong to this package. The predictor's tensors and settings travel along as an opaque dictionary: the codec
does not know where a prediction comes from. A digest over everything closes the file, fingerprints tie it to its models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as serialised

from codec.divergence import DivergenceCurve
from codec.errors import BadInput, CorruptedCode, ForeignCode, NewerCode, PackMismatch
from codec.rate import EntropyModel
from codec.rows import GROUP, ROW_BITS, dequantise_rows, quantise_rows
from codec.spec import KvLayout
from codec.transform import Fallback, Transform, assembled_fallback
from codec.weighting import Weighting
from kernels.files import write_bytes

PACK_VERSION = 3
"""Of packs with a fallback basis; others are written as the version before, which knows none."""

_FIRST_VERSION = 2
_FALLBACK_BITS = 8
_KIND = "foretold-codec-pack"
_PREDICTOR = "predictor."


@dataclass
class CodecPack:
    """What KvCodec works from, in the numbers that the file holds (rounded to 8 bits and fewer), so that saving and loading changes nothing.

    Args:
        layout: which elements are coded.
        stored: the file's tensors, without the predictor's.
        predictor: the predictor's tensors, names and meaning its own.
        predictor_settings: JSON-able settings of the predictor.
        fingerprints: "target", "draft", "tokenizer", "text" -> digest.
        info: figures of the calibration (tokens, held-out R2, ideal bits per element).
        kind: "global" or "per_layer".
        later: figures measured since, which replace those of `info`. Nothing that is decoded depends on them: they are no part of the digest, and
            files coded before stay readable.
    """

    layout: KvLayout
    kind: str
    stored: dict[str, torch.Tensor]
    predictor: dict[str, torch.Tensor]
    predictor_settings: dict
    fingerprints: dict[str, str]
    info: dict = field(default_factory=dict)
    later: dict = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        layout: KvLayout,
        weighting: Weighting,
        transform: Transform,
        model: EntropyModel,
        *,
        predictor: dict[str, torch.Tensor],
        predictor_settings: dict,
        fingerprints: dict[str, str],
        info: dict | None = None,
        row_bits: Sequence[int] | None = None,
    ) -> CodecPack:
        """Rounds and gathers the parts. row_bits: of the transform's rows, falling (`codec.rows.allocate_bits`); None stores all in 8."""
        row_bits = [8] * transform.num_components if row_bits is None else list(row_bits)
        if row_bits != sorted(row_bits, reverse=True) or len(row_bits) != transform.num_components:
            raise BadInput("bits of the transform's rows do not fit", f"pass {transform.num_components} falling numbers")
        stored = {"weight": weighting.sensitivity_sqrt.half().cpu(), "variance": transform.variance.float().cpu()}
        at = 0
        for bits in ROW_BITS:
            parts = quantise_rows(transform.basis[at : at + row_bits.count(bits)], bits)
            stored |= {f"basis.{bits}.{name}": part for name, part in parts.items()}
            at += row_bits.count(bits)
        if transform.layer is not None:
            stored["basis.layer"] = transform.layer.to(torch.int16).cpu()
        stored |= _model_tensors(model)
        return cls(
            layout,
            transform.kind,
            stored,
            {k: v.detach().cpu().contiguous() for k, v in predictor.items()},
            predictor_settings,
            dict(fingerprints),
            info or {},
        )

    def with_info(self, more: dict) -> CodecPack:
        """The same pack with more figures, which replace those of their names, measured later or not."""
        later = {name: figure for name, figure in self.later.items() if name not in more}
        return replace(self, info=self.info | more, later=later)

    @property
    def figures(self) -> dict:
        """All that is stated of the pack, the latest first."""
        return self.info | self.later

    def with_later(self, more: dict) -> CodecPack:
        """The same pack, its digest unchanged, with more figures that were measured since."""
        return replace(self, later=self.later | more)

    @cached_property
    def curve(self) -> DivergenceCurve | None:
        """Of divergence over distortion, as measured at calibration; None where that was not done."""
        return DivergenceCurve.from_info(self.figures)

    def with_model(self, model: EntropyModel, variance: torch.Tensor | None = None) -> CodecPack:
        """The same pack with other entropy tables (and component variances)."""
        stored = self.stored | _model_tensors(model)
        if variance is not None:
            stored["variance"] = variance.float().cpu()
        return replace(self, stored=stored)

    def with_fallback(self, fallback: Fallback, variance: torch.Tensor, model: EntropyModel) -> CodecPack:
        """The same pack with a fallback basis behind its rows, entropy tables for both, and the variances of all components, float32 [K + D]."""
        rows = fallback.basis.flatten(0, 1)[fallback.order]
        parts = {f"fallback.{name}": part for name, part in quantise_rows(rows, _FALLBACK_BITS).items()}
        parts["fallback.layer"] = (fallback.order // fallback.basis.shape[1]).to(torch.int16).cpu()
        stored = self.stored | parts | {"variance": variance.float().cpu()} | _model_tensors(model)
        return replace(self, stored=stored)

    @property
    def version(self) -> int:
        """Of the format that its file takes."""
        return PACK_VERSION if "fallback.codes" in self.stored else _FIRST_VERSION

    @cached_property
    def weighting(self) -> Weighting:
        return Weighting.from_sensitivity_sqrt(self.stored["weight"])

    @cached_property
    def transform(self) -> Transform:
        width = self.layout.dim if self.kind == "global" else self.layout.layer_dim
        names = ("codes", "step", "peak")
        parts = [dequantise_rows({name: self.stored[f"basis.{bits}.{name}"] for name in names}, width) for bits in ROW_BITS]
        layer = self.stored["basis.layer"].long() if self.kind == "per_layer" else None
        fallback = None
        if "fallback.codes" in self.stored:
            rows = dequantise_rows({name: self.stored[f"fallback.{name}"] for name in names}, self.layout.layer_dim)
            fallback = assembled_fallback(rows, self.stored["fallback.layer"].long())
        return Transform(self.kind, torch.cat(parts), layer, self.stored["variance"], len(parts[0]), fallback)

    @cached_property
    def model(self) -> EntropyModel:
        s = self.stored
        model = EntropyModel(
            s["table.probs"].double().numpy(),
            s["table.freqs"].numpy(),
            s["table.gain_probs"].double().numpy(),
            s["table.gain_freqs"].numpy(),
            s["table.centroids"].numpy(),
        )
        model.check()
        return model

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, which is the file's size up to its header."""
        return sum(t.numel() * t.element_size() for t in (*self.stored.values(), *self.predictor.values()))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decoding depends on, and of the fingerprints."""
        return _digest(self._tensors(), self._meta())

    @property
    def tag(self) -> int:
        """First 32 bits of the digest; every span carries it."""
        return int(self.digest[:8], 16)

    def check(self, fingerprints: dict[str, str]) -> None:
        """PackMismatch unless every given fingerprint equals the pack's."""
        for role, value in fingerprints.items():
            if self.fingerprints.get(role) != value:
                raise PackMismatch(f"the codec pack was made for another {role}", "calibrate one for this pair with scripts/calibrate.py")

    def _tensors(self) -> dict[str, torch.Tensor]:
        return self.stored | {_PREDICTOR + k: v for k, v in self.predictor.items()}

    def _meta(self) -> dict:
        return {
            "kind": _KIND,
            "version": self.version,
            "layout": self.layout.as_dict(),
            "transform": self.kind,
            "predictor_settings": self.predictor_settings,
            "fingerprints": self.fingerprints,
            "info": self.info,
        }

    def save(self, path: str | Path) -> None:
        """Writes the whole file or none of it (`kernels.files.atomic_file`). Raises OSError."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.contiguous() for k, v in self._tensors().items()}
        metadata = {"foretold": json.dumps(self._meta()), "digest": self.digest}
        if self.later:
            metadata["later"] = json.dumps(self.later, sort_keys=True)
            metadata["later_digest"] = _digest({}, self.later)
        write_bytes(path, serialised(tensors, metadata))

    @classmethod
    def load(cls, path: str | Path) -> CodecPack:
        """Reads and checks a pack: all that it says of itself, the shapes of its tensors, and that every number is finite.

        Raises ForeignCode, NewerCode, PackMismatch (an older format) or CorruptedCode; FileNotFoundError when there is no such file.
        """
        try:
            found = Path(path).is_file()
        except (OSError, ValueError):  # a name that no system takes
            found = False
        if not found:
            raise FileNotFoundError(path)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except Exception as error:  # the library has errors of many types for headers and for dtypes it cannot turn into tensors
            raise CorruptedCode(f"the codec pack {path} cannot be read: {error}", _REMEDY) from error
        try:
            meta = json.loads(metadata["foretold"])
            if meta["kind"] != _KIND:
                raise KeyError("kind")
            version = meta["version"]
            if not isinstance(version, int) or isinstance(version, bool):
                raise TypeError("version")
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ForeignCode(f"{path} is not a codec pack", "check the path") from error
        if version > PACK_VERSION:
            raise NewerCode(f"the codec pack has format version {version}, this program reads version {PACK_VERSION}", "update the program")
        if version < _FIRST_VERSION:
            raise PackMismatch(f"the codec pack has format version {version}, this program reads version {PACK_VERSION}", _REMEDY)
        if metadata.get("digest") != _digest(tensors, meta):
            raise CorruptedCode(f"the codec pack {path} is damaged", _REMEDY)
        later = _later_of(metadata, path)
        own = {k: v for k, v in tensors.items() if not k.startswith(_PREDICTOR)}
        other = {k[len(_PREDICTOR) :]: v for k, v in tensors.items() if k.startswith(_PREDICTOR)}
        layout = _checked_meta(meta)
        pack = cls(layout, meta["transform"], own, other, meta["predictor_settings"], meta["fingerprints"], meta["info"], later)
        if version != pack.version:
            raise CorruptedCode(f"the codec pack {path} has the tensors of format version {pack.version}, not {version}", _REMEDY)
        pack._check_tensors()
        return pack

    def _check_tensors(self) -> None:
        """CorruptedCode unless the tensors are those of the layout, finite, and of a weighting that can be undone."""
        d, width = self.layout.head_dim, self.layout.dim if self.kind == "global" else self.layout.layer_dim
        stored, rows = dict(self.stored), 0
        _expect(stored, "weight", torch.float16, (self.layout.num_blocks, d, d))
        for bits in ROW_BITS:
            codes = stored.get(f"basis.{bits}.codes")
            count = codes.shape[0] if codes is not None and codes.ndim else 0
            _expect(stored, f"basis.{bits}.codes", torch.uint8, (count, bits, -(-width // 8)))
            _expect(stored, f"basis.{bits}.step", torch.uint8, (count, -(-width // GROUP)))
            _expect(stored, f"basis.{bits}.peak", torch.float32, (count,), low=0.0)
            rows += count
        if "fallback.codes" in stored:
            own, short = self.layout.dim, self.layout.layer_dim
            _expect(stored, "fallback.codes", torch.uint8, (own, _FALLBACK_BITS, -(-short // 8)))
            _expect(stored, "fallback.step", torch.uint8, (own, -(-short // GROUP)))
            _expect(stored, "fallback.peak", torch.float32, (own,), low=0.0)
            layer = _expect(stored, "fallback.layer", torch.int16, (own,))
            if not bool((layer.sort().values == torch.arange(own) // short).all()):
                raise CorruptedCode("the rows of the pack's fallback basis are not those of its layers", _REMEDY)
            own += rows
        else:
            own = rows
        _expect(stored, "variance", torch.float32, (own,), low=0.0)
        if self.kind == "per_layer":
            layer = _expect(stored, "basis.layer", torch.int16, (rows,))
            if rows and not 0 <= int(layer.min()) <= int(layer.max()) < self.layout.coded_layers:
                raise CorruptedCode("the pack's transform speaks of layers that are not coded", _REMEDY)
        for name, kind in _TABLES.items():
            table = _expect(stored, name, kind, None)
            if table.ndim != (2 if name == "table.centroids" else 1):
                raise CorruptedCode(f"the pack's {name} has the shape {list(table.shape)}", _REMEDY)
        if stored:
            raise CorruptedCode(f"the pack holds {sorted(stored)[0]!r}, which is no part of one", _REMEDY)
        for name, tensor in self.predictor.items():
            _finite(f"{_PREDICTOR}{name}", tensor)
        self.model.check()
        try:
            inverse = self.weighting.inverse
        except RuntimeError as error:  # a singular block
            raise CorruptedCode("the pack's weighting cannot be undone", _REMEDY) from error
        _finite("weighting", inverse)


_REMEDY = "calibrate it again with scripts/calibrate.py"
_TABLES = {
    "table.probs": torch.float32,
    "table.freqs": torch.uint16,
    "table.gain_probs": torch.float32,
    "table.gain_freqs": torch.uint16,
    "table.centroids": torch.float32,
}
_LAYOUT_BOUNDS = {"num_layers": 1 << 16, "num_kv_heads": 1 << 16, "head_dim": 1 << 16, "first_layer": 1 << 16}


def _later_of(metadata: dict[str, str], path: str | Path) -> dict:
    """The figures measured since a pack was made; CorruptedCode where they are not what was written."""
    if "later" not in metadata:
        return {}
    try:
        later = json.loads(metadata["later"])
    except (ValueError, RecursionError):
        later = None
    if not isinstance(later, dict) or metadata.get("later_digest") != _digest({}, later):
        raise CorruptedCode(f"the codec pack {path} is damaged", _REMEDY)
    DivergenceCurve.from_info(later)
    return later


def _checked_meta(meta: dict) -> KvLayout:
    """The layout in a pack's description. CorruptedCode unless every field is of its type, and every count a whole number within bounds."""
    layout = meta.get("layout")
    if not isinstance(layout, dict) or set(layout) != set(_LAYOUT_BOUNDS):
        raise CorruptedCode("the pack does not describe a KV layout", _REMEDY)
    for name, high in _LAYOUT_BOUNDS.items():
        if not isinstance(layout[name], int) or isinstance(layout[name], bool) or not 0 <= layout[name] <= high:
            raise CorruptedCode(f"the pack's layout has an impossible {name}", _REMEDY)
    if meta.get("transform") not in ("global", "per_layer"):
        raise CorruptedCode("the pack names no kind of transform", _REMEDY)
    if not all(isinstance(meta.get(name), dict) for name in ("predictor_settings", "fingerprints", "info")):
        raise CorruptedCode("the pack's description lacks its settings, fingerprints or figures", _REMEDY)
    if not all(isinstance(value, str) for value in meta["fingerprints"].values()):
        raise CorruptedCode("the pack's fingerprints are no texts", _REMEDY)
    DivergenceCurve.from_info(meta["info"])
    try:
        return KvLayout(**layout)
    except BadInput as error:
        raise CorruptedCode(f"the pack has an {error.what}", _REMEDY) from error


def _expect(
    stored: dict[str, torch.Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...] | None, low: float | None = None
) -> torch.Tensor:
    """Takes a tensor out of `stored`. CorruptedCode unless it is there, of this dtype and shape, finite, and nowhere below `low`."""
    tensor = stored.pop(name, None)
    if tensor is None:
        raise CorruptedCode(f"the pack lacks {name}", _REMEDY)
    if tensor.dtype != dtype or (shape is not None and tuple(tensor.shape) != shape):
        wanted = "" if shape is None else f" of shape {list(shape)}"
        raise CorruptedCode(f"the pack's {name} is {tensor.dtype} of shape {list(tensor.shape)} instead of {dtype}{wanted}", _REMEDY)
    _finite(name, tensor)
    if low is not None and tensor.numel() and float(tensor.min()) < low:
        raise CorruptedCode(f"the pack's {name} holds numbers below {low:g}", _REMEDY)
    return tensor


def _finite(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise CorruptedCode(f"the pack's {name} holds numbers that are not finite", _REMEDY)


def _model_tensors(model: EntropyModel) -> dict[str, torch.Tensor]:
    return {
        "table.probs": torch.from_numpy(np.asarray(model.probs, np.float32)),
        "table.freqs": torch.from_numpy(np.asarray(model.freqs, np.uint16)),
        "table.gain_probs": torch.from_numpy(np.asarray(model.gain_probs, np.float32)),
        "table.gain_freqs": torch.from_numpy(np.asarray(model.gain_freqs, np.uint16)),
        "table.centroids": torch.from_numpy(np.asarray(model.centroids, np.float32)),
    }


def _digest(tensors: dict[str, torch.Tensor], meta: dict) -> str:
    sha = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        sha.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        sha.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
