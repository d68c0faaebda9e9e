"""Integer codes to bytes and back: b-bit packing, half-precision numbers, DEFLATE with a named error."""

from __future__ import annotations

import zlib

import numpy as np
import torch

from codec.errors import CorruptedCode

_DEFLATE_LEVEL = 6


def pack_codes(codes: np.ndarray, bits: int) -> bytes:
    """uint8 codes below 2**bits, any shape (row-major), to ceil(n * bits / 8) bytes, first code in the lowest bits."""
    flat = np.ascontiguousarray(codes, np.uint8).reshape(-1)
    if bits == 8:
        return flat.tobytes()
    if 8 % bits == 0:
        per_byte = 8 // bits
        padded = np.zeros(-(-len(flat) // per_byte) * per_byte, np.uint8)
        padded[: len(flat)] = flat
        columns = padded.reshape(-1, per_byte)
        packed = np.zeros(len(columns), np.uint8)
        for i in range(per_byte):
            packed |= columns[:, i] << np.uint8(i * bits)
        return packed.tobytes()
    planes = (flat[:, None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
    return np.packbits(planes.reshape(-1), bitorder="little").tobytes()


def unpack_codes(data: bytes, bits: int, count: int) -> np.ndarray:
    """Inverse of pack_codes: uint8 [count]; CorruptedCode when the length is not what `count` codes take."""
    if len(data) != -(-count * bits // 8):
        raise CorruptedCode(f"{len(data)} bytes cannot hold {count} codes of {bits} bits", "restore the bytes from a copy")
    raw = np.frombuffer(data, np.uint8)
    if bits == 8:
        return raw.copy()
    if 8 % bits == 0:
        shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
        return ((raw[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1)[:count]
    planes = np.unpackbits(raw, bitorder="little", count=count * bits).reshape(count, bits)
    return (planes << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)


def to_bytes(x: torch.Tensor, dtype: torch.dtype) -> bytes:
    """A float tensor rounded to a 16-bit type (float16 saturates instead of overflowing), row-major bytes."""
    if dtype == torch.float16:
        x = x.clamp(-65504.0, 65504.0)
    return x.to(dtype).contiguous().cpu().view(torch.int16).numpy().tobytes()


def from_bytes(data: bytes, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Inverse of to_bytes, as float32 of the given shape."""
    if len(data) != 2 * int(np.prod(shape)):
        raise CorruptedCode(f"{len(data)} bytes cannot hold 16-bit numbers of shape {shape}", "restore the bytes from a copy")
    numbers = torch.from_numpy(np.frombuffer(data, np.int16).copy()).view(dtype)
    return numbers.to(device).float().reshape(shape)


def deflate(data: bytes) -> bytes:
    return zlib.compress(data, _DEFLATE_LEVEL)


def inflate(data: bytes, limit: int) -> bytes:
    """Inverse of deflate; CorruptedCode on a bad stream or one that would exceed `limit` bytes."""
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise CorruptedCode(f"a DEFLATE section does not decode: {error}", "restore the bytes from a copy") from None
    if len(raw) > limit or not stream.eof:
        raise CorruptedCode("a DEFLATE section has the wrong length", "restore the bytes from a copy")
    return raw
