"""Timed suspends, resumes and recomputations of one engine, every stage with the device waited for."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from baselines.base import Baseline
from codec.codec import KvCodec
from codec.pack import CodecPack
from codec.spec import NUM_SINKS
from codec.token_ids import decode_ids, encode_ids
from draft.draft_head import DraftHeadState
from draft.early_exit import EarlyExitDrafter
from engine.model.decoder import forward_reserved
from engine.runtime.core import EngineCore
from engine.runtime.request import SequenceState
from engine.sessions.file import SessionFile, bound, write_file
from engine.sessions.kv_codec import SessionCodec, prefill_draft, run_tokens
from engine.sessions.stages import StageClock

_APPENDED_TOKENS = 200  # what a turn adds to a session; a span is begun at the page's border before them
_TWIN_TOKENS = 260
_TWIN_BOUND = {torch.float32: 1e-3, torch.bfloat16: 1e-2}


class ResumeBench:
    """Suspends and resumes of random or given tokens with an engine and its codec parameters."""

    def __init__(self, core: EngineCore, pack: CodecPack) -> None:
        began = time.perf_counter()
        self.core, self.codec = core, SessionCodec(core, pack)
        self.codec.ready()
        self.setup_s = time.perf_counter() - began

    def _wait(self) -> None:
        if self.core.device.type == "cuda":
            torch.cuda.synchronize(self.core.device)

    def _timed(self, run: Callable[[], Any], repeats: int) -> float:
        """Median seconds of `repeats` runs after one that is not counted."""
        found = []
        for _ in range(repeats + 1):
            self._wait()
            began = time.perf_counter()
            run()
            self._wait()
            found.append(time.perf_counter() - began)
        return statistics.median(found[1:])

    def _opened(self, ids: Sequence[int]) -> SequenceState:
        conversation = self.core.open_sequence_state()
        conversation.token_ids[:] = ids
        return conversation

    def _recompute(self, ids: Sequence[int]) -> None:
        conversation = self._opened(ids)
        self.codec.run_target(conversation, len(ids))
        self.core.close_sequence_state(conversation)

    def _resumed(self, path: Path, clock: StageClock | None = None) -> SequenceState:
        """From the file to a conversation that can go on; every token restored."""
        stored = SessionFile.load(path, self.core.context, beside=True)
        conversation = self._opened(stored.token_ids)
        self.codec.restore(conversation, stored.spans, clock, leaves_head=True)
        stored.confirm()
        return conversation

    def _resume(self, path: Path, clock: StageClock | None = None) -> None:
        self.core.close_sequence_state(self._resumed(path, clock))

    def _catch_up_s(self, path: Path, repeats: int) -> float:
        """Median seconds of what a restore leaves for the first draft: a separate draft's own pass over the tokens, or a draft head's layers."""
        core, found = self.core, []
        for _ in range(repeats + 1):
            conversation = self._resumed(path)
            state, drafter = conversation.draft_state, core.drafter
            assert state is not None
            self._wait()
            began = time.perf_counter()
            if isinstance(state, DraftHeadState):
                assert isinstance(drafter, EarlyExitDrafter) and drafter.draft_head is not None
                drafter.draft_head.run_left(state)
            else:
                prefill_draft(core, state, conversation.token_ids)
            self._wait()
            found.append(time.perf_counter() - began)
            core.close_sequence_state(conversation)
        return statistics.median(found[1:])

    def _host_copy(self, num_bytes: int) -> Callable[[], Any]:
        """Copies a raw cache from the host's memory, pinned on a GPU, to where the pool lies: what keeping it there costs to bring back."""
        cuda = self.core.device.type == "cuda"
        source = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=cuda)
        there = torch.empty(num_bytes, dtype=torch.uint8, device=self.core.device)
        return lambda: there.copy_(source, non_blocking=True)

    @torch.inference_mode()
    def check(self, ids: Sequence[int], quality: str) -> float:
        """Relative difference of a restored KV from the plain twin's (numpy's entropy decoder, span by span, in float32 on the CPU).

        Raises AssertionError beyond the product's rounding.
        """
        ids = list(ids[:_TWIN_TOKENS])
        end, codec, core = len(ids), self.codec, self.core
        conversation = self._opened(ids)
        codec.run_target(conversation, end)
        spans = codec.encode(conversation, NUM_SINKS, end, quality)
        core.close_sequence_state(conversation)
        restored = self._opened(ids)
        codec.restore(restored, spans)
        found = core.target.read_kv(restored.sequence, 0, end, first_layer=codec.first_layer).cpu()[NUM_SINKS:]
        core.close_sequence_state(restored)
        twin = self._opened(ids)
        run_tokens(core, twin, NUM_SINKS)
        if core.drafter is not None and twin.draft_state is not None:
            prefill_draft(core, twin.draft_state, ids)
        predicted = codec.predictor.predict(*codec.features(twin, NUM_SINKS, end)).cpu()
        core.close_sequence_state(twin)
        sizes = [s.end - s.start for s in spans]
        rows = torch.cat(KvCodec(codec.pack).decode_many([s.data for s in spans], predicted.split(sizes)))
        error = float((found - rows).norm() / rows.norm())
        assert error < _TWIN_BOUND[codec.pages.dtype], f"the restored KV differs from the plain twin's by {error:.4f}"
        return error

    @torch.inference_mode()
    def run(self, ids: Sequence[int], quality: str, repeats: int) -> dict[str, Any]:
        """A row as in docs/json.md with its stages."""
        core, codec, end = self.core, self.codec, len(ids)
        layers, config = core.target.config.num_layers, core.target.config
        row: dict[str, Any] = {"tokens": end, "quality": quality, "raw_bytes": 2 * end * layers * config.kv_width}
        row["recompute_s"] = self._timed(lambda: self._recompute(ids), repeats)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "session.kv"
            conversation = self._opened(ids)
            codec.run_target(conversation, end)
            if core.drafter is not None and conversation.draft_state is not None and core.draft_model is not None:
                prefill_draft(core, conversation.draft_state, conversation.token_ids)  # as generating would have
            self._wait()
            began = time.perf_counter()
            clock = StageClock(core.device, waits=True)
            spans = codec.encode(conversation, NUM_SINKS, end, quality, clock)
            self._wait()
            coded = time.perf_counter()
            data = SessionFile(list(ids), end, quality, {}, spans).to_bytes()
            write_file(path, data)
            written = time.perf_counter()
            kept = [span for span in spans if span.end <= end - _APPENDED_TOKENS]
            appended = kept[-1].end if kept else NUM_SINKS
            row["append_tokens"] = end - appended
            row["append_s"] = self._timed(lambda: codec.encode(conversation, appended, end, quality, earlier=kept), repeats)
            core.close_sequence_state(conversation)
            row |= {"suspend_s": written - began, "encode_s": coded - began, "write_s": written - coded, "stored_bytes": len(data)}
            row["encode_stages"] = clock.seconds()
            row["resume_s"] = self._timed(lambda: self._resume(path), repeats)
            whole = SessionFile.load(path, core.context)
            row["links_s"] = self._timed(lambda: bound(whole.spans, whole.token_ids, whole.fingerprints, anew=True), repeats)
            row["read_s"] = max(0.0, self._timed(lambda: SessionFile.load(path, core.context), repeats) - row["links_s"])
            row["draft_catch_up_s"] = self._catch_up_s(path, repeats) if self.codec.draft_catches_up else 0.0
            frame = encode_ids(ids)
            row["ids_s"] = self._timed(lambda: decode_ids(frame), repeats)
            row["check_s"] = self._timed(lambda: codec.codec.read([s.data for s in spans]), repeats)
            for _ in range(2):
                clock = StageClock(core.device, waits=True)
                self._resume(path, clock)
            stages = clock.seconds()
        row["fixed_s"] = row["read_s"] + row["check_s"]
        row["fixed_reach_s"] = 0.005 + len(data) / 1e9
        row["draft_prefill_s"] = stages["sinks"] + stages["draft"]
        row["target_layers_s"], row["predict_s"] = stages["target_layers"], stages["product"]
        row["rans_s"] = max(0.0, stages["entropy"] - row["read_s"] - row["check_s"])
        row["decode_s"] = row["rans_s"] + row["target_layers_s"] + row["predict_s"]
        row["bits_per_element"] = 8 * len(data) / (row["raw_bytes"] / 2)
        row["ids_bytes"] = len(frame)
        row["host_copy_s"] = self._timed(self._host_copy(row["raw_bytes"]), repeats)
        row["speed_up"] = row["recompute_s"] / row["resume_s"]
        row["speed_up_with_draft"] = row["recompute_s"] / (row["resume_s"] + row["draft_catch_up_s"])
        return row

    @torch.inference_mode()
    def run_baseline(self, baseline: Baseline, ids: Sequence[int], repeats: int) -> dict[str, Any]:
        """A fitted KVTC on the same tokens: bytes, seconds to encode from pages and to decode from bytes into pages."""
        core, target = self.core, self.core.target
        conversation = self._opened(ids)
        self.codec.run_target(conversation, len(ids))
        sequence = conversation.sequence
        self._wait()
        began = time.perf_counter()
        code = baseline.encode(target.read_kv(sequence, 0, len(ids)))
        encode_s = time.perf_counter() - began
        decode_s = self._timed(lambda: target.write_kv(sequence, 0, baseline.decode(code)), repeats)
        core.close_sequence_state(conversation)
        return {"kvtc": baseline.name, "kvtc_bytes": len(code), "kvtc_encode_s": encode_s, "kvtc_decode_s": decode_s}

    @torch.inference_mode()
    def step_s(self, repeats: int) -> float:
        """Seconds of one step of the target over a single token: what every way to come back still needs before the first token."""
        conversation = self._opened([1] * 8)
        self.codec.run_target(conversation, 8)
        ids = torch.ones(1, dtype=torch.int64, device=self.core.device)
        seconds = self._timed(
            lambda: forward_reserved(self.core.target, ids, [conversation.sequence], [1]).logits.argmax(-1).tolist(), repeats
        )  # type: ignore[union-attr]
        self.core.close_sequence_state(conversation)
        return seconds
