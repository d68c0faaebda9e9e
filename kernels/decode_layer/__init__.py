"""A decode step of a few tokens through fused kernels; `reference.py` says what it means, `tensors.py` what it works on."""

from __future__ import annotations

from kernels.decode_layer import reference
from kernels.decode_layer.plans import DecodePlan
from kernels.decode_layer.tensors import DecodeBuffers, DecodeShape, DecodeWeights, LayerTensors
from kernels.dispatch import use_triton

__all__ = ["DecodeBuffers", "DecodePlan", "DecodeShape", "DecodeWeights", "LayerTensors", "decode_embed", "decode_head", "decode_layers"]


def decode_embed(weights: DecodeWeights, buffers: DecodeBuffers, *, first_layer: int = 0, embed: bool = True) -> None:
    """`reference.decode_embed`, through Triton where it applies."""
    if use_triton(buffers.stream):
        from kernels.decode_layer.triton import decode_embed as launch

        return launch(weights, buffers, first_layer=first_layer, embed=embed)
    return reference.decode_embed(weights, buffers, first_layer=first_layer, embed=embed)


def decode_layers(weights: DecodeWeights, buffers: DecodeBuffers, shape: DecodeShape, layers: range | None = None) -> None:
    """`reference.decode_layers`, through Triton where it applies."""
    if use_triton(buffers.stream):
        from kernels.decode_layer.triton import decode_layers as launch

        return launch(weights, buffers, shape, layers)
    return reference.decode_layers(weights, buffers, shape, layers)


def decode_head(weights: DecodeWeights, buffers: DecodeBuffers, shape: DecodeShape) -> None:
    """`reference.decode_head`, through Triton where it applies."""
    if use_triton(buffers.stream):
        from kernels.decode_layer.triton import decode_head as launch

        return launch(weights, buffers, shape)
    return reference.decode_head(weights, buffers, shape)
