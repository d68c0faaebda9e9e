"""Engines of named shapes with random weights, and codec parameters for them whose codes have a realistic number of bits.

Random weights have no hidden structure for a predictor to find, so nothing here tells bits or loss: only what a restore costs, which depends on shapes,
on the number of components and on how many bits a component takes. The transform's rows are random and orthonormal; the weighting's scale is chosen
so that a component takes about one bit at `balanced`, as those of the calibrated qwen2.5-coder pair do (1.27 kbit a token in 1,321 components).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from codec.calibrate_tables import fit_entropy_model
from codec.codec import KvCodec
from codec.pack import CodecPack
from codec.predictor.dense import DensePredictor
from codec.predictor.features import FeatureSpec
from codec.predictor.gptq import LowBitWeights
from codec.rate import EntropyModel
from codec.spec import KvLayout
from codec.transform import Transform
from codec.weighting import Weighting
from engine.calibrate.restore_cost import predictor_multiplies, restore_cost
from engine.engine import Engine
from engine.errors import InvalidOption
from engine.model.config import DecoderConfig
from engine.model.decoder import Decoder, forward_reserved
from engine.model.rope import RopeConfig

_GROUP = 128
_DEVIATION = 0.6  # of a component, in steps at `balanced`: about one bit


class Shape(NamedTuple):
    """A target and a draft; components kept at `balanced`; layers of the draft the predictor looks at, and of the target that are recomputed."""

    target: DecoderConfig
    draft: DecoderConfig
    components: int
    taps: int
    recomputed_layers: int
    draft_layers: int | None = None  # the first ones that the predictor looks at; None: all
    one_layer: bool = False  # all layers of the target have the weights of one: it would not fit on a device otherwise


def _config(layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int, vocab: int, context: int, **other: Any):
    return DecoderConfig(
        architecture=other.get("architecture", "qwen2"),
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=vocab,
        rms_norm_eps=1e-6,
        rope=RopeConfig("default", other.get("theta", 1e6)),
        qkv_bias=other.get("bias", True),
        qk_norm=False,
        tie_word_embeddings=other.get("tied", True),
        max_position_embeddings=context,
    )


_CONTEXT = 65_536
_QWEN_0_5B = _config(24, 896, 14, 2, 64, 4864, 151_936, _CONTEXT)
_QWEN_1_5B = _config(28, 1536, 12, 2, 128, 8960, 151_936, _CONTEXT)
_LLAMA_8B = _config(32, 4096, 32, 8, 128, 14_336, 128_256, _CONTEXT, architecture="llama", theta=5e5, bias=False, tied=False)
_LLAMA_0_5B = _config(24, 896, 14, 2, 64, 4864, 128_256, _CONTEXT, architecture="llama", theta=5e5, bias=False)
_LLAMA_70B = _config(80, 8192, 64, 8, 128, 28_672, 128_256, _CONTEXT, architecture="llama", theta=5e5, bias=False, tied=False)
_LLAMA_1B = _config(16, 2048, 32, 8, 64, 8192, 128_256, _CONTEXT, architecture="llama", theta=5e5, bias=False)
_TINY = _config(4, 64, 4, 2, 16, 128, 512, 4096)
_TINY_DRAFT = _config(2, 32, 2, 1, 16, 64, 512, 4096)

SHAPES = {
    "qwen2.5-1.5b+0.5b": Shape(_QWEN_1_5B, _QWEN_0_5B, 1321, 24, 4),
    "llama-8b+0.5b": Shape(_LLAMA_8B, _LLAMA_0_5B, 1742, 4, 0),
    "llama-70b+1b": Shape(_LLAMA_70B, _LLAMA_1B, 3000, 2, 0, 8, one_layer=True),
    "tiny": Shape(_TINY, _TINY_DRAFT, 48, 2, 1),
    "tiny-one-layer": Shape(_TINY, _TINY_DRAFT, 48, 2, 1, one_layer=True),
}


def build(name: str, device: torch.device, dtype: torch.dtype, pool_tokens: int, **changes: int) -> tuple[Engine, CodecPack]:
    """The engine of a named shape, and codec parameters for it. changes: other `taps`, `draft_layers`,
    `recomputed_layers` or `components`. Raises InvalidOption."""
    if name not in SHAPES:
        raise InvalidOption(f"unknown shapes {name!r}", f"choose one of {', '.join(SHAPES)}")
    shape = SHAPES[name]._replace(**changes)
    target = (_of_one_layer if shape.one_layer else Decoder.from_config)(shape.target, dtype=dtype, device=device, seed=1)
    draft = Decoder.from_config(shape.draft, dtype=dtype, device=device, seed=2)
    engine = Engine(target, None, draft=draft, pool_tokens=pool_tokens)
    return engine, _pack(engine, shape)


def _of_one_layer(config: DecoderConfig, *, dtype: torch.dtype, device: torch.device, seed: int) -> Decoder:
    """A decoder of random weights whose layers share those of one. Each is read from memory as often as if it had its own, where a layer is larger than
    the device's caches."""
    decoder = Decoder.from_config(replace(config, num_layers=1), dtype=dtype, device=device, seed=seed)
    decoder.config = config
    decoder.layers = nn.ModuleList([decoder.layers[0]] * config.num_layers)
    decoder.layer_shapes = [config.layer_shape(number) for number in range(config.num_layers)]
    return decoder


@torch.inference_mode()
def _pack(engine: Engine, shape: Shape) -> CodecPack:
    device, target = engine.device, shape.target
    generator = torch.Generator(device=device).manual_seed(3)
    layout = KvLayout(target.num_layers, target.num_kv_heads, target.head_dim, shape.recomputed_layers)
    depth = shape.draft.num_layers if shape.draft_layers is None else shape.draft_layers
    if not 0 <= depth <= shape.draft.num_layers or not 0 <= shape.recomputed_layers < target.num_layers:
        raise InvalidOption(f"{depth} draft layers, {shape.recomputed_layers} recomputed ones", "choose no more than the models have")
    last = 1 if shape.draft_layers is None else 0  # of all layers the last state is not looked at
    taps = tuple(sorted({round((n + 1) * depth / shape.taps) - last for n in range(shape.taps)}))
    spec = FeatureSpec(taps, (0, shape.recomputed_layers) if shape.recomputed_layers else (0,))
    inputs = spec.num_features(shape.draft.hidden_size, target.hidden_size)
    codes = torch.randint(-8, 8, (inputs, layout.dim), dtype=torch.int8, device=device, generator=generator)
    scale = torch.full((-(-inputs // _GROUP), layout.dim), 0.02 / inputs**0.5, dtype=torch.float16, device=device)
    cost = restore_cost(
        target,
        spec,
        shape.recomputed_layers,
        draft=shape.draft,
        predictor_multiplies=predictor_multiplies(inputs, layout.dim, None),
        components=shape.components,
    )
    tensors, settings = DensePredictor.pack(
        spec,
        shape.draft.hidden_size,
        LowBitWeights(codes, scale, 4, _GROUP),
        torch.zeros(inputs),
        torch.ones(inputs),
        torch.zeros(layout.dim),
    )
    basis = torch.linalg.qr(torch.randn(layout.dim, shape.components, device=device, generator=generator)).Q.T.contiguous()
    ids = torch.randint(target.vocab_size, (512,), device=device, generator=generator)
    sequence = engine.core.pool.new_sequence()
    forward_reserved(engine.core.target, ids, [sequence], [len(ids)], logits="none")
    sequence.advance(len(ids))
    rows = engine.core.target.read_kv(sequence, 4, len(ids), first_layer=layout.first_layer)
    sequence.free()
    eye = torch.eye(target.head_dim, device=device).repeat(layout.num_blocks, 1, 1)
    weighting = Weighting(eye, eye).scaled(_DEVIATION / float((rows @ basis.T).std()))
    parts = {"predictor": tensors, "predictor_settings": settings | {"kind": "dense"}, "fingerprints": {}}

    def pack(variance: torch.Tensor, model: EntropyModel) -> CodecPack:
        made = CodecPack.build(layout, weighting, Transform("global", basis, None, variance), model, **parts)
        return made.with_info({"restore": cost.as_info()})

    first = pack(torch.full((shape.components,), _DEVIATION**2), EntropyModel.laplace())
    components = KvCodec(first, device).components(rows, torch.zeros_like(rows), shape.components)
    variance = components.pow(2).mean(0)
    return first.with_model(fit_entropy_model(components, variance), variance)
