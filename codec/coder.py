"""Entropy coding of many spans at once: `kernels.rans` where Triton runs (on a GPU); elsewhere the numpy coder, whose streams compiled code decodes
where llvmlite is installed (`kernels.cpu_decode`). All read and write the same words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from codec.choice import CLASSES_PER_LEVEL, classes_before_gain, own_classes
from codec.errors import CorruptedCode
from codec.rans import DAMAGED, RansTables, SpanStream, decode, encode, num_lanes
from codec.rate import EntropyModel
from kernels import rans as kernel
from kernels.cpu_decode import compiled_available, compiled_loads
from kernels.dispatch import use_triton
from kernels.upload import upload, upload_arrays

if TYPE_CHECKING:
    from kernels.cpu_decode.coded import SpanTables

_INT16_MAX = 32767
"""Above every class's limit, so that an integer clamped to it still codes as the escape."""


class SpanCoder:
    """rANS with an entropy model's tables, of tensors on `device`."""

    def __init__(self, model: EntropyModel, device: torch.device | str = "cpu"):
        self.model, self.device = model, torch.device(device)

    @cached_property
    def _numpy_tables(self) -> RansTables:
        return RansTables.build(self.model)

    @cached_property
    def _kernel_tables(self) -> kernel.RansTables:
        model = self.model
        parts = (torch.from_numpy(x.astype(np.int64)) for x in (model.freqs, model.limit, model.gain_freqs))
        return kernel.build_tables(*parts).to(self.device)

    @cached_property
    def _span_tables(self) -> SpanTables:
        from kernels.cpu_decode.coded import SpanTables

        own = self._numpy_tables
        entries, gain_entries = (
            (start << 16 | freq).astype(np.int32) for start, freq in ((own.start, own.freq), (own.gain_start, own.gain_freq))
        )
        centres = (self.model.offset[:-1] + self.model.limit).astype(np.int32)
        return SpanTables(own.slot_symbol, entries, centres, own.gain_slot, gain_entries)

    def encode(
        self, q: torch.Tensor, base: torch.Tensor, levels: torch.Tensor, gains: torch.Tensor, sizes: Sequence[int], tokens_per_lane: int
    ) -> list[SpanStream]:
        """Streams of spans of `sizes` tokens, one after the other in q.

        Args:
            q: int32 [T, K]; values beyond a class's limit become the escape symbol (the caller stores the remainder).
            base: int32 [K], the components' classes. levels: int32 [T], step levels. gains: uint8 [T].
        """
        if not self._on_kernels(q):
            if q.device.type == "cpu" and compiled_available() and compiled_loads():
                from kernels.cpu_decode.coded import rans_encode

                own = classes_before_gain(base, levels).numpy()
                limits = self.model.limit.astype(np.int32)
                coded_spans = rans_encode(self._span_tables, limits, q.numpy(), own, gains.numpy(), sizes, tokens_per_lane)
                return [SpanStream(size, *stream) for size, stream in zip(sizes, coded_spans, strict=True)]
            own = own_classes(base[None], levels[:, None]).cpu().numpy()
            return encode(self._numpy_tables, q.cpu().numpy(), own, gains.cpu().numpy(), list(sizes), tokens_per_lane)
        # the kernel reads a component's integers of neighbouring tokens together
        narrow = q.clamp(-_INT16_MAX, _INT16_MAX).to(torch.int16).t().contiguous().t()
        coded = kernel.rans_encode(
            self._kernel_tables,
            narrow,
            base,
            gains,
            self._starts(sizes),
            tokens_per_lane,
            shifts=-CLASSES_PER_LEVEL * levels,
            max_span_tokens=max(sizes),
        )
        told = torch.cat((coded.word_starts, coded.states.long())).cpu().numpy()  # one copy, as a GPU is waited for
        word_ends, states = told[: len(coded.word_starts)].tolist(), told[len(coded.word_starts) :].astype(np.uint32)
        words = coded.words[: word_ends[-1]].cpu().numpy().view(np.uint16)
        lane_ends = np.cumsum([0, *(num_lanes(size, tokens_per_lane) for size in sizes)])
        return [
            SpanStream(size, states[lane_ends[n] : lane_ends[n + 1]], words[word_ends[n] : word_ends[n + 1]])
            for n, size in enumerate(sizes)
        ]

    def decode(
        self, streams: Sequence[SpanStream], base: torch.Tensor, levels: torch.Tensor, tokens_per_lane: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Inverse of encode: q int [T, K] (the escape reads limit + 1), gains uint8 [T], and intact bool [spans], all on the device.

        Nothing is waited for.

        intact: None where the streams were checked already. Raises CorruptedCode if a stream is found to be damaged by then.
        """
        sizes = [s.num_tokens for s in streams]
        if sum(len(s.states) for s in streams) != sum(num_lanes(size, tokens_per_lane) for size in sizes):
            raise CorruptedCode(*DAMAGED)
        if not self._on_kernels(base):
            states = np.concatenate([s.states for s in streams])
            own = classes_before_gain(base, levels).cpu().numpy()
            if compiled_available() and compiled_loads():
                return (*self._decode_compiled(streams, states, sizes, own, tokens_per_lane), None)
            parts = np.split(own, np.cumsum(sizes)[:-1]) if len(own) > 1 else [own] * len(sizes)
            q, gains = decode(self._numpy_tables, list(streams), parts, tokens_per_lane)
            return torch.from_numpy(q).to(self.device), torch.from_numpy(gains).to(self.device), None
        # the kernel reads no word before or after its span's own; a span without words still needs an address
        coded = kernel.RansStreams(
            upload_arrays([s.states.view(np.int32) for s in streams], self.device),
            upload_arrays([*(s.words.view(np.int16) for s in streams), np.zeros(1, np.int16)], self.device),
            self._starts([len(s.words) for s in streams]),
        )
        return kernel.rans_decode(
            self._kernel_tables,
            coded,
            base,
            self._starts(sizes),
            tokens_per_lane,
            num_tokens=sum(sizes),
            shifts=-CLASSES_PER_LEVEL * levels,
            max_span_tokens=max(sizes),
        )

    def _decode_compiled(
        self, streams: Sequence[SpanStream], states: np.ndarray, sizes: Sequence[int], own: np.ndarray, tokens_per_lane: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from kernels.cpu_decode.coded import rans_decode

        q, gains, intact = rans_decode(self._span_tables, states, [s.words for s in streams], sizes, own, tokens_per_lane)
        if not intact:
            raise CorruptedCode(*DAMAGED)
        return torch.from_numpy(q).to(self.device), torch.from_numpy(gains).to(self.device)

    def _on_kernels(self, components: torch.Tensor) -> bool:
        """Whether the kernels code tensors like this one; they read a first component, which there may not be."""
        return components.shape[-1] > 0 and use_triton(components)

    def _starts(self, sizes: Sequence[int]) -> torch.Tensor:
        """int64 [n + 1]: where each part starts, the total last."""
        return upload([0, *np.cumsum(sizes).tolist()], self.device)
