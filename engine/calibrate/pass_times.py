"""What the passes of a restore take on this machine: layers of a small draft run far below a large target's rate, and arithmetic misjudges them."""

from __future__ import annotations

import statistics
import time

import torch

from engine.calibrate.restore_cost import PassTimes, layer_flops
from engine.model.decoder import Decoder, forward_reserved

TOKENS = 8192
"""Of the document that is timed, where the models' contexts hold it."""

_REPEATS = 3


@torch.inference_mode()
def measure_pass_times(target: Decoder, draft: Decoder | None, tokens: int = TOKENS) -> PassTimes:
    """Seconds of the target's pass over a document of so many tokens, of a quarter of its layers and of the draft's; medians of three, warmed up."""
    tokens = min([tokens, target.config.max_position_embeddings, *([] if draft is None else [draft.config.max_position_embeddings])])

    def seconds(model: Decoder, layers: int) -> float:
        pool = model.new_pool(-(-tokens // 64))
        ids = torch.arange(tokens, device=model.device) % model.config.vocab_size
        found = []
        for _ in range(1 + _REPEATS):
            sequence = pool.new_sequence()
            began = _moment(model.device)
            forward_reserved(model, ids, [sequence], [tokens], logits="none", last_layer=layers)
            found.append(_moment(model.device) - began)
            sequence.free()
        return statistics.median(found[1:])

    def layer_s(model: Decoder) -> float:
        count = max(1, model.config.num_layers // 4)
        return seconds(model, count) / count

    whole_s, target_s = seconds(target, target.config.num_layers), layer_s(target)
    draft_rate = None if draft is None else layer_s(draft) / layer_flops(draft.config)
    flops = layer_flops(target.config)
    return PassTimes(tokens, whole_s / (target.config.num_layers * flops), target_s / flops, draft_rate)


def _moment(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
