"""A codec pack: all that coding and decoding one pair's KV needs, in one safetensors file.

Weights, transform and entropy tables belong to this package. The predictor's tensors and settings travel along as an opaque dictionary: the codec
does not know where a prediction comes from. A digest over everything closes the file, fingerprints tie it to its models.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from codec.errors import BadInput, CorruptedCode, ForeignCode, NewerCode, PackMismatch
from codec.rate import EntropyModel
from codec.rows import ROW_BITS, dequantise_rows, quantise_rows
from codec.spec import KvLayout
from codec.transform import Transform
from codec.weighting import Weighting

PACK_VERSION = 2
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
    """

    layout: KvLayout
    kind: str
    stored: dict[str, torch.Tensor]
    predictor: dict[str, torch.Tensor]
    predictor_settings: dict
    fingerprints: dict[str, str]
    info: dict = field(default_factory=dict)

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
        stored = {"weight": weighting.root.half().cpu(), "variance": transform.variance.float().cpu()}
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

    def with_model(self, model: EntropyModel, variance: torch.Tensor | None = None) -> CodecPack:
        """The same pack with other entropy tables (and component variances)."""
        stored = self.stored | _model_tensors(model)
        if variance is not None:
            stored["variance"] = variance.float().cpu()
        return CodecPack(self.layout, self.kind, stored, self.predictor, self.predictor_settings, self.fingerprints, self.info)

    @cached_property
    def weighting(self) -> Weighting:
        return Weighting.from_root(self.stored["weight"])

    @cached_property
    def transform(self) -> Transform:
        width = self.layout.dim if self.kind == "global" else self.layout.layer_dim
        names = ("codes", "step", "peak")
        parts = [dequantise_rows({name: self.stored[f"basis.{bits}.{name}"] for name in names}, width) for bits in ROW_BITS]
        layer = self.stored["basis.layer"].long() if self.kind == "per_layer" else None
        return Transform(self.kind, torch.cat(parts), layer, self.stored["variance"], len(parts[0]))

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
            "version": PACK_VERSION,
            "layout": self.layout.as_dict(),
            "transform": self.kind,
            "predictor_settings": self.predictor_settings,
            "fingerprints": self.fingerprints,
            "info": self.info,
        }

    def save(self, path: str | Path) -> None:
        """Writes the file under a temporary name and renames it, so a half-written pack is never found."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + f".{os.getpid()}.part")
        try:
            save_file(
                {k: v.contiguous() for k, v in self._tensors().items()},
                temporary,
                {"foretold": json.dumps(self._meta()), "digest": self.digest},
            )
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> CodecPack:
        """Reads and checks a pack. Raises ForeignCode, NewerCode or CorruptedCode; FileNotFoundError as usual."""
        if not Path(path).is_file():
            raise FileNotFoundError(path)
        remedy = "calibrate it again with scripts/calibrate.py"
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CorruptedCode(f"the codec pack {path} cannot be read: {error}", remedy) from error
        try:
            meta = json.loads(metadata["foretold"])
            if meta["kind"] != _KIND:
                raise KeyError("kind")
            version = int(meta["version"])
        except (KeyError, TypeError, ValueError) as error:
            raise ForeignCode(f"{path} is not a codec pack", "check the path") from error
        if version > PACK_VERSION:
            raise NewerCode(f"the codec pack has format version {version}, this program reads version {PACK_VERSION}", "update the program")
        if version < PACK_VERSION:
            raise PackMismatch(f"the codec pack has format version {version}, this program reads version {PACK_VERSION}", remedy)
        if metadata.get("digest") != _digest(tensors, meta):
            raise CorruptedCode(f"the codec pack {path} is damaged", remedy)
        own = {k: v for k, v in tensors.items() if not k.startswith(_PREDICTOR)}
        other = {k[len(_PREDICTOR) :]: v for k, v in tensors.items() if k.startswith(_PREDICTOR)}
        return cls(
            KvLayout(**meta["layout"]), meta["transform"], own, other, meta["predictor_settings"], meta["fingerprints"], meta["info"]
        )


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
