"""What bench_codec runs: the baselines of scripts/baselines, and our own codec with and without its prediction, behind one small interface."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from baselines import Calibration, make_baseline, select_baselines
from codec.codec import KvCodec, SpanSetting
from codec.errors import UnknownQuality
from codec.fidelity import plan_spans, token_importance
from codec.pack import CodecPack
from codec.predictor.dense import AnyPredictor, load_predictor
from codec.predictor.low_rank import zero_prediction
from codec.quantize import levels_of
from codec.spans import curve_in
from codec.spec import NUM_SINKS, QUALITIES, SPAN_TOKENS, KvLayout, divergence_of, step_of
from codec.token_ids import encode_ids
from draft.source import DraftSource
from engine.errors import InvalidOption
from engine.model.decoder import Decoder
from engine.sessions.file import SessionFile, Span
from eval.codec_breakdown import breakdown
from eval.codec_quality import Case, hidden_states

OURS = ("foretold", "foretold-nopred")
RECOMPUTED = "recomputed"
_SHORT_PASS_TOKENS = 100  # no multiple of a tile: the same text computed with other sums


@dataclass(frozen=True)
class Result:
    """Coded prefixes of some sequences: bytes (all that a decoder needs beyond model and pack), decoded KV float32 [P, D] of each, seconds, ideal
    bits or None, where the bytes went or None, and the KL that the encoder expects or None."""

    num_bytes: int
    decoded: list[torch.Tensor]
    encode_s: float
    decode_s: float
    ideal_bits: float | None
    breakdown: dict[str, Any] | None = None
    expected_kl: float | None = None


class Method(Protocol):
    """One row of the benchmark.

    Attributes:
        method, quality: the row's name.
        inputs: digest of what the row depends on besides the common settings (calibration or pack): it marks stale rows.
        sink_dim: elements a token that are stored, exact or coded.
    """

    method: str
    quality: str
    inputs: str
    sink_dim: int

    def run(self, cases: Sequence[Case]) -> Result: ...


class BaselineMethod:
    """A baseline, fitted when first run. On a GPU machine the byte coders of different sequences run in threads."""

    def __init__(self, name: str, layout: KvLayout, calibration: CalibrationSource, device: torch.device):
        self.baseline = make_baseline(name, layout).to(device)
        self.method, self.quality, self.sink_dim = self.baseline.method, self.baseline.quality, layout.dim
        self._calibration, self._device, self._ready = calibration, device, not self.baseline.needs_calibration
        self._workers = min(16, os.cpu_count() or 1) if device.type == "cuda" else 1
        self.inputs = calibration.digest if self.baseline.needs_calibration else ""

    def run(self, cases: Sequence[Case]) -> Result:
        if not self._ready:
            self.baseline.fit(self._calibration.get())
            self._ready = True
        kvs = [case.kv.to(self._device) for case in cases]
        start = _now(self._device)
        codes = self.baseline.encode_many(kvs, self._workers)
        middle = _now(self._device)
        decoded = self.baseline.decode_many(codes, self._workers)
        return Result(sum(map(len, codes)), decoded, middle - start, _now(self._device) - middle, None)


class CalibrationSource(Protocol):
    """Calibration shared by all baselines, made on first use; `digest` of its tokens."""

    digest: str

    def get(self) -> Calibration: ...


class PairCodec:
    """A pack's codec and predictor with the models that feed it, shared by all our qualities. The hidden states of the sequences are kept: features
    come from one prefill of the prefix, whose time is not in the coding times."""

    def __init__(self, pack: CodecPack, target: Decoder, source: DraftSource | None):
        self.pack, self.target, self.device = pack, target, target.device
        self._draft = None if source is None else source.model
        self._head_layers = None if source is None else source.head_layers
        self._hidden: dict[tuple[int, ...], tuple[torch.Tensor | None, torch.Tensor | None]] = {}
        self.warm = target.device.type == "cpu"

    @cached_property
    def codec(self) -> KvCodec:
        return KvCodec(self.pack, self.device)

    @cached_property
    def predictor(self) -> AnyPredictor:
        return load_predictor(self.pack.predictor, self.pack.predictor_settings, self.device)

    def hidden(self, cases: Sequence[Case]) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
        """Hidden states of draft and target for each sequence's prefix, as far as the predictor asks for them."""
        spec, keys = self.predictor.spec, [tuple(case.token_ids.tolist()) for case in cases]
        missing = [n for n, key in enumerate(keys) if key not in self._hidden]
        tokens = [cases[n].token_ids[: cases[n].prefix] for n in missing]
        none: list[torch.Tensor | None] = [None] * len(missing)
        rows: Sequence[torch.Tensor | None] = none
        if spec.taps and self._draft is not None:
            rows = hidden_states(self._draft, tokens, spec.taps)
        elif spec.taps:
            rows = hidden_states(self.target, tokens, spec.taps, self.pack.layout.first_layer or None, self._head_layers)
        target_rows = hidden_states(self.target, tokens, spec.target_taps, spec.recomputed_layers) if spec.target_taps else none
        self._hidden |= {keys[n]: pair for n, *pair in zip(missing, rows, target_rows, strict=True)}  # type: ignore[misc]
        return [self._hidden[key] for key in keys]

    def forget(self) -> None:
        """Gives the kept hidden states back."""
        self._hidden.clear()

    def predict(
        self, num_tokens: int, rows: torch.Tensor | None, target_rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """KV vectors [T, D], and how many octaves each token's step lies above the usual one."""
        if rows is None:
            rows = torch.zeros(num_tokens, 0, self.predictor.draft_size, device=self.device)
        features = self.predictor.reduce(rows), target_rows
        return self.predictor.predict(*features), self.predictor.log2_step(*features)


class ForetoldMethod:
    """Our codec as a session stores it, every byte of the session file counted: spans of at most 64 tokens, token ids, checksums, fingerprints. The
    first four tokens and the layers below the pack's first_layer are exact and take no bytes: running the target's (or its early exit's) layers
    over the ids gives them back.

    Args:
        quality: a name of codec.spec.QUALITIES, coded as a session does (by its promised divergence where the pack states a curve), or "stepX" for a
            quantiser step X.
        pair: codec, predictor and models.
        predict: False codes against the mean KV vector instead of the prediction, with the same pack. That shows what the prediction carries;
            a pack calibrated without one would do better, as this one's transform leaves out what its predictor explains.
        parts: also say where the bytes went.
    """

    def __init__(self, quality: str, pair: PairCodec, predict: bool, parts: bool = False):
        self.method = OURS[0] if predict else OURS[1]
        self.quality, self.inputs, self.sink_dim = quality, pair.pack.digest[:16], 0
        self._step = float(quality[4:]) if quality.startswith("step") else step_of(quality)
        self._pair, self._predict, self._parts = pair, predict, parts
        self._curve = curve_in(pair.pack.curve, pair.target.dtype) if divergence_of(quality) is not None else None
        if parts and self._curve is not None:
            raise InvalidOption(
                "spans of a promised quality have settings of their own", "break down the bytes of a fixed step, such as step1.0"
            )

    @torch.inference_mode()
    def run(self, cases: Sequence[Case]) -> Result:
        pair = self._pair
        if not pair.warm:  # compiles kernels; not a part of the coding times
            pair.warm = True
            self.run(cases[:1])
        pack, codec, device = pair.pack, pair.codec, pair.device
        kvs = [case.kv.to(device) for case in cases]
        width = pack.layout.dim
        hidden = pair.hidden(cases) if self._predict else [(None, None)] * len(cases)
        edges = [list(range(NUM_SINKS, case.prefix, SPAN_TOKENS)) for case in cases]
        start = _now(device)
        pairs, levels, factors = [], [], []
        for case, kv, rows, own in zip(cases, kvs, hidden, edges, strict=True):
            prediction, octaves = self._prediction(case, rows)
            coded = kv[:, kv.shape[1] - width :]
            pairs += [(coded[a : a + SPAN_TOKENS], prediction[a : a + SPAN_TOKENS]) for a in own]
            levels += [None if octaves is None else levels_of(octaves[a : a + SPAN_TOKENS]) for a in own]
            factors += [None if octaves is None else token_importance(octaves[a : a + SPAN_TOKENS]) for a in own]
        settings: float | Sequence[SpanSetting] = self._step
        expected = None
        if self._curve is not None:
            plan = plan_spans(codec, self._curve, self.quality, pairs, levels, factors)
            settings, levels = plan.settings, plan.levels
            tokens = [len(truth) for truth, _ in pairs]
            expected = sum(d * n for d, n in zip(plan.divergence, tokens, strict=True)) / sum(tokens)
        spans = codec.encode_many(pairs, settings, levels)
        middle = _now(device)
        predictions = [
            part
            for case, rows, own in zip(cases, hidden, edges, strict=True)
            for prediction in [self._prediction(case, rows)[0]]
            for part in (prediction[a : a + SPAN_TOKENS] for a in own)
        ]
        back = iter(codec.decode_many(spans, predictions))
        decoded = [kv.clone() for kv in kvs]
        for kv, own in zip(decoded, edges, strict=True):
            kv[NUM_SINKS:, kv.shape[1] - width :] = torch.cat([next(back) for _ in own])
        end = _now(device)
        stored, files = iter(spans), []
        for case, own in zip(cases, edges, strict=True):
            covered = [Span(a, min(a + SPAN_TOKENS, case.prefix), next(stored)) for a in own]
            prints = {"pack": pack.digest, **pack.fingerprints}
            files.append(SessionFile(case.token_ids[: case.prefix].tolist(), case.prefix, self.quality, prints, covered))
        num_bytes = sum(len(file.to_bytes()) for file in files)
        id_bytes = sum(len(encode_ids(file.token_ids)) for file in files)
        parts = breakdown(codec, spans, num_bytes, id_bytes) if self._parts else None
        return Result(num_bytes, decoded, middle - start, end - middle, codec.ideal_bits(pairs, settings, levels), parts, expected)

    def _prediction(self, case: Case, hidden: tuple[torch.Tensor | None, torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self._predict:
            return zero_prediction(self._pair.pack.predictor, case.prefix).to(self._pair.device), None
        return self._pair.predict(case.prefix, *hidden)


class RecomputedMethod:
    """The same tokens run through the target again, in short passes: nothing is coded, and what its arithmetic rounds differs. A floor: who restores
    a cache in this arithmetic does not get below it."""

    method, quality, inputs, sink_dim = RECOMPUTED, "", "", 0

    def __init__(self, target: Decoder):
        self._target = target

    @torch.inference_mode()
    def run(self, cases: Sequence[Case]) -> Result:
        target, decoded = self._target, []
        start = _now(target.device)
        for case in cases:
            sequence = target.new_pool(-(-case.prefix // 64)).new_sequence(case.prefix)
            for part in case.token_ids[: case.prefix].to(target.device).split(_SHORT_PASS_TOKENS):
                target.forward(part, [sequence], [len(part)], logits="none")
                sequence.advance(len(part))
            decoded.append(target.read_kv(sequence, 0, case.prefix))
            sequence.free()
        return Result(0, decoded, 0.0, _now(target.device) - start, None)


def select_methods(words: list[str]) -> list[tuple[str, str]]:
    """(family, point) of every method asked for: baselines, and foretold[-nopred][-QUALITY|-stepX]; a family stands for all its points."""
    chosen: list[tuple[str, str]] = []
    for word in words:
        family = next((name for name in sorted(OURS, key=len, reverse=True) if word == name or word.startswith(name + "-")), None)
        if family is None:
            chosen += [("baseline", name) for name in select_baselines([word])]
        elif word == family:
            chosen += [(family, quality) for quality in QUALITIES]
        else:
            quality = word[len(family) + 1 :]
            if quality not in QUALITIES and not _is_step(quality):
                raise UnknownQuality(
                    f"unknown quality {quality!r} in {word!r}", f"choose one of {', '.join(QUALITIES)}, or stepX with a number X"
                )
            chosen.append((family, quality))
    return list(dict.fromkeys(chosen))


def _is_step(word: str) -> bool:
    try:
        return word.startswith("step") and float(word[4:]) > 0
    except ValueError:
        return False


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
