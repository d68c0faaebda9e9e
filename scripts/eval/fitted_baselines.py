"""Baseline codecs in the place of ours: conversations' KV coded to their bytes and decoded over itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baselines import make_baseline
from baselines.base import Baseline
from codec.spec import KvLayout
from engine.errors import InvalidOption
from engine.kv.pool import KvSequence
from engine.runtime.core import EngineCore
from eval.codec_quality import Quality

_CONTEXT = 1024
_SAMPLE_TOKENS = 4096


class FittedBaselines:
    """Baselines by name (`baselines.select_baselines`), all fitted on the same token windows when one is first used.

    Args:
        core: engine whose KV is coded, all layers of it.
        windows: calibration windows; may be empty where no baseline used needs any.
    """

    def __init__(self, core: EngineCore, windows: Sequence[list[int]]) -> None:
        config = core.target.config
        self.core, self._windows = core, list(windows)
        self._layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim)
        self._calibration = None
        self._made: dict[str, Baseline] = {}

    def baseline(self, name: str) -> Baseline:
        """Fitted and on the engine's device. Raises InvalidOption without calibration text."""
        if name not in self._made:
            made = make_baseline(name, self._layout).to(self.core.device)
            if made.needs_calibration:
                made.fit(self._fitted_on())
            self._made[name] = made
        return self._made[name]

    def _fitted_on(self):
        if self._calibration is None:
            from bench_codec import LazyCalibration

            if not self._windows:
                raise InvalidOption(
                    "there is no calibration text for the baselines", "give --baseline-text with files of more than 1,024 tokens"
                )
            context = len(self._windows[0])
            quality = Quality(self.core.target, context, self.core.device)
            self._calibration = LazyCalibration(quality, self._layout, self._windows, _SAMPLE_TOKENS, True).get()
        return self._calibration

    @torch.inference_mode()
    def in_place(self, name: str, sequences: Sequence[KvSequence]) -> int:
        """Each sequence's KV becomes what the named baseline decodes of its code; returns the codes' bytes."""
        baseline, target, num_bytes = self.baseline(name), self.core.target, 0
        for sequence in sequences:  # one by one: a long one's KV in float32 takes gigabytes
            code = baseline.encode(target.read_kv(sequence, 0, sequence.length))
            sequence.ensure(sequence.length, 0)
            target.write_kv(sequence, 0, baseline.decode(code))
            num_bytes += len(code)
        return num_bytes
