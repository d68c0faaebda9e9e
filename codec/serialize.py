"""Keys and values to bytes and back for any engine: the codec as a library that knows tensors only.

An engine hands over a run of tokens: keys and values as its attention uses them, their positions, and the features that the codec parameters' predictor
looks at (hidden states of a draft, or of the target's first layers). Bytes come back; with the same features, keys and values come back from these.

Axes: T tokens, L coded layers, G KV heads, d head size, D = L * 2 * G * d, E hidden size of the model the features come from.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from codec.codec import Earlier
from codec.container import read_sections, write_sections
from codec.errors import BadInput, CorruptedCode
from codec.layouts import KeyRotation
from codec.pack import CodecPack
from codec.pages import Chunk, EntropyDecoded, LayerRows
from codec.residuals import Residuals
from codec.spans import SpanCodec, SpanEncoder
from codec.spec import SPAN_TOKENS

MAGIC, VERSION = b"FTLDRUNS", 1
_HEAD = struct.Struct("<QI")  # first position, tokens
_REMEDY = "encode it again"


class Features(NamedTuple):
    """Hidden states of T tokens, any float dtype. draft_rows [T, taps, E] of the model that drafts; target_rows [T, target taps, E_t] of the target.
    Either is None where the predictor looks at none (`KvSerializer.spec`)."""

    draft_rows: torch.Tensor | None
    target_rows: torch.Tensor | None

    @property
    def tokens(self) -> int:
        """T; 0 where the predictor looks at nothing."""
        return next((len(rows) for rows in self if rows is not None), 0)

    def part(self, start: int, end: int) -> Features:
        """Of tokens [start, end)."""
        return Features(*(None if rows is None else rows[start:end] for rows in self))


class KvSerializer:
    """Codes runs of tokens with one pack.

    Args:
        pack: the codec parameters.
        rotation: of the keys that are handed over and given back; None: they are not rotated.
        device: where everything runs. dtype: as of `SpanCodec`.

    Raises:
        PredictorError: the pack holds no predictor.
    """

    def __init__(
        self,
        pack: CodecPack,
        rotation: KeyRotation | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.pack, self.layout, self.rotation = pack, pack.layout, rotation
        self._spans = SpanCodec(pack, device, dtype)
        self.codec, self.predictor, self.pages = self._spans.codec, self._spans.predictor, self._spans.pages
        self.spec = self.predictor.spec

    def inputs(self, features: Features, tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the predictor takes of so many tokens. Raises BadInput or PredictorError where the features are others'."""
        rows = features.draft_rows
        if rows is None:
            if self.spec.taps:
                raise BadInput("no hidden states of the draft", f"pass [T, {len(self.spec.taps)}, E], after layers {self.spec.taps}")
            rows = torch.zeros(tokens, 0, self.predictor.draft_size, dtype=torch.float32, device=self.codec.device)
        if len(rows) != tokens or (features.target_rows is not None and len(features.target_rows) != tokens):
            raise BadInput(f"features that are not those of {tokens} tokens", "pass a row a token")
        return self.predictor.reduce(rows), features.target_rows if self.spec.target_taps else None

    def encode(
        self,
        rows: torch.Tensor,
        features: Features,
        sizes: Sequence[int],
        quality: str | float,
        earlier: Callable[[Residuals], Sequence[Earlier | None]] | None = None,
    ) -> list[bytes]:
        """Spans of `sizes` tokens each, of rows float32 [T, D] with keys before rotation.

        quality: a name, whose promised divergence is kept where the pack states its curve (`codec.fidelity`), else a fixed step; or a step.
        earlier: says what each span is coded against, of the spans' residuals.
        """
        if sum(sizes) != len(rows):
            raise BadInput(f"spans of {sum(sizes)} tokens for {len(rows)}", "cover all of them")
        rows = rows.to(self.codec.device)
        encoder = SpanEncoder(self._spans, self.inputs(features, len(rows)), sizes, lambda a, b: rows[a:b])
        encoder.quantise(quality, earlier=None if earlier is None else earlier(encoder.residuals))
        return encoder.write()

    def decode(self, spans: Sequence[bytes | memoryview], features: Features) -> torch.Tensor:
        """Rows float32 [T, D] of consecutive spans, keys before rotation. Raises the codec's named errors; nothing damaged comes out."""
        parts = self.pages.start(spans, beside=False)
        tokens = sum(sum(part.decoded.sizes) for part in parts)
        out = torch.empty(tokens, self.layout.dim, dtype=torch.float32, device=self.codec.device)
        for at, rows in self.pages.rows(parts, *self.inputs(features, tokens)):
            out[at] = rows
        self.pages.check(parts)
        return out

    def decode_layers(
        self, parts: Sequence[EntropyDecoded], features: Sequence[Features], chunks: Sequence[Chunk] | None = None
    ) -> LayerRows:
        """What `decode` gives, layer by layer, of spans that `pages.start` was given. features: of the same tokens, in parts. chunks: of
        `pages.chunks`, where they were made before.

        Raises the codec's named errors; nothing damaged comes out.
        """
        taken = [self.inputs(some, some.tokens) for some in features]
        latents = torch.cat([rows for rows, _ in taken])
        target_rows = [rows for _, rows in taken if rows is not None]
        found = self.pages.layers(
            parts, self.pages.chunks(parts) if chunks is None else chunks, latents, torch.cat(target_rows) if target_rows else None
        )
        self.pages.check(parts)
        return found

    def join(self, kv: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rows float32 [T, D] of kv [T, L, 2, G, d], keys rotated as the engine's."""
        expected = (self.layout.coded_layers, 2, self.layout.num_kv_heads, self.layout.head_dim)
        if kv.shape[1:] != expected or len(positions) != len(kv):
            raise BadInput(
                f"KV of shape {list(kv.shape)} at {len(positions)} positions", f"pass [T, {', '.join(map(str, expected))}] and [T]"
            )
        kv = kv.to(self.codec.device, torch.float32)
        if self.rotation is not None:
            kv = torch.stack([self.rotation.unrotate(kv[:, :, 0], positions), kv[:, :, 1]], 2)
        return kv.flatten(1)

    def split(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Inverse of `join`: float32 [T, L, 2, G, d]."""
        kv = rows.view(len(rows), self.layout.coded_layers, 2, self.layout.num_kv_heads, self.layout.head_dim)
        if self.rotation is not None:
            kv = torch.stack([self.rotation.rotate(kv[:, :, 0], positions), kv[:, :, 1]], 2)
        return kv

    def serialize(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, features: Features, quality: str | float = "balanced"
    ) -> bytes:
        """Bytes of a run of tokens.

        Args:
            keys, values: [L, T, G, d], the layers that the pack codes, keys rotated as `rotation` says.
            positions: int64 [T], consecutive.

        Raises:
            BadInput: shapes or positions do not fit, or the KV holds NaN or infinity. UnknownQuality: as it says.
        """
        if keys.shape != values.shape or keys.ndim != 4 or not keys.shape[1] or len(positions) != keys.shape[1]:
            raise BadInput(
                f"keys {list(keys.shape)}, values {list(values.shape)}, {len(positions)} positions", "pass [L, T, G, d] of each, T > 0"
            )
        first, tokens = int(positions[0]), len(positions)
        if first < 0 or not torch.equal(positions.cpu().long(), torch.arange(first, first + tokens)):
            raise BadInput("positions that do not follow one another", "serialize one run of tokens at a time")
        rows = self.join(torch.stack([keys, values], 2).transpose(0, 1), positions)
        sizes = [min(SPAN_TOKENS, tokens - at) for at in range(0, tokens, SPAN_TOKENS)]
        spans = self.encode(rows, features, sizes, quality)
        return write_sections([("HEAD", _HEAD.pack(first, tokens)), *(("SPAN", span) for span in spans)], MAGIC, VERSION)

    def deserialize(self, data: bytes | memoryview, features: Features) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values float32 [L, T, G, d] and positions int64 [T] of what `serialize` wrote, given the same tokens' features.

        Raises:
            ForeignCode, NewerCode, TruncatedCode, CorruptedCode, PackMismatch: as the names say. BadInput: features of other tokens.
        """
        sections = read_sections(data, MAGIC, VERSION)
        if [name for name, _ in sections] != ["HEAD", *["SPAN"] * (len(sections) - 1)] or len(sections[0][1]) != _HEAD.size:
            raise CorruptedCode("the run's sections are not those of one", _REMEDY)
        first, tokens = _HEAD.unpack(sections[0][1])
        spans = [body for _, body in sections[1:]]
        if sum(code.num_tokens for code in self.codec.read(spans)) != tokens or not tokens or first >= 1 << 40:
            raise CorruptedCode("the run's spans do not cover its tokens", _REMEDY)
        positions = torch.arange(first, first + tokens)
        keys, values = self.split(self.decode(spans, features), positions).permute(2, 1, 0, 3, 4)
        return keys, values, positions


def serialize(
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    features: Features,
    pack: CodecPack,
    *,
    quality: str | float = "balanced",
    rotation: KeyRotation | None = None,
) -> bytes:
    """`KvSerializer.serialize` on a CPU, for a single call; who codes more keeps a serializer, which holds tables."""
    return KvSerializer(pack, rotation).serialize(keys, values, positions, features, quality)


def deserialize(
    data: bytes | memoryview, features: Features, pack: CodecPack, *, rotation: KeyRotation | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`KvSerializer.deserialize` on a CPU, for a single call."""
    return KvSerializer(pack, rotation).deserialize(data, features)


__all__ = ["Features", "KvSerializer", "deserialize", "serialize"]
