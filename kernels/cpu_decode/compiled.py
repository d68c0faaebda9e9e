"""A decode step on a CPU, compiled by Numba: a few new tokens through the layers and the head, in float32 beside the weights as they are stored.

A token's result is the same bits whatever tokens stand beside it, as each output is a sum of its own in one order (`vectors`).
Axes as in `step`. Addresses are int64, of weights whose rows lie `strides` bytes apart.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit, types

from kernels.cpu_decode.blocks import BF16, BLOCK, BLOCK_BYTES, Q4_0, Q4_1, Q8_0
from kernels.cpu_decode.vectors import bits_of, dot, from_bits, pointer, sum_of_squares, unpack, weighted_sum

_LOG2_E = np.float32(1.4426950408889634)
_LEAST, _MOST = np.float32(-126.0), np.float32(80.0)
_HALF, _ONE = np.float32(0.5), np.float32(1.0)
_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy", "boundscheck": False}
_I = types.int64
_F1, _F2, _F3, _I1, _I2 = (
    types.Array(kind, n, "C") for kind, n in ((types.float32, 1), (types.float32, 2), (types.float32, 3), (_I, 1), (_I, 2))
)
_LAYERS = types.void(
    _I2, _I2, _F3, _F2, _F2, _F3, _I2, _I, _I,
    _F2, _F2, _F2, _I1, _I1, _I1, _I2, _I1, _I,
    _F2, _F2, _F2, _F2, types.float32, types.float32,
)  # fmt: skip


@njit(**_OPTIONS)
def _address(x):
    return np.int64(x.ctypes.data)


@njit(**_OPTIONS)
def _row_bytes(kind, columns):
    return columns // BLOCK * BLOCK_BYTES[kind]


@njit(**_OPTIONS)
def _exp(x):
    """e^x in float32 for x <= 88, relative error below 3e-7 + 4e-8 |x|; by 2^n p(f), p of degree 6 (Cephes' coefficients in base 2)."""
    scaled = x * _LOG2_E
    if scaled < _LEAST:  # not max(): NaN stays NaN
        scaled = _LEAST
    whole = np.floor(scaled + _HALF)
    f = scaled - whole
    p = np.float32(1.535336188319500e-4)
    p = p * f + np.float32(1.339887440266574e-3)
    p = p * f + np.float32(9.618437357674640e-3)
    p = p * f + np.float32(5.550332471162809e-2)
    p = p * f + np.float32(2.402264791363012e-1)
    p = p * f + np.float32(6.931472028550421e-1)
    p = p * f + _ONE
    return p * from_bits(np.uint32((np.int32(whole) + np.int32(127)) << np.int32(23)))


@njit(**_OPTIONS)
def _rounded(x):
    """A float32 as bf16 holds it, to the nearest, ties to even."""
    bits = bits_of(x)
    return from_bits(np.uint32((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)))


@njit(**_OPTIONS)
def _dots(kind, rows, w, x, x_stride, y, y_stride, blocks):
    """`dot` for a format and 1 to 4 rows known at run time."""
    if kind == BF16:
        if rows == 1:
            dot(BF16, 1, w, x, x_stride, y, y_stride, blocks)
        elif rows == 2:
            dot(BF16, 2, w, x, x_stride, y, y_stride, blocks)
        elif rows == 3:
            dot(BF16, 3, w, x, x_stride, y, y_stride, blocks)
        else:
            dot(BF16, 4, w, x, x_stride, y, y_stride, blocks)
    elif kind == Q8_0:
        if rows == 1:
            dot(Q8_0, 1, w, x, x_stride, y, y_stride, blocks)
        elif rows == 2:
            dot(Q8_0, 2, w, x, x_stride, y, y_stride, blocks)
        elif rows == 3:
            dot(Q8_0, 3, w, x, x_stride, y, y_stride, blocks)
        else:
            dot(Q8_0, 4, w, x, x_stride, y, y_stride, blocks)
    elif kind == Q4_0:
        if rows == 1:
            dot(Q4_0, 1, w, x, x_stride, y, y_stride, blocks)
        elif rows == 2:
            dot(Q4_0, 2, w, x, x_stride, y, y_stride, blocks)
        elif rows == 3:
            dot(Q4_0, 3, w, x, x_stride, y, y_stride, blocks)
        else:
            dot(Q4_0, 4, w, x, x_stride, y, y_stride, blocks)
    elif rows == 1:
        dot(Q4_1, 1, w, x, x_stride, y, y_stride, blocks)
    elif rows == 2:
        dot(Q4_1, 2, w, x, x_stride, y, y_stride, blocks)
    elif rows == 3:
        dot(Q4_1, 3, w, x, x_stride, y, y_stride, blocks)
    else:
        dot(Q4_1, 4, w, x, x_stride, y, y_stride, blocks)


@njit(**_OPTIONS)
def _product(kind, w, w_stride, first, last, x, x_stride, rows, y, y_stride, blocks):
    """Outputs [first, last) of y = x W^T; each weight comes from memory once, whatever the rows."""
    for c in range(first, last):
        for r in range(0, rows, 4):
            own = w + c * w_stride
            _dots(kind, min(4, rows - r), own, x + r * x_stride, x_stride, y + r * y_stride + 4 * c, y_stride, blocks)


@njit(**_OPTIONS)
def _norm(x, weight, eps, out):
    """RMS norm of rows x [N, E] float32 to out [N, E]."""
    for r in range(x.shape[0]):
        width = x.shape[1]
        mean = sum_of_squares(_address(x[r]), width // 16) / np.float32(width)
        factor = _ONE / np.sqrt(mean + eps)
        for e in range(width):
            out[r, e] = x[r, e] * factor * weight[e]


@njit(**_OPTIONS)
def _head_norm(x, weight, eps):
    """RMS norm of one head x [d] in place."""
    factor = _ONE / np.sqrt(sum_of_squares(_address(x), x.shape[0] // 16) / np.float32(x.shape[0]) + eps)
    for e in range(x.shape[0]):
        x[e] = x[e] * factor * weight[e]


@njit(**_OPTIONS)
def _turn(x, cos, sin):
    """Rotate one head x [d] in place by angles [d/2]."""
    half = x.shape[0] // 2
    for e in range(half):
        a, b = x[e], x[e + half]
        x[e] = a * cos[e] - b * sin[e]
        x[e + half] = b * cos[e] + a * sin[e]


@njit(**_OPTIONS)
def _write(numbers, address):
    """Numbers [n] float32 as bf16 to an address."""
    out = carray(pointer(address), numbers.shape[0])
    for e in range(numbers.shape[0]):
        out[e] = np.uint16(bits_of(_rounded(numbers[e])) >> np.uint32(16))


@njit(**_OPTIONS)
def _add(stream, update, bias):
    """Add the update [N, E] and the bias [E], if it has numbers, to the residual stream [N, E], which keeps what bf16 holds."""
    for r in range(stream.shape[0]):
        if bias.shape[0]:
            for e in range(stream.shape[1]):
                stream[r, e] = _rounded(stream[r, e] + (update[r, e] + bias[e]))
        else:
            for e in range(stream.shape[1]):
                stream[r, e] = _rounded(stream[r, e] + update[r, e])


@njit(**_OPTIONS)
def _attend(q, group, keys_at, values_at, row_bytes, page_size, pages, position, own, scale, scores, out):
    """One row's heads of one KV head: q [group, d] over places [0, position) and its `own` place -> out [group, d].

    keys_at, values_at: the KV head's numbers in place 0 of page 0, places row_bytes apart. scores [group, > position]: workspace.
    """
    d = q.shape[1]
    blocks = d // BLOCK
    for start in range(0, position, page_size):
        count = min(page_size, position - start)
        base = keys_at + pages[start // page_size] * page_size * row_bytes
        stride = scores.shape[1] * 4
        _product(BF16, base, row_bytes, 0, count, _address(q), 4 * d, group, _address(scores) + 4 * start, stride, blocks)
    page, offset = pages[own // page_size], own % page_size
    at = (page * page_size + offset) * row_bytes
    for h in range(group):  # the place's key alone, as its neighbours may lie outside of the pool
        _dots(BF16, 1, keys_at + at, _address(q[h]), 0, _address(scores[h, position:]), 0, blocks)
    for h in range(group):
        most = np.float32(-np.inf)
        for i in range(position + 1):
            most = max(most, scores[h, i])
        most = most * scale
        for i in range(position + 1):
            scores[h, i] = _exp(scores[h, i] * scale - most)
        total = np.float32(0.0)
        for i in range(position + 1):
            total += scores[h, i]
        for e in range(d):
            out[h, e] = 0.0
        for part in range(0, d, 64):
            into, column = _address(out[h, part:]), values_at + 2 * part
            for start in range(0, position, page_size):
                base = column + pages[start // page_size] * page_size * row_bytes
                count, weights = min(page_size, position - start), _address(scores[h, start:])
                if d - part >= 64:
                    weighted_sum(4, base, row_bytes, weights, count, into)
                else:
                    weighted_sum(2, base, row_bytes, weights, count, into)
            if d - part >= 64:
                weighted_sum(4, column + at, row_bytes, _address(scores[h, position:]), 1, into)
            else:
                weighted_sum(2, column + at, row_bytes, _address(scores[h, position:]), 1, into)
        for e in range(d):
            out[h, e] /= total


@njit(_LAYERS, **_OPTIONS)
def run_layers(
    addresses, kinds, norms, qkv_bias, o_bias, qk_norm, pool, first, last,
    stream, cos, sin, positions, places, requests, tables, shape, page_size,
    normed, wide, attended, scores, eps, scale,
):  # fmt: skip
    """Layers [first, last) over the residual stream [N, E], in place; see `step.CompiledLayers.run`.

    addresses, kinds int64 [L, 4]: of qkv, o, gate_up, down. pool int64 [L, 2]: addresses of keys and values, bf16 [P, S, G, d]. shape: H, G, d, I.
    normed [N, E], wide [N, max(qkv rows, 2 I)], attended [N, H d], scores [H / G, places]: workspace.
    """
    heads, kv_heads, d, inner = shape[0], shape[1], shape[2], shape[3]
    rows, width = stream.shape
    group, qkv_rows = heads // kv_heads, (heads + 2 * kv_heads) * d
    row_bytes = kv_heads * d * 2
    for layer in range(first, last):
        _norm(stream, norms[layer, 0], eps, normed)
        w, kind = addresses[layer], kinds[layer]
        x, x_stride, y, y_stride = _address(normed), 4 * width, _address(wide), 4 * wide.shape[1]
        _product(kind[0], w[0], _row_bytes(kind[0], width), 0, qkv_rows, x, x_stride, rows, y, y_stride, width // BLOCK)
        for r in range(rows):
            place = places[r]
            page = tables[requests[r], place // page_size]
            slot = page * page_size + place % page_size
            if qkv_bias.shape[1]:
                for e in range(qkv_rows):
                    wide[r, e] += qkv_bias[layer, e]
            for h in range(heads + kv_heads):
                head = wide[r, h * d : (h + 1) * d]
                if qk_norm.shape[2]:
                    _head_norm(head, qk_norm[layer, 0 if h < heads else 1], eps)
                _turn(head, cos[r], sin[r])
            _write(wide[r, heads * d : (heads + kv_heads) * d], pool[layer, 0] + slot * row_bytes)
            _write(wide[r, (heads + kv_heads) * d : qkv_rows], pool[layer, 1] + slot * row_bytes)
        for r in range(rows):
            for g in range(kv_heads):
                q = wide[r, g * group * d : (g + 1) * group * d].reshape(group, d)
                out = attended[r, g * group * d : (g + 1) * group * d].reshape(group, d)
                keys_at, values_at = pool[layer, 0] + g * d * 2, pool[layer, 1] + g * d * 2
                _attend(
                    q, group, keys_at, values_at, row_bytes, page_size, tables[requests[r]], positions[r], places[r], scale, scores, out
                )
        _product(
            kind[1],
            w[1],
            _row_bytes(kind[1], heads * d),
            0,
            width,
            _address(attended),
            4 * heads * d,
            rows,
            x,
            x_stride,
            heads * d // BLOCK,
        )
        _add(stream, normed, o_bias[layer])
        _norm(stream, norms[layer, 1], eps, normed)
        _product(kind[2], w[2], _row_bytes(kind[2], width), 0, 2 * inner, x, x_stride, rows, y, y_stride, width // BLOCK)
        for r in range(rows):
            for e in range(inner):
                gate = wide[r, e]
                negative = -gate
                if negative > _MOST:
                    negative = _MOST
                wide[r, e] = gate / (_ONE + _exp(negative)) * wide[r, inner + e]
        _product(kind[3], w[3], _row_bytes(kind[3], inner), 0, width, y, y_stride, rows, x, x_stride, inner // BLOCK)
        _add(stream, normed, o_bias[layer, :0])


@njit(types.void(_F2, _F1, _I, _I, _I, types.float32, _F2, _F2), **_OPTIONS)
def run_head(stream, norm, address, kind, outputs, eps, normed, logits):
    """Final norm of the residual stream [N, E] and the product with the head's weight, `outputs` rows -> logits [N, outputs]."""
    _norm(stream, norm, eps, normed)
    rows, width = stream.shape
    x, y, y_stride = _address(normed), _address(logits), 4 * logits.shape[1]
    _product(kind, address, _row_bytes(kind, width), 0, outputs, x, 4 * width, rows, y, y_stride, width // BLOCK)


@njit(types.void(_I, _I, _I, _I, _F2, _F2), **_OPTIONS)
def linear(address, kind, outputs, inputs, x, y):
    """x [N, inputs] float32 by a weight of so many outputs -> y [N, outputs] float32."""
    _product(
        kind, address, _row_bytes(kind, inputs), 0, outputs, _address(x), 4 * inputs, x.shape[0], _address(y), 4 * outputs, inputs // BLOCK
    )


@njit(types.void(_I, _I, _F1), **_OPTIONS)
def unpacked(address, kind, out):
    """The weights of whole blocks at an address, float32."""
    blocks = out.shape[0] // BLOCK
    if kind == BF16:
        unpack(BF16, address, _address(out), blocks)
    elif kind == Q8_0:
        unpack(Q8_0, address, _address(out), blocks)
    elif kind == Q4_0:
        unpack(Q4_0, address, _address(out), blocks)
    else:
        unpack(Q4_1, address, _address(out), blocks)
