"""What every baseline has in common: the interface, the exact sinks, the frame, the checks on input.

Axes: T tokens, L coded layers, G KV heads, d head size, D = L * 2 * G * d, M = G * d (one layer's keys, or values). KV comes as pre-
RoPE float32 [T, D] in (layer, K|V, head, channel) order. The first four tokens are stored exactly as bf16 by every baseline and counted.
Recent-token windows of the papers (128 exact tokens in KVTC and AQUA-KV) are left out, as the cache is at rest; KIVI keeps its own as
it defines its bits.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from baselines.calibration import Calibration
from baselines.errors import NotFitted
from baselines.frame import read_frame, write_frame
from baselines.packing import from_bytes, to_bytes
from codec.errors import BadInput
from codec.spec import NUM_SINKS, KvLayout


class Baseline(ABC):
    """A codec to be beaten. encode() gives real bytes; decode() uses those bytes and the fitted state only.

    Attributes:
        method, quality: which line and which point of a plot this is; name = "method-quality" (or the method alone).
        needs_calibration: whether fit() must be called first.
        fitted: tensors the decoder needs; moved by to(), fingerprinted into every code.
    """

    method = ""
    needs_calibration = False

    def __init__(self, layout: KvLayout, quality: str = ""):
        self.layout, self.quality = layout, quality
        self.device = torch.device("cpu")
        self.fitted: dict[str, torch.Tensor] = {}
        self._fingerprint = 0

    @property
    def name(self) -> str:
        return f"{self.method}-{self.quality}" if self.quality else self.method

    def fit(self, calibration: Calibration | torch.Tensor) -> None:
        """Learns the state from calibration: moments with a sample, or just a sample float32 [n, D] (sinks left out by the caller)."""
        if isinstance(calibration, torch.Tensor):
            calibration = Calibration.from_sample(self.layout, calibration)
        if calibration.layout != self.layout:
            raise BadInput(f"the calibration is of {calibration.layout}, the baseline of {self.layout}", "use one layout for both")
        self._fit(calibration)
        checksum = 0
        for key in sorted(self.fitted):
            content = self.fitted[key].contiguous().cpu().view(torch.uint8).numpy().tobytes()
            checksum = zlib.crc32(content, zlib.crc32(key.encode(), checksum))
        self._fingerprint = checksum

    def to(self, device: torch.device | str) -> Baseline:
        """Moves the fitted state; encode() accepts KV from any device and decode() returns it on this one."""
        self.device = torch.device(device)
        self.fitted = {key: value.to(self.device) for key, value in self.fitted.items()}
        return self

    def encode(self, kv: torch.Tensor) -> bytes:
        """float32 [T, D], T >= 1, to bytes; BadInput on another shape or non-finite values, NotFitted before fit()."""
        return self.encode_many([kv])[0]

    def encode_many(self, kvs: Sequence[torch.Tensor], workers: int = 1) -> list[bytes]:
        """encode() of several sequences, each to bytes of its own; `workers` threads where sequences are coded one by one."""
        self._require_fit()
        checked = [self._checked(kv) for kv in kvs]
        own = iter(self._encode_many([kv[NUM_SINKS:] for kv in checked if len(kv) > NUM_SINKS], workers))
        return [
            write_frame(
                self.name,
                self.layout.dim,
                self._fingerprint,
                len(kv),
                to_bytes(kv[:NUM_SINKS], torch.bfloat16),
                next(own) if len(kv) > NUM_SINKS else [],
            )
            for kv in checked
        ]

    def _checked(self, kv: torch.Tensor) -> torch.Tensor:
        if kv.ndim != 2 or kv.shape[1] != self.layout.dim or not len(kv):
            raise BadInput(f"KV of shape {list(kv.shape)}", f"give [T, {self.layout.dim}] with at least one token")
        kv = kv.to(self.device, torch.float32)
        if not bool(torch.isfinite(kv).all()):
            raise BadInput("the KV holds NaN or infinity", "check the model that produced it")
        return kv

    def decode(self, data: bytes) -> torch.Tensor:
        """Bytes of encode() to float32 [T, D]; a named CodecError when they are not intact or not this baseline's."""
        return self.decode_many([data])[0]

    def decode_many(self, codes: Sequence[bytes], workers: int = 1) -> list[torch.Tensor]:
        """decode() of several sequences."""
        self._require_fit()
        frames = [read_frame(data, self.name, self.layout.dim, self._fingerprint) for data in codes]
        longer = [f for f in frames if f.num_tokens > NUM_SINKS]
        own = iter(self._decode_many([f.sections for f in longer], [f.num_tokens - NUM_SINKS for f in longer], workers))
        out = []
        for frame in frames:
            num_sinks = min(frame.num_tokens, NUM_SINKS)
            sinks = from_bytes(frame.sinks, torch.bfloat16, (num_sinks, self.layout.dim), self.device)
            out.append(torch.cat([sinks, next(own)]) if frame.num_tokens > num_sinks else sinks)
        return out

    def _require_fit(self) -> None:
        if self.needs_calibration and not self.fitted:
            raise NotFitted(f"{self.name} has no calibration", "call fit() with KV of calibration text first")

    def layers(self, kv: torch.Tensor) -> torch.Tensor:
        """[T, D] as [T, L, 2, M]."""
        return kv.reshape(len(kv), self.layout.coded_layers, 2, -1)

    def _fit(self, calibration: Calibration) -> None:
        """Fills self.fitted on self.device; nothing to do for a baseline that needs no calibration."""
        return None

    def _encode_many(self, kvs: Sequence[torch.Tensor], workers: int) -> list[list[bytes]]:
        """_encode of each sequence. The byte coders (DEFLATE, Zstandard, packing) let go of the interpreter, so threads help."""
        return _in_threads(self._encode, [(kv,) for kv in kvs], workers)

    def _decode_many(self, sections: Sequence[list[bytes]], num_tokens: Sequence[int], workers: int) -> list[torch.Tensor]:
        """_decode of each sequence."""
        return _in_threads(self._decode, list(zip(sections, num_tokens, strict=True)), workers)

    @abstractmethod
    def _encode(self, kv: torch.Tensor) -> list[bytes]:
        """float32 [T, D] without sinks, T >= 1, to sections."""

    @abstractmethod
    def _decode(self, sections: list[bytes], num_tokens: int) -> torch.Tensor:
        """Inverse of _encode: float32 [num_tokens, D] on self.device."""


def _in_threads(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], workers: int) -> list[Any]:
    """function(*each of arguments), in order."""
    if workers <= 1 or len(arguments) <= 1:
        return [function(*one) for one in arguments]
    # the first product of a new thread would else run before torch's number of threads reaches it, and round differently
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool:
        return list(pool.map(lambda one: function(*one), arguments))
