"""The compiled step's face: tensors in, addresses to the compiled code. Importing this module loads that code, which compiles it once for a machine.

Axes: N new tokens (rows), L layers, H query heads, G KV heads, d head size, E hidden size, I intermediate size, V vocabulary, B requests, P pages.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.cpu_decode.blocks import BF16, BLOCK, BLOCK_BYTES, BlockWeight
from kernels.cpu_decode.crew import CREW, num_threads
from kernels.cpu_decode.machine_code import functions
from kernels.cpu_decode.tiles import GROUP, OF_FILES, OUTPUTS, TileWeight
from kernels.decode_layer.tensors import LayerTensors

Matrix = torch.Tensor | BlockWeight | TileWeight
_FUNCTIONS = functions()
_SPARE_PLACES = 16  # that the compiled step may overwrite behind a row's scores


def fits(weight: Matrix) -> bool:
    """Whether a weight can be multiplied here: quantised, or plain contiguous bf16 on a CPU, of whole blocks."""
    if isinstance(weight, (BlockWeight, TileWeight)):
        return True
    plain = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not weight.is_mkldnn and weight.is_contiguous()
    return plain and weight.dim() == 2 and weight.shape[1] % BLOCK == 0 and weight.numel() > 0


def _place(weight: Matrix) -> tuple[int, int]:
    """(address, format) of a weight that fits."""
    if isinstance(weight, BlockWeight):
        return weight.blocks.data_ptr(), weight.kind
    if isinstance(weight, TileWeight):
        return weight.tiles.data_ptr(), weight.kind
    return weight.data_ptr(), BF16


def whole_rows(rows: int) -> int:
    """Rows of bf16 that there is to be workspace for: products of matrices take sixteen at once, those of tiles 19 bytes for eight numbers."""
    return -(-(rows + -(-3 * rows // 16)) // 16) * 16


def _numbers(x: torch.Tensor) -> np.ndarray:
    """x as contiguous float32."""
    return x.detach().float().contiguous().numpy()


def _at(x: np.ndarray) -> int:
    """Where contiguous numbers lie; 0 for none."""
    assert x.flags.c_contiguous
    return x.ctypes.data if x.size else 0


def linear(x: torch.Tensor, weight: Matrix) -> torch.Tensor:
    """x [N, in] of any float dtype by a weight [out, in] that `fits` -> float32 [N, out]. A row's bits do not depend on the others."""
    outputs, inputs = weight.shape
    if x.dim() != 2 or x.shape[1] != inputs:
        raise ValueError(f"rows of shape {list(x.shape)} do not fit a weight of shape {list(weight.shape)}")
    out = np.empty((x.shape[0], outputs), np.float32)
    numbers, packed = _numbers(x), np.empty(whole_rows(x.shape[0]) * inputs, np.uint16)
    _FUNCTIONS["linear"](*_place(weight), outputs, inputs, _at(numbers), x.shape[0], _at(packed), _at(out))
    return torch.from_numpy(out)


def unpack(weight: BlockWeight | TileWeight) -> torch.Tensor:
    """What `to_dense` gives of blocks, or of a file's blocks in tiles of bf16, a few rows at a time and so in little memory beside the result."""
    out = torch.empty(weight.shape, dtype=weight.dtype)
    if isinstance(weight, TileWeight):
        if weight.dtype != torch.bfloat16 or weight.kind not in OF_FILES:
            return weight.to_dense()
        _FUNCTIONS["tiles_unpacked"](weight.tiles.data_ptr(), weight.kind, len(weight.tiles), weight.shape[1] // GROUP, out.data_ptr())
        return out
    rows = max(1, (1 << 17) // weight.shape[1])
    buffer = np.empty(rows * weight.shape[1], np.float32)
    row_bytes = weight.shape[1] // BLOCK * BLOCK_BYTES[weight.kind]
    for start in range(0, weight.shape[0], rows):
        part = out[start : start + rows]
        _FUNCTIONS["unpacked"](weight.blocks.data_ptr() + start * row_bytes, weight.kind, part.numel() // BLOCK, _at(buffer))
        part.copy_(torch.from_numpy(buffer[: part.numel()]).view(part.shape))
    return out


def tiled(weight: torch.Tensor, kind: int, memory: torch.Tensor) -> TileWeight:
    """What `TileWeight.of` gives; of bf16 in one piece without its many passes over memory."""
    if not TileWeight.fits(weight.shape) or weight.dtype != torch.bfloat16 or not weight.is_contiguous():
        return TileWeight.of(weight, kind, memory)
    outputs, columns = weight.shape
    if memory.dtype != torch.uint8 or memory.numel() != TileWeight.num_bytes(weight.shape, kind) or not memory.is_contiguous():
        raise ValueError(f"{memory.numel()} numbers of {memory.dtype} are no room for the tiles of a weight of shape {list(weight.shape)}")
    _FUNCTIONS["tiles_coded"](weight.data_ptr(), kind, outputs, columns, memory.data_ptr())
    return TileWeight(memory.view(outputs // OUTPUTS, -1), kind, weight.dtype)


@dataclass(frozen=True)
class StepShape:
    """What a model's layers share."""

    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    scale: float  # of the attention scores


class CompiledLayers:
    """Layers of one model over one pool, laid out for the compiled step; keeps the tensors alive.

    Args:
        layers: their weights, each of which `fits`.
        pages: keys and values of each layer, bf16 [P, S, G, d] contiguous. They must not move.
        shape: of all layers.
    """

    def __init__(self, layers: Sequence[LayerTensors], pages: Sequence[tuple[torch.Tensor, torch.Tensor]], shape: StepShape) -> None:
        self.shape, self._kept = shape, [*layers, *pages]
        matrices = [(w.qkv, w.o, w.gate_up, w.down) for w in layers]
        if not all(fits(matrix) for row in matrices for matrix in row):
            raise ValueError("the compiled step takes quantised weights, and plain bf16 ones of whole blocks")
        places = [[_place(matrix) for matrix in row] for row in matrices]
        self._addresses = np.array([[address for address, _ in row] for row in places], np.int64)
        self._kinds = np.array([[kind for _, kind in row] for row in places], np.int64)
        self._norms = np.stack([np.stack((_numbers(w.input_norm), _numbers(w.post_norm))) for w in layers])
        self._qkv_bias = self._stack([w.qkv_bias for w in layers], (0,))
        self._o_bias = self._stack([w.o_bias for w in layers], (0,))
        self._qk_norm = self._stack([w.qk_norm for w in layers], (2, 0))
        self._pool = np.array([[k.data_ptr(), v.data_ptr()] for k, v in pages], np.int64)
        self._page_size = pages[0][0].shape[1]
        self._layer_bytes = sum(matrix.nbytes for row in matrices for matrix in row) // max(1, len(matrices))
        fixed = (self._addresses, self._kinds, self._norms, self._qkv_bias, self._o_bias, self._qk_norm, self._pool)
        self._fixed = tuple(_at(numbers) for numbers in fixed)

    @property
    def num_threads(self) -> int:
        """Threads that a step asked for now may have: PyTorch's number of the calling thread, within the bounds of `crew.num_threads`."""
        return num_threads(self._layer_bytes)

    def told(self, cos: torch.Tensor, sin: torch.Tensor) -> np.ndarray:
        """What `arguments.MODEL` names, int64; cos, sin: tables of angles by position, [*, d/2] float32, kept by the caller."""
        assert cos.is_contiguous() and sin.is_contiguous() and cos.dtype == sin.dtype == torch.float32
        return np.array([*self._fixed, len(self._addresses), self._page_size, cos.data_ptr(), sin.data_ptr()], np.int64)

    @staticmethod
    def _stack(parts: Sequence[torch.Tensor | None], absent: tuple[int, ...]) -> np.ndarray:
        return np.stack([np.empty(absent, np.float32) if part is None else _numbers(part) for part in parts])

    def run(
        self,
        layers: range,
        stream: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        positions: np.ndarray,
        places: np.ndarray,
        requests: np.ndarray,
        page_tables: np.ndarray,
    ) -> None:
        """Run layers over the residual stream float32 [N, E], in place; keys and values of the rows are written.

        A row attends to places 0 to position - 1 of its request and to its own place. What it gets is the same bits whatever rows stand beside it.

        Args:
            angles: cos, sin float32 [N, d/2].
            positions, places: int64 [N], a row's position in its text and its place in the cache, which differ in draft trees.
            requests: int64 [N], the row of `page_tables` int64 [B, P] that holds a row's pages.
        """
        s, (rows, width) = self.shape, stream.shape
        wide, joined = max((s.heads + 2 * s.kv_heads) * s.head_dim, 2 * s.intermediate), s.heads * s.head_dim
        places_most, threads = int(positions.max()) + 1 + _SPARE_PLACES, self.num_threads
        cos, sin = (angle.float().contiguous() for angle in angles)
        # in one piece, as every step asks for it: wide, attended; and for each thread normed, scores, and packed in two bytes a number
        shared = (rows * wide, rows * joined)
        own = (rows * width, s.heads // s.kv_heads * places_most, whole_rows(rows) * max(width, joined, s.intermediate) // 2)
        starts = [0, *itertools.accumulate(-(-size // 16) * 16 for size in (*shared, *own * threads))]
        space = torch.empty(starts[-1], dtype=torch.float32)
        spread, attended, *of_threads = (space.data_ptr() + 4 * start for start in starts[:-1])
        assert stream.is_contiguous() and stream.dtype == torch.float32
        told = (
            *self._fixed, layers.start, layers.stop, stream.data_ptr(), rows, width, cos.data_ptr(), sin.data_ptr(),
            _at(positions), _at(places), _at(requests), _at(page_tables), page_tables.shape[1],
            s.heads, s.kv_heads, s.head_dim, s.intermediate, self._page_size,
        )  # fmt: skip

        held = (space, stream, cos, sin, positions, places, requests, page_tables)  # as long as any thread runs this

        def run(part: int, parts: int, counter: int, _held: tuple[object, ...] = held) -> None:
            normed, scores, packed = of_threads[3 * part : 3 * part + 3]
            _FUNCTIONS["run_layers"](
                *told, normed, spread, wide, attended, scores, places_most, packed, s.eps, s.scale, part, parts, counter
            )  # fmt: skip

        # attention takes longer over longer texts: steps of one key take about as long as each other
        CREW.run(threads, (self._addresses[0, 0], layers, rows, places_most.bit_length()), run)


def head(stream: torch.Tensor, norm: torch.Tensor, weight: Matrix, eps: float) -> torch.Tensor:
    """Final norm [E] of the residual stream [N, E] and the product with the head [V, E] -> float32 logits [N, V]."""
    rows, (outputs, width) = stream.float().contiguous(), weight.shape
    count, factors, threads = len(rows), norm.float().contiguous(), num_threads(weight.nbytes)
    logits, normed = torch.empty(count, outputs, dtype=torch.float32), torch.empty(threads, count, width, dtype=torch.float32)
    packed = torch.empty(threads, whole_rows(count), width, dtype=torch.bfloat16)

    def run(part: int, parts: int, _: int) -> None:
        _FUNCTIONS["run_head"](
            rows.data_ptr(), count, width, factors.data_ptr(), *_place(weight), outputs,
            normed[part].data_ptr(), packed[part].data_ptr(), logits.data_ptr(), eps, part, parts,
        )  # fmt: skip

    CREW.run(threads, (*_place(weight), count), run)
    return logits


def in_place(name: str, numbers: np.ndarray) -> None:
    """Apply one of the program's formulas ("exponentials", "rounded") to float32 numbers, a multiple of 16."""
    _FUNCTIONS[name](_at(numbers), numbers.size // 16)
