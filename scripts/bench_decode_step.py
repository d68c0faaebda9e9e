"""Time a whole decode step through the fused kernels, in a CUDA graph, against the time its weights take to be read.

    python scripts/bench_decode_step.py --shape 1.5b --rows 1,2,5,8x1,32x1 --json-out step.json

Rows are BATCHxLENGTH (5 alone is one request with five new tokens). Weights are random. The read bandwidth is measured in the same run. Both
paths are checked against plain float32 arithmetic first, and no speed-up is printed for one that fails. Beside the fused path stands one of the
library's products and separate kernels, in a graph too.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.decode_layer import reference as reference_step
from kernels.decode_layer import triton as fused_step
from kernels.decode_layer.plans import DecodePlan
from kernels.decode_layer.tensors import DecodeBuffers, DecodeShape, DecodeWeights
from kernels.kv_write import kv_write
from kernels.paged_attention import paged_attention
from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope
from kernels.silu_mul import silu_mul

SHAPES = {  # layers, sizes, QKV bias, norms of queries and keys
    "1.5b": (28, DecodeShape(1536, 12, 2, 128, 8960, 151936), True, False),
    "0.5b": (24, DecodeShape(896, 14, 2, 64, 4864, 151936), True, False),
    "8b": (32, DecodeShape(4096, 32, 8, 128, 14336, 128256, 1e-5), False, False),
    "qwen3-1.7b": (28, DecodeShape(2048, 16, 8, 128, 6144, 151936), False, True),
    "135m": (30, DecodeShape(576, 9, 3, 64, 1536, 49152, 1e-5), False, False),
    "tiny": (2, DecodeShape(128, 4, 2, 32, 256, 1024), True, False),
}
PAGE = 64
KINDS = ("qkv", "attention", "o", "gate_up", "down", "head")
BOUND = 1.25  # error against float32 over that of the library's products in the same dtype


class Layer(NamedTuple):
    """Weights of one layer, named as the kernels name them."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


def random_model(name: str, device: torch.device, keys: int, layers: int | None = None) -> tuple[DecodeWeights, DecodeShape]:
    """Weights that keep the residual stream's size, and a pool of `keys` filled slots."""
    depth, s, bias, qk_norm = SHAPES[name]
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0, scale, generator=generator)

    def matrix(rows: int, width: int, scale: float = 1.0) -> torch.Tensor:
        return draw(rows, width, scale=scale * width**-0.5)

    def one() -> Layer:
        return Layer(
            1 + draw(s.hidden, scale=0.1),
            matrix(s.qkv_rows, s.hidden),
            draw(s.qkv_rows, scale=0.1) if bias else None,
            1 + draw(2, s.head_dim, scale=0.1) if qk_norm else None,
            matrix(s.hidden, s.heads * s.head_dim),
            None,
            1 + draw(s.hidden, scale=0.1),
            matrix(2 * s.intermediate, s.hidden),
            matrix(s.hidden, s.intermediate),
        )

    stack = [one() for _ in range(depth if layers is None else layers)]
    pages = [tuple(draw(2, keys // PAGE, PAGE, s.kv_heads, s.head_dim)) for _ in stack]
    angle = torch.arange(40960, device=device)[:, None] * 1e6 ** -(torch.arange(0, s.head_dim, 2, device=device) / s.head_dim)
    head = matrix(s.vocab, s.hidden)
    return DecodeWeights(stack, pages, head, 1 + draw(s.hidden, scale=0.1), head, angle.cos(), angle.sin()), s


def widened(weights: DecodeWeights) -> DecodeWeights:
    """The same numbers in float32."""
    layers = [Layer(*(None if t is None else t.float() for t in layer)) for layer in weights.layers]
    pages = [(k.float(), v.float()) for k, v in weights.pages]
    head = weights.head.float()
    return DecodeWeights(layers, pages, head, weights.final_norm.float(), head, weights.cos, weights.sin)


def fill(buffers: DecodeBuffers, batch: int, length: int, context: int) -> None:
    """Inputs of a step: contexts near `context`, pages anywhere in the pool."""
    device = buffers.stream.device
    lens = torch.tensor([context - 7 * b % 64 for b in range(batch)])
    positions = torch.cat([torch.arange(int(c) - length, int(c)) for c in lens])
    wide = buffers.page_table.shape[1]
    used = -(-context // PAGE)
    table = torch.zeros(batch, wide, dtype=torch.int32)
    table[:, :used] = torch.randperm(batch * used, generator=torch.Generator().manual_seed(1)).view(batch, used)
    requests = torch.arange(batch).repeat_interleave(length)
    buffers.token_ids.copy_(torch.arange(batch * length) * 7919 % 1000)
    buffers.positions.copy_(positions)
    buffers.slots.copy_(table[requests, positions // PAGE].long() * PAGE + positions % PAGE)
    buffers.page_table.copy_(table)
    buffers.context_lens.copy_(lens)
    assert buffers.stream.device == device


def run_step(module: Any, weights: DecodeWeights, buffers: DecodeBuffers, shape: DecodeShape) -> None:
    """Embedding, layers and head."""
    module.decode_embed(weights, buffers)
    module.decode_layers(weights, buffers, shape)
    module.decode_head(weights, buffers, shape)


def library_step(weights: DecodeWeights, b: DecodeBuffers, s: DecodeShape) -> None:
    """The same step as one product of the library and one kernel of ours after another."""
    stream: torch.Tensor = F.embedding(b.token_ids, weights.embedding)
    update = None
    cos, sin = weights.cos[b.positions], weights.sin[b.positions]
    batch = len(b.context_lens)
    length = len(b.positions) // batch
    lens = torch.full_like(b.context_lens, length)
    for w, (k_pages, v_pages) in zip(weights.layers, weights.pages, strict=True):
        normed, stream = rms_norm(stream, w.input_norm, s.eps, update)
        q, k, v = F.linear(normed, w.qkv, w.qkv_bias).unflatten(1, (-1, s.head_dim)).split((s.heads, s.kv_heads, s.kv_heads), 1)
        if w.qk_norm is not None:
            q, k = rms_norm(q, w.qk_norm[0], s.eps)[0], rms_norm(k, w.qk_norm[1], s.eps)[0]
        kv_write(k, v, cos, sin, b.slots, k_pages, v_pages)
        attended = paged_attention(
            apply_rope(q, cos, sin), k_pages, v_pages, b.page_table, lens, b.context_lens, s.head_dim**-0.5, max_query_len=length
        )
        normed, stream = rms_norm(stream, w.post_norm, s.eps, F.linear(attended.flatten(1), w.o, w.o_bias))
        update = F.linear(silu_mul(F.linear(normed, w.gate_up)), w.down)
    normed, stream = rms_norm(stream, weights.final_norm, s.eps, update)
    b.stream.copy_(stream)
    logits = F.linear(normed, weights.head).float()
    if b.logits is not None:
        b.logits.copy_(logits)
    b.next_tokens.copy_(logits.argmax(1))


def captured(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The step as a graph, after a run outside one."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def timed(graph: torch.cuda.CUDAGraph, groups: int = 5, replays: int = 10) -> float:
    """Milliseconds a replay, median of groups of replays that follow one another."""
    for _ in range(3):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(groups + 1)]
    marks[0].record()
    for mark in marks[1:]:
        for _ in range(replays):
            graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) / replays for a, b in itertools.pairwise(marks))[groups // 2]


@triton.jit
def _read_kernel(x_ptr, out_ptr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    near = tl.arange(0, BLOCK)
    start = x_ptr + tl.program_id(0).to(tl.int64) * STEPS * BLOCK
    total = tl.zeros([BLOCK], tl.int32)
    for step in tl.static_range(STEPS):
        total ^= tl.load(start + step * BLOCK + near)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


def read_bandwidth(device: torch.device) -> float:
    """GB/s of reading 4 GB once: the best of several launch shapes."""
    source = torch.randint(-(2**31), 2**31 - 1, (2**30,), dtype=torch.int32, device=device)
    out = torch.empty(2**20, dtype=torch.int32, device=device)
    best = 0.0
    for block, steps, warps in ((1024, 8, 4), (2048, 8, 4), (2048, 4, 8), (4096, 4, 8), (1024, 16, 8)):
        grid = (source.numel() // (block * steps),)

        def read(grid=grid, block=block, steps=steps, warps=warps) -> None:
            _read_kernel[grid](source, out, STEPS=steps, BLOCK=block, num_warps=warps)

        best = max(best, source.nbytes / timed(captured(read), groups=3, replays=4) / 1e6)
    return best


class without:
    """Context in which kernels of one kind are left out of the fused step."""

    def __init__(self, kind: str, shape: DecodeShape) -> None:
        self.kind, self.shape = kind, shape

    def __enter__(self) -> None:
        self.kept = {
            name: getattr(fused_step, name) for name in ("norm_qkv", "decode_attention", "linear_residual", "norm_gate_up", "greedy_head")
        }
        names = {"qkv": "norm_qkv", "attention": "decode_attention", "gate_up": "norm_gate_up", "head": "greedy_head"}
        if self.kind in names:
            setattr(fused_step, names[self.kind], lambda *args, **kwargs: None)
            return
        inner, run = self.shape.intermediate, self.kept["linear_residual"]
        fused_step.linear_residual = lambda x, *rest, **options: (  # type: ignore[attr-defined]
            1 if (x.shape[1] == inner) == (self.kind == "down") else run(x, *rest, **options)
        )

    def __exit__(self, *failure: object) -> None:
        for name, function in self.kept.items():
            setattr(fused_step, name, function)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative root-mean-square error; infinite where something is not finite."""
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm()) if bool(torch.isfinite(got).all()) else float("inf")


class Bench:
    """One model shape and one (batch, length) of rows."""

    def __init__(
        self, weights: DecodeWeights, shape: DecodeShape, rows: tuple[int, int], context: int, keys: int, plan: DecodePlan | None = None
    ):
        self.weights, self.shape = weights, shape
        device = weights.head.device
        batch, length = rows
        sizes = (shape, batch, length, keys // PAGE, PAGE)
        self.buffers = DecodeBuffers.allocate(*sizes, dtype=torch.bfloat16, device=device, plan=plan)
        self.wide = DecodeBuffers.allocate(*sizes, dtype=torch.float32, device=device, plan=plan)
        for buffers in (self.buffers, self.wide):
            fill(buffers, batch, length, context)

    def graph(self, plan: DecodePlan) -> torch.cuda.CUDAGraph:
        self.buffers.plan = plan
        return captured(lambda: run_step(fused_step, self.weights, self.buffers, self.shape))

    def poison(self) -> None:
        b = self.buffers
        for tensor in (b.stream, b.scaled, b.squares, b.queries, b.attended, b.gated, b.logits, b.part):
            assert tensor is not None
            tensor.fill_(float("nan"))

    def errors(self, run: Callable[[], None]) -> tuple[float, float]:
        """Relative errors of the residual stream and of the logits, from poisoned buffers."""
        self.poison()
        run()
        assert self.buffers.logits is not None and self.wide.logits is not None
        return error(self.buffers.stream, self.wide.stream), error(self.buffers.logits, self.wide.logits)


def report(bench: Bench, label: str, weight_bytes: int, read: float, wide_weights: DecodeWeights | None) -> dict[str, Any]:
    """One line of results."""
    plan = bench.buffers.plan
    graph = bench.graph(plan)
    library = captured(lambda: library_step(bench.weights, bench.buffers, bench.shape))
    row: dict[str, Any] = {"rows": label, "plan": dataclasses.asdict(plan)}
    if wide_weights is not None:
        wide_weights = wide_weights._replace(pages=[(k.float(), v.float()) for k, v in bench.weights.pages])
        run_step(reference_step, wide_weights, bench.wide, bench.shape)
        row["error_fused"], row["error_library"] = bench.errors(graph.replay), bench.errors(library.replay)
        row["correct"] = all(ours < BOUND * theirs for ours, theirs in zip(row["error_fused"], row["error_library"], strict=True))
    row["fused_ms"], row["library_ms"] = timed(graph), timed(library)
    row["fused_ms_again"] = timed(graph)
    row["floor_ms"] = weight_bytes / read / 1e6
    row["share"] = row["floor_ms"] / row["fused_ms"]
    row["ms_by_kind"] = {}
    for kind in KINDS:
        with without(kind, bench.shape):
            row["ms_by_kind"][kind] = row["fused_ms"] - timed(bench.graph(plan), groups=3)
    return row


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    kinds = " ".join(f"{k} {v:.3f}" for k, v in row["ms_by_kind"].items())
    gain = f"{row['library_ms'] / row['fused_ms']:.2f}x" if row.get("correct") else "not checked" if "correct" not in row else "WRONG"
    errors = " ".join(f"{e:.1e}" for e in (*row.get("error_fused", ()), *row.get("error_library", ())))
    return (
        f"rows {row['rows']:>5}: {row['fused_ms']:.3f} ({row['fused_ms_again']:.3f}) ms, floor {row['floor_ms']:.3f}, {row['share']:.1%}; "
        f"library {row['library_ms']:.3f} ({gain}); without one kind: {kinds}; errors {errors}"
    )


def parse_rows(text: str) -> list[tuple[int, int]]:
    """ "5,8x1" -> [(1, 5), (8, 1)]."""
    pairs = [(item if "x" in item else f"1x{item}").split("x") for item in text.split(",")]
    return [(int(a), int(b)) for a, b in pairs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--rows", default="1,2,5,8x1,32x1", help="BATCHxLENGTH, comma-separated")
    parser.add_argument("--context", type=int, default=512, help="tokens of a request's context (default 512)")
    parser.add_argument("--max-keys", type=int, default=4096, help="tokens a page table has room for (default 4096)")
    parser.add_argument("--no-check", action="store_true", help="skip the comparison with float32")
    parser.add_argument("--json-out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    wanted = parse_rows(options.rows)
    keys = max(b for b, _ in wanted) * -(-options.context // PAGE) * PAGE
    weights, shape = random_model(options.shape, device, keys)
    tensors = [t for layer in weights.layers for t in layer if t is not None] + [weights.head, weights.final_norm]
    weight_bytes = sum(t.nbytes for t in tensors)
    read = read_bandwidth(device)
    print(f"{torch.cuda.get_device_name()}: reads {read:.0f} GB/s; {options.shape}: {weight_bytes / 1e9:.3f} GB of weights", flush=True)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "shape": options.shape,
        "read_gb_per_s": read,
        "rows": [],
        "context": options.context,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    wide = None if options.no_check else widened(weights)
    for batch, length in wanted:
        bench = Bench(weights, shape, (batch, length), options.context, options.max_keys)
        row = report(bench, f"{batch}x{length}", weight_bytes, read, wide)
        result["rows"].append(row)
        print(line(row), flush=True)
        if options.json_out:
            Path(options.json_out).write_text(json.dumps(result, indent=1))
    return 0 if all(row.get("correct", True) for row in result["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
