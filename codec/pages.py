"""Coded spans and features back to KV in one product a chunk: into a pool's pages (`kernels.residual_decode`, on a CPU `kernels.cpu_decode.coded`), or
into rows.

Transform, weighting and predictor are stacked into one matrix [F + K, D], so that a token is mu + [features, components] @ matrix. All spans are read,
copied and entropy-decoded at once; on a GPU on a stream of their own, beside the pass that makes the features.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch

from codec.codec import DecodedSpans, KvCodec, alike, batches
from codec.container import SpanCode
from codec.errors import BadInput
from codec.predictor.dense import AnyPredictor
from codec.references import added_up, own_components
from codec.transform import Fallback
from kernels.cpu_decode import compiled_available, compiled_loads
from kernels.residual_decode import REST_MULTIPLE, Rest, residual_decode_pages
from kernels.rope import apply_rope

_TILE = 64
"""Features and components are filled up with zeros to a multiple of this: the kernel then reads without masks."""

CHUNK_TOKENS = {"cpu": 256, "cuda": 4096}
PAGE_TOKENS = 8192
_BLOCK_ROWS = 256
"""Rows of a product on a CPU, filled up with zeros: a product's shape decides how its terms are summed, so a token gives the same bits whatever is
decoded behind it."""

_LAYER_ROWS = 512
"""The same, of a layer's product alone: it lays its columns of the matrix out anew for the CPU's matrix unit, which more rows share."""

_REST_ROWS = 64
"""The same, of products with the fallback basis, which few spans have: as many as a span has."""

_ENTROPY_TOKENS = 65_536
_STREAMS = 8
_FOLDED_ROWS = 512


class EntropyDecoded(NamedTuple):
    """Spans that are entropy-decoded together: the first token of each, counted from the first span's, and what came out. Spans that are only referred
    to lie before the first one, at negative places. stream: where they are decoded, on a GPU; None: the stream that was current."""

    starts: list[int]
    decoded: DecodedSpans
    stream: torch.cuda.Stream | None = None

    def join(self, stream: torch.cuda.Stream) -> None:
        """Let a stream go on only behind what was decoded, and read it."""
        if self.stream is None:
            return
        stream.wait_stream(self.stream)
        for tensor in (self.decoded.q, self.decoded.gains, self.decoded.levels, self.decoded.base, *self.decoded.faults):
            tensor.record_stream(stream)


class Chunk(NamedTuple):
    """Components of some spans of a part, in the product's dtype.

    tokens: their places among all coded tokens, a slice where they follow one another. runs: the same as ranges. rows: [T, K up to a whole tile] of the
    transform's rows; rest: [T, n] of its fallback basis, or None.
    """

    tokens: slice | torch.Tensor
    runs: list[tuple[int, int]]
    rows: torch.Tensor
    rest: torch.Tensor | None


class FallbackColumns(NamedTuple):
    """Components of the fallback basis as `kernels.residual_decode.Rest` takes them: the column of each int64 [n], and the layers' rows of the basis
    [R, W], each layer's from starts[layer] on, int32 [layers + 1]."""

    columns: torch.Tensor
    basis: torch.Tensor
    starts: torch.Tensor


def spans_of(parts: Sequence[EntropyDecoded]) -> Iterator[tuple[int, int]]:
    """(first token, tokens) of every span that is written."""
    return ((start, size) for part in parts for start, size in zip(part.starts, part.decoded.sizes, strict=True) if start >= 0)


class PageDecoder:
    """Decodes spans, given the features of their tokens.

    In bfloat16 features, components and matrix are rounded to eight bits, as the KV itself is when it is stored: an error of two thousandths of what
    the prediction left over, where the code's own is a tenth and more. A token's result depends on nothing that is decoded beside it.

    Args:
        codec, predictor: of one pack, on one device.
        dtype: of the product, float32 or bfloat16.
    """

    def __init__(self, codec: KvCodec, predictor: AnyPredictor, dtype: torch.dtype) -> None:
        self.codec, self.predictor, self.dtype = codec, predictor, dtype
        self.num_inputs = -(-predictor.matrix.shape[0] // _TILE) * _TILE
        self._matrix: torch.Tensor | None = None
        self._fallback: Fallback | None = None
        self._stream: torch.cuda.Stream | None = None
        self._decoding: list[torch.cuda.Stream] = []
        self._columns: FallbackColumns | None = None

    # --- entropy decoding -----------------------------------------------------------------------------------------------

    def start(self, spans: Sequence[bytes | memoryview], *, beside: bool = True) -> list[EntropyDecoded]:
        """Read and check all spans, copy them to the device and begin to entropy-decode them. beside: on a GPU, on streams of its own.

        Raises the errors of `KvCodec.read`.
        """
        return self.begin(self.codec.read(spans), beside=beside)

    def begin(self, codes: Sequence[SpanCode], lent: Sequence[SpanCode] = (), *, beside: bool = True) -> list[EntropyDecoded]:
        """As `start`, from spans that were read. lent: spans before them, without a gap, that references may go to and that are not written."""
        every = [*lent, *codes]
        starts = list(itertools.accumulate((code.num_tokens for code in every), initial=-sum(code.num_tokens for code in lent)))
        streams = itertools.cycle(self._decoding_streams() if self.codec.device.type == "cuda" and beside else [None])
        parts = []
        for group in alike(every):
            for some in batches([every[n].num_tokens for n in group], _ENTROPY_TOKENS):
                members, stream = [group[i] for i in some], next(streams)
                with nullcontext() if stream is None else torch.cuda.stream(stream):
                    decoded = self.codec.entropy_decoded([every[n] for n in members])
                parts.append(EntropyDecoded([starts[n] for n in members], decoded, stream))
        return parts

    def _decoding_streams(self) -> list[torch.cuda.Stream]:
        """Of spans that are decoded at the same time: a span takes one warp and waits for its own last symbol, so that those of every setting together
        take as long as the longest. Before the passes beside them, which fill the device."""
        if not self._decoding:
            self._decoding = [torch.cuda.Stream(self.codec.device, priority=-1) for _ in range(_STREAMS)]
            for stream in self._decoding:
                stream.wait_stream(torch.cuda.current_stream(self.codec.device))  # for the tables; the spans come from the host
        return self._decoding

    def side_stream(self) -> torch.cuda.Stream:
        """What runs beside the current stream runs here; of a GPU."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.codec.device)
        return self._stream

    def check(self, parts: Sequence[EntropyDecoded]) -> None:
        """Wait for everything and raise CorruptedCode if a stream was damaged: what was written of it must then be thrown away."""
        self._join(parts)
        for part in parts:
            part.decoded.check()

    def _join(self, parts: Sequence[EntropyDecoded]) -> None:
        """Let the current stream go on only behind what was decoded."""
        if self.codec.device.type == "cuda":
            for part in parts:
                part.join(torch.cuda.current_stream(self.codec.device))

    # --- the product ----------------------------------------------------------------------------------------------------

    def _chunks(self, parts: Sequence[EntropyDecoded]) -> Iterator[Chunk]:
        """All components, chunk by chunk."""
        self._join(parts)
        count = self.codec.transform.num_rows
        most = CHUNK_TOKENS.get(self.codec.device.type, CHUNK_TOKENS["cpu"])
        every = self._referring(parts)
        for part in parts:
            own = [n for n, start in enumerate(part.starts) if start >= 0]
            for group in batches([part.decoded.sizes[n] for n in own], most):
                some = [own[i] for i in group]
                runs = _joined((part.starts[n], part.starts[n] + part.decoded.sizes[n]) for n in some)
                tokens: slice | torch.Tensor = slice(*runs[0])
                if len(runs) > 1:
                    tokens = torch.cat([torch.arange(*run) for run in runs]).to(self.codec.device)
                c = self.codec.components_of(part.decoded, some[0], some[-1] + 1) if every is None else every[tokens]
                c = c.to(self.dtype)
                if every is not None and c.device.type == "cpu" and not c[:, count:].any():
                    c = c[:, :count]  # as wide as those of other spans: what they have in the fallback basis costs a product
                rows, rest = c[:, :count], c[:, count:] if c.shape[1] > count else None
                yield Chunk(tokens, runs, torch.nn.functional.pad(rows, (0, -rows.shape[1] % _TILE)), rest)

    def _referring(self, parts: Sequence[EntropyDecoded]) -> torch.Tensor | None:
        """Components float32 [T, K] of all tokens, where any span refers to others or is lent; None where none does."""
        lent = any(start < 0 for part in parts for start in part.starts)
        if not lent and not any(references for part in parts for references in part.decoded.references):
            return None
        spans = sorted(
            (start, start + size, references)
            for part in parts
            for start, size, references in zip(part.starts, part.decoded.sizes, part.decoded.references, strict=True)
        )
        most = CHUNK_TOKENS.get(self.codec.device.type, CHUNK_TOKENS["cpu"])
        begin = spans[0][0]
        placed = [([start - begin for start in part.starts], part.decoded) for part in parts]
        c = own_components(self.codec, placed, spans[-1][1] - begin, most)
        return added_up(c, [references for _, _, references in spans], [(start, end) for start, end, _ in spans])[-begin:]

    def write_pages(
        self,
        parts: Sequence[EntropyDecoded],
        latents: torch.Tensor,
        target_rows: torch.Tensor | None,
        kv: torch.Tensor,
        slots: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        first_layer: int = 0,
    ) -> None:
        """Write the tokens of all spans into pages; call `check` before they are used.

        Args:
            parts: of `start`.
            latents, target_rows: of the tokens, as for `Predictor.predict`.
            kv: [L, 2, P, S, G, d] contiguous pool of the product's dtype on the codec's device, of which layers first_layer .. L - 1 are written.
            slots: int64 [T], page * S + offset of each token, no slot twice.
            cos, sin: float32 [T, d/2], of each token's angles.
        """
        tokens = self._num_tokens(parts, latents, target_rows)
        if {len(slots), len(cos), len(sin)} != {tokens}:
            raise BadInput(f"{len(slots)} slots and {len(cos)} angles for {tokens} coded tokens", "pass one of each a token")
        layout = self.codec.layout
        if kv.shape[0] - first_layer != layout.coded_layers or kv.shape[1:2] + kv.shape[4:] != (2, layout.num_kv_heads, layout.head_dim):
            raise BadInput(f"pages {tuple(kv.shape)} from layer {first_layer} on do not fit {layout}", "pass the pool that was coded")
        if self.writes_compiled(kv):
            self.layers(parts, self.chunks(parts), latents, target_rows).into_pages((cos, sin), kv[first_layer:], slots)
            return
        ones = torch.ones(tokens, dtype=torch.float32, device=self.codec.device)
        for at, x, rest in self._page_rows(parts):
            x[:, : self.num_inputs] = self._inputs(latents, target_rows, at)
            depth = x.shape[1] - (0 if rest is None else len(rest.basis))
            added = None if rest is None else Rest(x[:, depth:], rest.basis, rest.starts)
            own, weight, angles = x[:, :depth], self.matrix[:depth], (cos[at], sin[at])
            residual_decode_pages(own, ones[at], None, weight, self.predictor.mu, kv, slots[at], *angles, first_layer, rest=added)

    def writes_compiled(self, kv: torch.Tensor) -> bool:
        """Whether keys and values [.., G, d] are written by a CPU's compiled code."""
        dtypes = self.dtype == kv.dtype == torch.bfloat16
        return dtypes and kv.device.type == "cpu" and kv.shape[-1] % 32 == 0 and compiled_available() and compiled_loads()

    def _page_rows(self, parts: Sequence[EntropyDecoded]) -> Iterator[tuple[slice, torch.Tensor, FallbackColumns | None]]:
        """All components where the product takes them from, chunk by chunk, in the order of the text: which tokens, rows [T, F + K + R] in the
        product's dtype whose first F columns are still to be written, and what the last R are multiplied with. Spans of all settings lie together, so
        that there are few launches; nothing is waited for."""
        self._join(parts)
        every = self._referring(parts)
        num_rows = self.codec.transform.num_rows
        most = max(part.decoded.q.shape[1] for part in parts) if every is None else every.shape[1]
        rest = self._fallback_columns(most - num_rows) if most > num_rows else None
        depth = self.num_inputs + -(-min(most, num_rows) // _TILE) * _TILE
        columns = torch.arange(self.num_inputs, self.num_inputs + num_rows, device=self.codec.device)
        if rest is not None:
            columns = torch.cat([columns, depth + rest.columns])
        sizes = [size for _, size in sorted(spans_of(parts))]
        ends = list(itertools.accumulate(sizes, initial=0))
        for some in batches(sizes, PAGE_TOKENS):
            at = slice(ends[some[0]], ends[some[-1] + 1])
            width = depth + (0 if rest is None else len(rest.basis))
            x = torch.zeros(at.stop - at.start, width, dtype=self.dtype, device=self.codec.device)
            if every is not None:
                x[:, columns[: every.shape[1]]] = every[at].to(self.dtype)
            for part in parts if every is None else ():
                own = [n for n, start in enumerate(part.starts) if at.start <= start < at.stop]
                if own:
                    self.codec.write_components(part.decoded, own[0], own[-1] + 1, [part.starts[n] - at.start for n in own], columns, x)
            yield at, x, rest

    def _fallback_columns(self, count: int) -> FallbackColumns:
        """Where `count` or more components of the fallback basis lie. The last answer is kept: components of lesser variance lie behind the others of
        their layer."""
        if self._columns is None or len(self._columns.columns) < count:
            fallback, device = self.fallback, self.codec.device
            layers, width, _ = fallback.basis.shape
            order = fallback.order[:count]
            layer = order // width
            sorted_by_layer = layer.argsort(stable=True)
            sizes = torch.bincount(layer, minlength=layers)
            starts = torch.nn.functional.pad((-(-sizes // REST_MULTIPLE) * REST_MULTIPLE).cumsum(0), (1, 0))
            first = sizes.cumsum(0) - sizes
            columns = torch.empty_like(order)
            own = layer[sorted_by_layer]
            columns[sorted_by_layer] = starts[own] + torch.arange(count, device=device) - first[own]
            basis = torch.zeros(int(starts[-1]), width, dtype=self.dtype, device=device)
            basis[columns] = fallback.basis.flatten(0, 1)[order]
            self._columns = FallbackColumns(columns, basis, starts.to(torch.int32))
        return self._columns

    def rows(
        self, parts: Sequence[EntropyDecoded], latents: torch.Tensor, target_rows: torch.Tensor | None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """(tokens, their KV rows float32 [T, D]), chunk by chunk; arguments as in `write_pages`. Call `check` before they are used."""
        self._num_tokens(parts, latents, target_rows)
        for at, runs, c, rest in self._chunks(parts):
            x = torch.cat([self._inputs(latents, target_rows, at), c], 1)
            if self.codec.device.type != "cpu":
                out = (x @ self.matrix[: x.shape[1]]).float().add_(self.predictor.mu)
            else:
                out = torch.empty(len(x), self.codec.layout.dim, dtype=torch.float32)
                for first in range(0, len(x), _BLOCK_ROWS):
                    block = x[first : first + _BLOCK_ROWS]
                    full = torch.nn.functional.pad(block, (0, 0, 0, _BLOCK_ROWS - len(block)))
                    product = (full @ self.matrix[: x.shape[1]])[: len(block)].float()
                    torch.add(product, self.predictor.mu, out=out[first : first + len(block)])
            if rest is not None:
                out += self._fallback_rows(rest)
            done = 0
            for start, end in runs:
                yield slice(start, end), out[done : done + end - start]
                done += end - start

    def chunks(self, parts: Sequence[EntropyDecoded]) -> list[Chunk]:
        """What `layers` takes besides the features, which need not be there yet. Raises CorruptedCode."""
        return list(self._chunks(parts))

    def layers(
        self, parts: Sequence[EntropyDecoded], chunks: Sequence[Chunk], latents: torch.Tensor, target_rows: torch.Tensor | None
    ) -> LayerRows:
        """The same rows, whose product is taken layer by layer as they are asked for; chunks: of `parts`. Other arguments, and the call of `check`, as
        for `rows`."""
        tokens = self._num_tokens(parts, latents, target_rows)
        alike: dict[int, list[Chunk]] = {}
        for chunk in chunks:
            alike.setdefault(chunk.rows.shape[1], []).append(chunk)
        return LayerRows(self, tokens, [self._in_order(some, latents, target_rows) for some in alike.values()])

    def _in_order(self, chunks: Sequence[Chunk], latents: torch.Tensor, target_rows: torch.Tensor | None) -> Rows:
        """Chunks of the same width as one, their tokens in rising order: so few blocks of a product are not full."""
        runs = sorted(run for chunk in chunks for run in chunk.runs)
        places = dict(zip(runs, itertools.accumulate((end - start for start, end in runs), initial=0), strict=False))
        rows = chunks[0].rows.new_empty(sum(end - start for start, end in runs), self.num_inputs + chunks[0].rows.shape[1])
        rests: dict[tuple[int, int], torch.Tensor] = {}
        for at, own, c, more in chunks:
            x, fallback, done = self._inputs(latents, target_rows, at), None if more is None else self._fallback_rows(more), 0
            for start, end in own:
                to, some = slice(places[start, end], places[start, end] + end - start), slice(done, done + end - start)
                rows[to, : self.num_inputs], rows[to, self.num_inputs :] = x[some], c[some]
                if fallback is not None:
                    rests[start, end] = fallback[some]
                done = some.stop
        plain = ((run, None) for run in _joined(run for run in runs if run not in rests))
        return sorted([*plain, *rests.items()], key=lambda one: one[0]), rows

    def _fallback_rows(self, rest: torch.Tensor) -> torch.Tensor:
        """float32 [T, D] of components of the fallback basis; on a CPU in products of whole blocks of rows: as `rows`."""
        if rest.device.type != "cpu":  # where a launch a block would take longer than the products
            return self.fallback.expand(rest).float()
        parts = []
        for block in rest.split(_REST_ROWS):
            parts.append(self.fallback.expand(torch.nn.functional.pad(block, (0, 0, 0, _REST_ROWS - len(block))))[: len(block)].float())
        return torch.cat(parts)

    def _num_tokens(self, parts: Sequence[EntropyDecoded], latents: torch.Tensor, target_rows: torch.Tensor | None) -> int:
        tokens = sum(size for _, size in spans_of(parts))
        if len(latents) != tokens or (target_rows is not None and len(target_rows) != tokens):
            raise BadInput(f"features of {len(latents)} tokens for {tokens} coded ones", "pass those of the tokens that were coded")
        return tokens

    def _inputs(self, latents: torch.Tensor, target_rows: torch.Tensor | None, at: slice | torch.Tensor) -> torch.Tensor:
        """[T, F up to a whole tile] in the product's dtype."""
        x = self.predictor.inputs(latents[at], None if target_rows is None else target_rows[at]).to(self.dtype)
        return torch.nn.functional.pad(x, (0, self.num_inputs - x.shape[1]))

    def prepare(self) -> None:
        """Make now what is otherwise made at first use, which then no request waits for."""
        _ = self.matrix
        if self.codec.transform.fallback is not None:
            _ = self.fallback.basis

    @property
    def matrix(self) -> torch.Tensor:
        """[F + K, D], each up to a whole tile: the predictor's matrix over U^T S^-1. Made at first use."""
        if self._matrix is None:
            codec, own = self.codec, self.predictor.matrix
            dim, count = codec.layout.dim, codec.transform.num_rows
            depth = self.num_inputs + -(-count // _TILE) * _TILE
            if codec.device.type == "cpu":  # which multiplies faster with a matrix whose columns lie in one piece
                matrix = torch.zeros(dim, depth, dtype=self.dtype).t()
            else:
                matrix = torch.zeros(depth, dim, dtype=self.dtype, device=codec.device)
            matrix[: len(own)] = own
            for at in range(0, count, _FOLDED_ROWS):
                some = codec.transform.whole_rows(at, min(at + _FOLDED_ROWS, count), dim)
                matrix[self.num_inputs + at : self.num_inputs + at + len(some)] = codec.weighting.unwhiten(some)
            self._matrix = matrix
        return self._matrix

    @property
    def fallback(self) -> Fallback:
        """The transform's fallback basis over S^-1. Made at first use."""
        if self._fallback is None:
            own, inverse = self.codec.transform.fallback, self.codec.weighting.inverse
            assert own is not None, "a span was coded in a fallback basis"
            layers, width, _ = own.basis.shape
            heads = own.basis.reshape(layers, width, -1, inverse.shape[-1]).transpose(1, 2)  # [layers, blocks of a layer, W, d]
            folded = heads @ inverse.reshape(layers, -1, *inverse.shape[1:])
            self._fallback = Fallback(folded.transpose(1, 2).reshape(layers, width, width).to(self.dtype), own.order)
        return self._fallback


def _joined(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order, those that follow one another as one."""
    found: list[tuple[int, int]] = []
    for start, end in runs:
        found[-1:] = [(found[-1][0], end)] if found and found[-1][1] == start else [*found[-1:], (start, end)]
    return found


Rows = tuple[list[tuple[tuple[int, int], torch.Tensor | None]], torch.Tensor]
"""Of some tokens: their places as ranges in order, each with what the fallback basis adds, float32 [end - start, D] or None; and features and
components [t, depth] in the product's dtype."""


class LayerRows:
    """Decoded tokens whose rows are multiplied out a layer at a time, so that no tensor of all layers is ever made.

    Args:
        decoder: whose matrix is used. tokens: T. chunks: of all of them.
    """

    def __init__(self, decoder: PageDecoder, tokens: int, chunks: Sequence[Rows]) -> None:
        self._decoder, self.tokens = decoder, tokens
        on_cpu = decoder.codec.device.type == "cpu"
        self._chunks = [
            (runs, torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % _LAYER_ROWS)) if on_cpu else rows) for runs, rows in chunks
        ]

    @property
    def num_layers(self) -> int:
        """Coded layers."""
        return self._decoder.codec.layout.coded_layers

    def layer(self, n: int, first_head: int = 0, last_head: int | None = None) -> torch.Tensor:
        """Keys before rotation and values of the n-th coded layer, float32 [T, 2, heads, d], of KV heads [first_head, last_head)."""
        layout, mu = self._decoder.codec.layout, self._decoder.predictor.mu
        heads = range(layout.num_kv_heads)[first_head:last_head]
        out = torch.empty(self.tokens, 2, len(heads), layout.head_dim, dtype=torch.float32, device=mu.device)
        width, own = layout.num_kv_heads * layout.head_dim, len(heads) * layout.head_dim
        if own == width:
            self._multiply(slice(2 * n * width, 2 * (n + 1) * width), out.flatten(1))
        else:  # the columns of keys and of values do not follow one another
            for half in (0, 1):
                start = (2 * n + half) * width + heads.start * layout.head_dim
                out[:, half] = self._multiply(slice(start, start + own), mu.new_empty(self.tokens, own)).unflatten(1, out.shape[2:])
        return out

    def rotated(
        self, n: int, angles: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor, first_head: int = 0, last_head: int | None = None
    ) -> None:
        """`layer` with keys rotated by angles (cos, sin float32 [T, d/2]), written to out [T, 2, heads, d] of any float dtype."""
        layout = self._decoder.codec.layout
        if self._decoder.writes_compiled(out) and out.shape[2] == layout.num_kv_heads:
            from kernels.cpu_decode.coded import rotated

            width = layout.num_kv_heads * layout.head_dim
            columns = slice(2 * n * width, 2 * (n + 1) * width)
            mu = self._decoder.predictor.mu[columns]
            for at, product, rest in self._products(columns):
                rotated(product, mu, rest, (angles[0][at], angles[1][at]), out[at])
            return
        kv = self.layer(n, first_head, last_head)
        kv[:, 0] = apply_rope(kv[:, 0], *angles)
        out.copy_(kv)

    def into_pages(self, angles: tuple[torch.Tensor, torch.Tensor], kv: torch.Tensor, slots: torch.Tensor) -> None:
        """All layers with keys rotated by angles (cos, sin float32 [T, d/2]), written to slots int64 [T] of pages kv bf16 [L, 2, P, S, G, d], on a CPU
        with compiled code. Raises ValueError for a slot that is none."""
        from kernels.cpu_decode.coded import rotated_into_pages

        mu = self._decoder.predictor.mu
        for at, product, rest in self._products(slice(0, len(mu)), _BLOCK_ROWS):
            rotated_into_pages(product, mu, rest, (angles[0][at], angles[1][at]), kv, slots[at])

    def _multiply(self, columns: slice, out: torch.Tensor) -> torch.Tensor:
        """Columns of all rows into out float32 [T, columns]."""
        mu = self._decoder.predictor.mu[columns]
        for at, product, rest in self._products(columns):
            torch.add(product, mu, out=out[at])
            if rest is not None:
                out[at] += rest
        return out

    def _products(self, columns: slice, block_rows: int = _LAYER_ROWS) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
        """Of some tokens each: their places, the product of their rows with these columns in its dtype, and what the fallback basis adds to it. On a
        CPU in products of block_rows, a divisor of _LAYER_ROWS."""
        decoder = self._decoder
        for runs, rows in self._chunks:
            matrix = decoder.matrix[: rows.shape[1], columns]
            size = block_rows if decoder.codec.device.type == "cpu" else len(rows)
            products, product, used = (block @ matrix for block in rows.split(size)), rows, size
            for (start, end), rest in runs:
                at = start
                while at < end:
                    if used == size:
                        product, used = next(products), 0
                    count = min(end - at, size - used)
                    own = None if rest is None else rest[at - start : at - start + count, columns]
                    yield slice(at, at + count), product[used : used + count], own
                    at, used = at + count, used + count
