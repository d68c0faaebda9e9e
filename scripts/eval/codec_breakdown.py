"""Where the bytes of our own codec go: container, ids, headers, flushed coder states, step levels, escapes, words; and the code length of the
symbols by kind of component and by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from codec.choice import final_classes
from codec.codec import KvCodec
from codec.container import read_span
from codec.rans import SpanStream
from codec.rate import CLASSES_PER_OCTAVE, MIN_OCTAVE, class_of

LANE_START_BYTES = 4  # a lane's state at the start of decoding
_SPANS_AT_ONCE = 256


def breakdown(codec: KvCodec, spans: Sequence[bytes], num_bytes: int, id_bytes: int) -> dict[str, Any]:
    """Sums over spans of one step, to be added up by `merged`.

    Args:
        spans: all spans of some session files.
        num_bytes: of those files.
        id_bytes: of them, of the coded token ids.

    Returns:
        bytes: of each kind, their sum being num_bytes. components: for each octave of sigma / step the components in it, their integers that are not
        zero, all integers, and ideal bits. layers: ideal bits [coded layers][K, V], a component's bits shared out by the energy of its basis row.
    """
    codes = [read_span(span) for span in spans]
    inside = {
        "lane_states": sum(LANE_START_BYTES * len(c.states) for c in codes),
        "words": sum(2 * len(c.words) for c in codes),
        "step_levels": sum(0 if c.levels is None else -(-len(c.levels) // 2) for c in codes),
        "escapes": sum(len(c.escapes) for c in codes),
    }
    inside["span_headers"] = sum(map(len, spans)) - sum(inside.values())
    counted = {"token_ids": id_bytes, "file": num_bytes - id_bytes - sum(map(len, spans)), **inside}
    step, count = codes[0].step, codes[0].num_components
    classes = class_of(codec.pack.transform.variance[:count].clamp_min(1e-12).sqrt().numpy(), step)
    base = torch.from_numpy(classes).to(codec.device)
    bits, nonzero = np.zeros(count), np.zeros(count, np.int64)
    for at in range(0, len(codes), _SPANS_AT_ONCE):
        some = codes[at : at + _SPANS_AT_ONCE]
        stored = [np.zeros(c.num_tokens, np.int8) if c.levels is None else c.levels for c in some]
        levels = torch.from_numpy(np.concatenate(stored).astype(np.int32)).to(codec.device)
        q, gains, _ = codec.coder.decode([SpanStream(c.num_tokens, c.states, c.words) for c in some], base, levels, some[0].tokens_per_lane)
        bits += codec.choice.bits[codec.choice.symbols(q, final_classes(base, levels, gains))].sum(0, dtype=torch.float64).cpu().numpy()
        nonzero += (q != 0).sum(0).cpu().numpy()
    tokens = sum(c.num_tokens for c in codes)
    octave = classes // CLASSES_PER_OCTAVE + MIN_OCTAVE
    components = {
        str(o): {
            "components": int((octave == o).sum()),
            "integers": int(tokens * (octave == o).sum()),
            "nonzero": int(nonzero[octave == o].sum()),
            "bits": float(bits[octave == o].sum()),
        }
        for o in np.unique(octave)[::-1]
    }
    return {"bytes": counted, "components": components, "layers": by_layer(codec, bits).tolist(), "tokens": tokens}


def by_layer(codec: KvCodec, bits: np.ndarray) -> np.ndarray:
    """Bits [coded layers, 2] from the components' bits [K]."""
    transform, layout = codec.transform, codec.layout
    own = torch.from_numpy(bits).to(transform.basis.device, torch.float32)
    if transform.layer is not None:
        energy = transform.basis[: len(bits)].pow(2).reshape(len(bits), 2, -1).sum(-1)
        out = torch.zeros(layout.coded_layers, 2, device=own.device)
        out.index_add_(0, transform.layer[: len(bits)], energy / energy.sum(1, keepdim=True) * own[:, None])
    else:
        energy = transform.basis[: len(bits)].pow(2)
        out = (energy.T @ (own / energy.sum(1))).reshape(layout.coded_layers, 2, -1).sum(-1)
    return out.cpu().numpy()


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Breakdowns of several groups of files of one step as one."""
    first = parts[0]
    components = {
        octave: {key: own["components"] if key == "components" else sum(p["components"][octave][key] for p in parts) for key in own}
        for octave, own in first["components"].items()
    }
    return {
        "bytes": {key: sum(p["bytes"][key] for p in parts) for key in first["bytes"]},
        "components": components,
        "layers": np.sum([p["layers"] for p in parts], 0).round(1).tolist(),
        "tokens": sum(p["tokens"] for p in parts),
    }
