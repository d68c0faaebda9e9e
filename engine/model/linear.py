"""Linear projections, and the CPU's faster ways to compute them.

Where llvmlite is installed, few rows of bf16 weights are multiplied by compiled code (`kernels.cpu_decode`) that reads them as they are stored, as fast
as memory gives them, and many rows by the library, so that there is one copy of the weights. The ways below are those without it.

Measured with PyTorch 2.13 on one AVX512-bf16 core: bf16 weights laid out once for oneDNN multiply 1 to 16 rows twice as fast as `F.linear`, which
lays them out anew on every call; in float32, oneDNN on plain weights is 2 to 2.3 times as fast as the default library from 2 rows on. Weights in
8 bits, for a draft, whose numbers only decide how often it is right, take half the time of packed bf16 ones for a few rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from enum import Enum
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from kernels.cpu_decode import compiled_available, compiled_loads, most_rows
from kernels.cpu_decode.blocks import BLOCK, BlockWeight
from kernels.cpu_decode.tiles import OUTPUTS, TileWeight

LARGEST_COPY_BYTES = 128 << 20
SMALL_ELEMENTS = 1 << 15  # of a float32 weight: one product of it takes less time than oneDNN needs to begin (14 us)
BYTE_ROWS = 16  # rows up to which weights in bytes are multiplied as they are; for more they are spread out first
_BYTE_ALIGNMENT = 64  # of inputs and outputs
_BLOCK_ELEMENTS = 1 << 17
_UNPACKED_ELEMENTS = 1 << 22  # of a quantised weight that are unpacked at once for a product of many rows
_MEASURED, _COPIES = (1536, 1024), 8  # a weight's shape, and how many take turns
_shares: dict[int, float] = {}  # `compiled_share` of this process, by threads
# of oneDNN's time for one product: a compiled step saves as much around its products (two threads, shares of 1.3 to 1.8: 37 tokens/s against 28),
# needs no second layout, and keeps a row's bits whatever stands beside it
_SLOWEST_SHARE = 2.0


class Int8Weight:
    """A weight [out, in] in 8 bits: steps int8 [out, in], and a scale [out] for each row, in the dtype of the products.

    Stands in for a packed tensor, under a tensor's type: among products only those of this module meet one.
    """

    is_mkldnn = True  # laid out for products: `to_dense` gives the plain tensor

    def __init__(self, weight: torch.Tensor) -> None:
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self.scales = torch.empty(weight.shape[0], dtype=weight.dtype, device=weight.device)
        self.steps = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        rows = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
        for start in range(0, weight.shape[0], rows):  # in blocks that stay in a core's cache
            block = weight[start : start + rows].float()
            scales = (block.abs().amax(1) / 127).clamp_min(1e-30).to(weight.dtype)
            self.scales[start : start + rows] = scales
            self.steps[start : start + rows] = block.div_(scales.float()[:, None]).round_().clamp_(-127, 127)

    @property
    def nbytes(self) -> int:
        """Of steps and scales."""
        return self.steps.nbytes + self.scales.nbytes

    def to_dense(self) -> torch.Tensor:
        """The weight [out, in] they stand for."""
        return self.steps.to(self.dtype) * self.scales[:, None]

    @staticmethod
    def fits(weight: torch.Tensor) -> bool:
        """Whether a weight of this kind can be multiplied in bytes here."""
        aligned = all(size % _BYTE_ALIGNMENT == 0 for size in weight.shape)
        return aligned and _packs_bf16(weight.dtype, weight.device) and hasattr(torch, "_weight_int8pack_mm")


LinearFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]  # x [N, in], weight [out, in], bias -> [N, out]


def _has_onednn() -> bool:
    operations = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available() and hasattr(operations, "_linear_pointwise") and hasattr(operations, "_reorder_linear_weight")
    )


def _packs_bf16(dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" and dtype == torch.bfloat16 and _has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def can_multiply_compiled(dtype: torch.dtype, device: torch.device) -> bool:
    """True where few rows can be multiplied by compiled code: bf16 on a CPU, with llvmlite installed."""
    return device.type == "cpu" and dtype == torch.bfloat16 and compiled_available()


def times_choose(dtype: torch.dtype, device: torch.device) -> bool:
    """True where few rows can be multiplied by compiled code as well as by packed oneDNN, which needs AVX-512 or its like: `compiled_share` says which
    is faster."""
    return can_multiply_compiled(dtype, device) and _packs_bf16(dtype, device)


def compiled_share(threads: int) -> float:
    """Time of the compiled product of one row as a share of packed oneDNN's with so many threads, where there are both (`times_choose`); measured at
    the first call, in some 20 ms, unless `know_compiled_share` told it."""
    if threads not in _shares:
        _shares[threads] = _measured_share()
    return _shares[threads]


def know_compiled_share(threads: int, share: float) -> None:
    """Take `compiled_share` from an earlier measurement, so that every process on a machine multiplies alike."""
    _shares[threads] = share


def _measured_share() -> float:
    """The least of some runs over weights that no cache holds; infinite where compiled code does not load."""
    if not compiled_loads():
        return math.inf
    from kernels.cpu_decode.step import linear

    with torch.inference_mode(False), torch.no_grad():
        x = torch.ones(1, _MEASURED[1], dtype=torch.bfloat16)
        plain = [torch.ones(_MEASURED, dtype=torch.bfloat16) for _ in range(_COPIES)]
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, 1) for weight in plain]
        own = _least_s(lambda n: linear(x, plain[n]))
        return own / _least_s(lambda n: torch.ops.mkldnn._linear_pointwise(x, packed[n], None, "none", [], ""))


def _least_s(run: Callable[[int], object]) -> float:
    found = []
    for n in (*range(_COPIES), *range(_COPIES)):
        began = time.perf_counter()
        run(n)
        found.append(time.perf_counter() - began)
    return min(found)


def compiled_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [N, in] by weight [out, in], plain or quantised, plus bias [out] -> [N, out]: up to `most_rows` rows compiled, more by the library."""
    if isinstance(weight, Int8Weight):
        return onednn_linear(x, weight, bias)
    if x.shape[0] > most_rows(torch.get_num_threads(), plain=isinstance(weight, torch.Tensor)):
        return _library_linear(x, weight, bias)
    return compiled_rows(x, weight, bias)


def compiled_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`compiled_linear` of any number of rows, none of whose results depends on the others; by the library, row by row, where a weight does not fit."""
    from kernels.cpu_decode.step import fits, linear

    if not fits(weight) or x.dim() != 2:
        if x.dim() == 2 and x.shape[0] > 1:
            return torch.cat([F.linear(x[n : n + 1], weight, bias) for n in range(x.shape[0])])
        return F.linear(x, weight, bias)
    out = linear(x, weight)
    return (out if bias is None else out.add_(bias)).to(x.dtype)


def _library_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if not isinstance(weight, (BlockWeight, TileWeight)):
        return F.linear(x, weight, bias)
    from kernels.cpu_decode.step import unpack

    outputs, inputs = weight.shape
    step = max(1, _UNPACKED_ELEMENTS // max(1, inputs))
    if outputs <= step:
        return F.linear(x, unpack(weight), bias)
    out = x.new_empty(*x.shape[:-1], outputs)  # a head's weight, which would fill more memory than all that is kept
    step = -(-step // OUTPUTS) * OUTPUTS  # whole tiles
    for start in range(0, outputs, step):
        own = slice(start, start + step)
        part = unpack(weight.of_outputs(own))
        out[..., own] = F.linear(x, part, None if bias is None else bias[own])
    return out


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [N, in] by weight [out, in], plain, packed or in bytes, plus bias [out] -> [N, out], on a CPU."""
    if isinstance(weight, Int8Weight):
        if len(x) > BYTE_ROWS:
            return F.linear(x, weight.to_dense(), bias)
        out = torch._weight_int8pack_mm(x.contiguous(), weight.steps, weight.scales)
        return out if bias is None else out.add_(bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def float32_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [N, in] by weight [out, in], both float32, plus bias [out] -> [N, out], on a CPU: by oneDNN unless the weight is small."""
    if weight.numel() <= SMALL_ELEMENTS:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Gemm(Enum):
    """How a model's weights are laid out and multiplied. Each decoder has its own (`Decoder.gemm`); one engine's does not settle another's."""

    COMPILED = "compiled"  # bf16 as it is stored, or in quantised blocks: few rows by `kernels.cpu_decode`, many by the library
    PACKED = "packed"  # bf16 laid out once for oneDNN, on a CPU
    ONEDNN = "onednn"  # float32 as it is stored, by oneDNN, on a CPU
    LIBRARY = "library"  # as they are, by PyTorch's default

    @property
    def linear(self) -> LinearFn:
        """The product."""
        return _LINEAR[self]


_LINEAR: dict[Gemm, LinearFn] = {
    Gemm.COMPILED: compiled_linear,
    Gemm.PACKED: onednn_linear,
    Gemm.ONEDNN: float32_linear,
    Gemm.LIBRARY: F.linear,
}


def select_gemm(dtype: torch.dtype, device: torch.device) -> Gemm:
    """The fastest for a decoder of this dtype and device: compiled where that can be, its time is not far above oneDNN's here, and it loads."""
    slower = times_choose(dtype, device) and compiled_share(torch.get_num_threads()) > _SLOWEST_SHARE
    if can_multiply_compiled(dtype, device) and not slower and compiled_loads():
        return Gemm.COMPILED
    if _packs_bf16(dtype, device):
        return Gemm.PACKED
    return Gemm.ONEDNN if device.type == "cpu" and dtype == torch.float32 and _has_onednn() else Gemm.LIBRARY


def packed_copy(weight: torch.Tensor) -> torch.Tensor | None:
    """A copy of bf16 weight [out, in] laid out for oneDNN, beside a plain one that must stay; None where it would take much memory."""
    if weight.numel() * weight.element_size() > LARGEST_COPY_BYTES:
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1)


class Projection(nn.Module):
    """Weight [out, in] and optional bias [out]; the weight can be packed for oneDNN or put into bytes, either of which replaces the plain one.

    dtype, device: of both, which have no values yet; PyTorch's defaults where they are None.
    """

    def __init__(
        self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.plain: nn.Parameter | None = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype, device=device)) if bias else None
        self.packed: torch.Tensor | None = None

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as a `LinearFn` takes it, plain, packed or in bytes."""
        if self.packed is not None:
            return self.packed
        assert self.plain is not None
        return self.plain.data

    @property
    def in_few_bits(self) -> bool:
        """Whether the weight is kept in fewer bits than the products' inputs."""
        return self.packed is not None and not isinstance(self.packed, torch.Tensor)

    @property
    def weight(self) -> torch.Tensor:
        """The plain weight [out, in]; of a packed one a copy is made for the caller."""
        return self.matrix.to_dense() if self.packed is not None else self.matrix

    def take_blocks(self, blocks: BlockWeight | TileWeight) -> None:
        """A quantised weight in place of the plain one, of its shape."""
        assert self.plain is not None and blocks.shape == self.plain.shape and blocks.dtype == self.plain.dtype
        self.packed, self.plain = cast(torch.Tensor, blocks), None

    def borrow(self, memory: torch.Tensor) -> int:
        """Take the plain weight's values from the first elements of `memory` [n], until `pack` gives it up; returns how many they are."""
        assert self.plain is not None
        shape, count = self.plain.shape, self.plain.numel()
        self.plain = nn.Parameter(memory[:count].view(shape), requires_grad=False)
        return count

    def pack(self, gemm: Gemm, *, int8: bool = False) -> None:
        """Lay the weight out as `gemm` multiplies it, or put it into bytes where it can multiply these; the plain one is given up."""
        if self.plain is None:
            return
        if gemm is Gemm.COMPILED:
            if int8 and self.plain.shape[1] % BLOCK == 0:
                self.packed, self.plain = cast(torch.Tensor, BlockWeight.of_bytes(self.plain.data)), None
        elif int8 and Int8Weight.fits(self.plain):
            self.packed, self.plain = cast(torch.Tensor, Int8Weight(self.plain.data)), None
        elif gemm is Gemm.PACKED:
            self.packed, self.plain = torch.ops.mkldnn._reorder_linear_weight(self.plain.data, 1), None

    def unpack(self) -> None:
        """Back to the plain layout."""
        if self.packed is not None:
            self.plain = nn.Parameter(self.packed.to_dense(), requires_grad=False)
            self.packed = None
