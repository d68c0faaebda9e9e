"""What bench_codec runs: the peers of codec/baselines, and our own codec with and without its prediction, behind one small interface."""
from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch

from codec.baselines import Calibration, make_peer, select_peers
from codec.codec import KvCodec
from codec.errors import UnknownQuality
from codec.pack import CodecPack
from codec.quantize import levels_of
from codec.spec import NUM_SINKS, QUALITIES, SPAN_TOKENS, KvLayout
from draft.dense import load_predictor
from draft.predictor import zero_prediction
from engine.decoder import Decoder
from engine.session_file import SessionFile, Span
from scripts.codec_quality import Case, hidden_states

OURS = ("foretold", "foretold-nopred")


@dataclass(frozen=True)
class Result:
    """One coded prefix: its bytes (all a decoder needs beyond model and pack), decoded KV float32 [P, D], seconds, ideal bits or None."""

    num_bytes: int
    decoded: torch.Tensor
    encode_s: float
    decode_s: float
    ideal_bits: float | None


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

    def run(self, case: Case) -> Result: ...


class PeerMethod:
    """A peer, fitted when first run."""

    def __init__(self, name: str, layout: KvLayout, calibration: CalibrationSource, device: torch.device):
        self.peer = make_peer(name, layout).to(device)
        self.method, self.quality, self.sink_dim = self.peer.method, self.peer.quality, layout.dim
        self._calibration, self._device, self._ready = calibration, device, not self.peer.needs_calibration
        self.inputs = calibration.digest if self.peer.needs_calibration else ""

    def run(self, case: Case) -> Result:
        if not self._ready:
            self.peer.fit(self._calibration.get())
            self._ready = True
        kv = case.kv.to(self._device)
        start = _now(self._device)
        data = self.peer.encode(kv)
        middle = _now(self._device)
        decoded = self.peer.decode(data)
        return Result(len(data), decoded, middle - start, _now(self._device) - middle, None)


class CalibrationSource(Protocol):
    """Calibration shared by all peers, made on first use; `digest` of its tokens."""

    digest: str

    def get(self) -> Calibration: ...


class ForetoldMethod:
    """Our codec as a session stores it, every byte of the session file counted: spans of at most 64 tokens, token ids, checksums, fingerprints. The
    first four tokens and the layers below the pack's first_layer are exact and take no bytes: running the target's (or its trunk's) layers
    over the ids gives them back. Features come from one prefill of the prefix, whose time is not in the coding times.

    Args:
        quality: a name of codec.spec.QUALITIES, or "stepX" for a quantiser step X.
        predict: False codes against the mean KV vector instead of the prediction, with the same pack. That shows what the prediction carries;
            a pack calibrated without one would do better, as this one's transform leaves out what its predictor explains.
    """

    def __init__(self, quality: str, pack: CodecPack, target: Decoder, drafter: Decoder | None, predict: bool):
        self.method = OURS[0] if predict else OURS[1]
        self.quality, self.inputs, self.sink_dim = quality, pack.digest[:16], 0
        self._step = float(quality[4:]) if quality.startswith("step") else QUALITIES[quality]
        self._pack, self._target, self._predict = pack, target, predict
        self._codec = KvCodec(pack, target.device)
        self._predictor = load_predictor(pack.predictor, pack.predictor_settings, target.device) if predict else None
        self._drafter = target if drafter is None else drafter
        self._first_layer = pack.layout.first_layer or None

    def run(self, case: Case) -> Result:
        device, width = self._target.device, self._pack.layout.dim
        kv = case.kv.to(device)
        coded = kv[:, kv.shape[1] - width:]
        tokens = case.token_ids[:case.prefix]
        rows = target_rows = None
        if self._predictor is not None:
            spec, own = self._predictor.spec, self._drafter is self._target
            rows = hidden_states(self._drafter, tokens, spec.taps, self._first_layer if own else None) if spec.taps else None
            target_rows = hidden_states(self._target, tokens, spec.target_taps, spec.target_layers) if spec.target_taps else None
        start = _now(device)
        edges = range(NUM_SINKS, case.prefix, SPAN_TOKENS)
        prediction, octaves = self._prediction(tokens, rows, target_rows)
        pairs = [(coded[a:a + SPAN_TOKENS], prediction[a:a + SPAN_TOKENS]) for a in edges]
        levels = [None if octaves is None else levels_of(octaves[a:a + SPAN_TOKENS]) for a in edges]
        spans = self._codec.encode_many(pairs, self._step, levels)
        middle = _now(device)
        prediction, _ = self._prediction(tokens, rows, target_rows)
        back = self._codec.decode_many(spans, [prediction[a:a + SPAN_TOKENS] for a in edges])
        decoded = kv.clone()
        decoded[NUM_SINKS:, kv.shape[1] - width:] = torch.cat(back)
        end = _now(device)
        stored = [Span(a, min(a + SPAN_TOKENS, case.prefix), data) for a, data in zip(edges, spans, strict=True)]
        ids = case.token_ids.tolist()[:case.prefix]
        num_bytes = len(SessionFile(ids, case.prefix, self.quality, {"pack": self._pack.digest, **self._pack.fingerprints}, stored).to_bytes())
        return Result(num_bytes, decoded, middle - start, end - middle, self._codec.ideal_bits(pairs, self._step, levels))

    def _prediction(
        self, tokens: torch.Tensor, rows: torch.Tensor | None, target_rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """KV vectors [T, D], and how many octaves each token's step lies above the usual one."""
        device = self._target.device
        if self._predictor is None:
            return zero_prediction(self._pack.predictor, len(tokens)).to(device), None
        if rows is None:
            rows = torch.zeros(len(tokens), 0, self._predictor.draft_size, device=device)
        features = self._predictor.reduce(rows), target_rows
        return self._predictor.predict(*features), self._predictor.step_octaves(*features)


def select_methods(words: list[str]) -> list[tuple[str, str]]:
    """(family, point) of every method asked for: peers, and foretold[-nopred][-QUALITY|-stepX]; a family stands for all its points."""
    chosen: list[tuple[str, str]] = []
    for word in words:
        family = next((name for name in sorted(OURS, key=len, reverse=True) if word == name or word.startswith(name + "-")), None)
        if family is None:
            chosen += [("peer", name) for name in select_peers([word])]
        elif word == family:
            chosen += [(family, quality) for quality in QUALITIES]
        else:
            quality = word[len(family) + 1:]
            if quality not in QUALITIES and not _is_step(quality):
                raise UnknownQuality(f"unknown quality {quality!r} in {word!r}",
                                     f"choose one of {', '.join(QUALITIES)}, or stepX with a number X")
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
