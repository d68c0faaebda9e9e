"""Passes of a prompt's next tokens over static buffers, on a GPU as captured graphs: the decoder's own operations in one launch.

Operation by operation a pass takes as long as its launches do, up to some thousand tokens. Here it has one of a few sizes (PASS_ROWS), whatever is
behind it: what its requests attend to is read from page tables on the device. Requests stand one after another; rows behind the last one are padding,
a request of its own without a context, which writes no page and sees no key.

Axes: N rows; R requests, of which the last is the padding; W kinds of windowed layers; P pages of a request's table; E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.kv.pool import KvPool
from engine.model.attention import AttentionBackend, DeviceBatch
from engine.model.decoder import Decoder
from engine.model.forward_pass import DecoderOutput, ForwardPass
from engine.runtime.family_layers import set_batches
from engine.runtime.page_tables import PageTables, StepTables
from kernels.compile_ahead import built, compiling_ahead
from kernels.upload import fill

PASS_ROWS = (128, 256, 384, 512, 768, 1024, 1536, 2048)  # new tokens that passes are padded to
PASS_REQUESTS = (1, 4, 16)  # requests likewise
_USUAL_CONTEXT = 8192  # tokens that attention is laid out for: a longer context is attended to by no more programs


@dataclass(frozen=True)
class PassKey:
    """What a pass does: `requests` requests, of `rows` new tokens in all, through layers [first, last), with residual streams at `taps`; logits: of
    each request's last token; embed: from token ids, else from given hidden states."""

    rows: int
    requests: int
    first: int
    last: int
    taps: tuple[int, ...]
    logits: bool
    embed: bool


@dataclass
class PromptPass:
    """One pass: its buffers, and the graph (None where it runs operation by operation).

    inputs: [4, R] int64: of each request the position of its first new token, how many it has, its context with them, and its page table row. source:
    token ids [N] int64 or hidden states [N, E]; stream [N, E]; tapped: the taps [N, E], in the order of key.taps; logits [R - 1, V] float32. These
    are the first rows of buffers that all passes share, as one runs at a time and its results are copied.
    """

    key: PassKey
    inputs: Tensor
    tables: StepTables
    source: Tensor
    stream: Tensor
    tapped: list[Tensor]
    logits: Tensor | None
    graph: Any | None = None

    def fill(self, asked: ForwardPass, table_rows: list[int]) -> None:
        """Write the inputs of a pass whose requests have these page table rows."""
        assert asked.source is not None
        self.place(asked.starts, asked.query_lens, asked.batch.contexts, table_rows)
        self.source[: len(asked.source)] = asked.source

    def place(self, starts: Sequence[int], counts: Sequence[int], contexts: Sequence[int], table_rows: Sequence[int]) -> None:
        """Write `inputs` of so many requests; those that the pass has besides get no rows, and the padding what is left."""
        unused = [0] * (self.key.requests - len(starts))
        left = self.key.rows - sum(counts)
        fill(self.inputs, [[*own, *unused, last] for own, last in ((starts, 0), (counts, left), (contexts, 0), (table_rows, 0))])


def passes_bytes(decoder: Decoder, *, logits: bool, taps: int = 1) -> int:
    """Of the buffers that all passes share. logits: whether they are computed; taps: of one pass, at most."""
    c = decoder.config
    of_row = torch.int64.itemsize + (2 + taps) * c.hidden_size * decoder.dtype.itemsize
    return PASS_ROWS[-1] * of_row + PASS_REQUESTS[-1] * logits * c.vocab_size * torch.float32.itemsize


def request_sizes(most: int) -> tuple[int, ...]:
    """Of PASS_REQUESTS those that passes of 1 to `most` requests have."""
    return tuple(size for size, before in zip(PASS_REQUESTS, (0, *PASS_REQUESTS), strict=False) if before < most)


class PromptPasses:
    """A decoder's passes of up to PASS_ROWS[-1] new tokens of up to PASS_REQUESTS[-1] requests.

    Args:
        decoder: of any family, on one device.
        pool: its pool of plain pages.
        tables: page tables of its sequences, shared with whoever else captures passes over the pool.
        capture: makes a graph of what a function launches (`GraphedDecoder.capture`); None: passes run operation by operation.
    """

    def __init__(self, decoder: Decoder, pool: KvPool, tables: PageTables, capture: Callable[[Callable[[], None]], Any] | None) -> None:
        self.decoder, self.pool, self.tables, self.capture = decoder, pool, tables, capture
        self.most_positions = tables.tables.shape[1] * pool.page_size
        locals_ = (False,) if decoder.config.local_rope is None else (False, True)
        self._angles = [decoder.rope_table(local=local).table(self.most_positions) for local in locals_]  # (cos, sin) [T, d/2] of each RoPE
        self._row_numbers = torch.arange(PASS_ROWS[-1], device=decoder.device)
        self._buffers: dict[str, Tensor] = {}
        self._backend: AttentionBackend | None = None
        self._passes: dict[PassKey, PromptPass] = {}
        self._noted: set[PassKey] = set()
        self._compiled: set[PassKey] = set()  # their kernels are compiled

    def __len__(self) -> int:
        """Passes that were captured."""
        return len(self._passes)

    def holds(self, asked: ForwardPass) -> bool:
        """Whether one of these passes is large enough for a prompt's."""
        fits = sum(asked.query_lens) <= PASS_ROWS[-1] and len(asked.sequences) <= PASS_REQUESTS[-1]
        return fits and max(asked.batch.contexts) <= self.most_positions

    def is_ready(self, asked: ForwardPass) -> bool:
        """Whether the pass that holds it was captured, or asked for before (`note`). Capturing takes several times as long as the decoder's own pass,
        and a process that computes one prompt gains nothing by it."""
        key = self._key(asked)
        return self.capture is None or key in self._passes or key in self._noted

    def note(self, asked: ForwardPass) -> None:
        """It was asked for: when it is again, it is captured."""
        self._noted.add(self._key(asked))

    def forget(self) -> None:
        """Drop all passes: the pool's pages have moved."""
        self._passes.clear()

    def run(self, asked: ForwardPass) -> DecoderOutput:
        """See `PassRunner.run`, of a pass that `holds` names: logits of the last tokens, or none."""
        asked.check(self.decoder.config.num_layers)
        asked.batch.check_pages()
        own = self.of(self._key(asked))
        own.fill(asked, self.tables.rows(asked.sequences))
        if own.graph is None:
            self._run(own)
        else:
            own.graph.replay()
        total = sum(asked.query_lens)
        logits = None if own.logits is None else own.logits[: len(asked.sequences)].clone()
        taps = {tap: rows[:total].clone() for tap, rows in zip(asked.taps, own.tapped, strict=True)}
        return DecoderOutput(logits, own.stream[:total].clone(), taps)

    def of(self, key: PassKey) -> PromptPass:
        """The pass, captured now if it was not yet."""
        if key not in self._passes:
            made = built(lambda: self._build(key), key in self._compiled, captures=self.capture is not None)
            self._compiled.add(key)
            if compiling_ahead():
                return made
            self._passes[key] = made
        return self._passes[key]

    def _key(self, asked: ForwardPass) -> PassKey:
        """Of the least pass that holds it."""
        rows, requests = sum(asked.query_lens), len(asked.sequences)
        return PassKey(
            next(size for size in PASS_ROWS if size >= rows),
            next(size for size in PASS_REQUESTS if size >= requests),
            asked.layers.start,
            asked.layers.stop,
            asked.taps,
            asked.speaks(self.decoder.config.num_layers),
            asked.hidden is None,
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _build(self, key: PassKey) -> PromptPass:
        rows = partial(self._shared, PASS_ROWS[-1], self.decoder.config.hidden_size, self.decoder.dtype)
        made = PromptPass(
            key,
            torch.zeros(4, key.requests + 1, dtype=torch.int64, device=self.decoder.device),
            self.tables.new_step(key.requests + 1, self.tables.tables.shape[1]),
            self._shared(PASS_ROWS[-1], 1, torch.int64, "ids")[: key.rows, 0] if key.embed else rows("hidden")[: key.rows],
            rows("stream")[: key.rows],
            [rows(f"tap {number}")[: key.rows] for number in range(len(key.taps))],
            self._shared(PASS_REQUESTS[-1], self.decoder.config.vocab_size, torch.float32, "logits")[: key.requests]
            if key.logits
            else None,
        )
        made.place((), (), (), ())
        if self.capture is not None:
            made.graph = self.capture(lambda: self._run(made))
        return made

    def _shared(self, rows: int, width: int, dtype: torch.dtype, name: str) -> Tensor:
        """The buffer [rows, width] of this name."""
        if name not in self._buffers:
            self._buffers[name] = torch.zeros(rows, width, dtype=dtype, device=self.decoder.device)
        return self._buffers[name]

    def _run(self, own: PromptPass) -> None:
        """The pass over what its buffers hold, all of it on the device."""
        decoder, key = self.decoder, own.key
        ends = own.inputs[1].cumsum(0)
        backend = self._plan(own, ends)
        stream = decoder.embed(own.source) if key.embed else own.source
        layers, shapes = range(key.first, key.last), decoder.layer_shapes
        if compiling_ahead():  # layers of one shape are alike
            for number in {shapes[number]: number for number in layers}.values():
                decoder.run_layers(stream, backend, range(number, number + 1))
        else:
            stream, taken = decoder.run_layers(stream, backend, layers, key.taps)
            own.stream.copy_(stream)
            for tap, rows in zip(key.taps, own.tapped, strict=True):
                rows.copy_(taken[tap])
        if own.logits is not None:
            own.logits.copy_(decoder.head(stream.index_select(0, (ends[:-1] - 1).clamp_min(0))))

    def _plan(self, own: PromptPass, ends: Tensor) -> AttentionBackend:
        """The attention of the pass. ends: [R] int64, the row behind each request's last one."""
        starts, counts, contexts, table_rows = own.inputs
        size, row = self.pool.page_size, self._row_numbers[: own.key.rows]
        self.tables.look_up(table_rows, own.tables)
        owner = (row[:, None] >= ends).sum(1)
        position = starts[owner] + row - (ends - counts)[owner]
        inside = position < contexts[owner]
        position = torch.where(inside, position, 0)
        page, offset = position // size, position % size
        slots = [torch.where(inside, table[owner, page] * size + offset, -1) for table in (own.tables.main, *own.tables.windows)]
        batch = DeviceBatch(
            tuple((cos.index_select(0, position), sin.index_select(0, position)) for cos, sin in self._angles),
            slots[0],
            own.tables.main,
            counts.to(torch.int32),
            contexts.to(torch.int32),
            own.key.rows,
            usual_context=_USUAL_CONTEXT,
        )
        backend = self._backend = self._backend or self.decoder.attention_backend(self.pool, kernels=True)
        windows = [
            replace(batch, page_table=table, slots=own_slots) for table, own_slots in zip(own.tables.windows, slots[1:], strict=True)
        ]
        set_batches(backend, batch, windows)
        return backend
