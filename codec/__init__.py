"""Coding of KV caches: what a prediction leaves over, weighted by what attention cares about, transformed, quantised and entropy-coded."""

from codec.codec import KvCodec
from codec.container import read_sections, write_sections
from codec.errors import (
    BadInput,
    CodecError,
    CorruptedCode,
    ForeignCode,
    NewerCode,
    PackMismatch,
    TruncatedCode,
    UnknownQuality,
)
from codec.pack import CodecPack
from codec.spec import NUM_SINKS, QUALITIES, SPAN_TOKENS, KvLayout

__all__ = [
    "NUM_SINKS",
    "QUALITIES",
    "SPAN_TOKENS",
    "BadInput",
    "CodecError",
    "CodecPack",
    "CorruptedCode",
    "ForeignCode",
    "KvCodec",
    "KvLayout",
    "NewerCode",
    "PackMismatch",
    "TruncatedCode",
    "UnknownQuality",
    "read_sections",
    "write_sections",
]
