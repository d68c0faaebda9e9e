"""A model's decode steps over static buffers, on a GPU as captured graphs: through fused kernels, or its family's own operations.

A forward pass of few new tokens is bound by launches and by reading the weights. Here its inputs lie in buffers that never move: token ids, and one
vector of positions, slots, context lengths and page table rows. What a batch of such a size does is captured once as a CUDA graph and replayed.

Axes: B requests, padded to a bucket; n new tokens each, shorter ones padded; N = B n rows; P pages of a request's table.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from draft.protocols import CausalDecoder
from draft.step_rows import StepStates
from engine.kv.pool import KvPool, KvSequence, PagedPool
from engine.kv.windowed_pool import WindowedPool
from engine.model.config import DecoderConfig
from engine.model.decoder import Decoder
from engine.model.forward_pass import DecoderOutput, ForwardPass
from engine.runtime.compiled_runner import CompiledDecoder
from engine.runtime.decoder_runner import DecoderRunner
from engine.runtime.device_penalties import PenaltyRows
from engine.runtime.device_sampling import Drawing, SamplingState
from engine.runtime.family_layers import FamilyLayers
from engine.runtime.logprobs import TokenLogprobs, from_row, logprob_rows
from engine.runtime.page_tables import PageTables, StepTables
from engine.runtime.prompt_passes import PASS_ROWS, PassKey, PromptPasses, request_sizes
from engine.runtime.sampling import SamplingParams
from kernels.advance import advance
from kernels.block_inputs import block_inputs
from kernels.compile_ahead import built, compiling_ahead
from kernels.decode_layer import DecodeBuffers, DecodeShape, DecodeWeights, decode_embed, decode_head, decode_layers
from kernels.decode_layer.plans import MOST_SKINNY, choose_plan
from kernels.dispatch import use_triton
from kernels.upload import fill, upload

MAX_ROWS = 128  # more rows than that are bound by arithmetic: the library's products are faster there
CAPTURED_LENGTHS = (1, 2, 4, 7)  # drafts of a block that are compared where each length is a captured step of its own
_BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
_LEAST_PAGES = 64
PROMPT_LENGTHS = (16, 32, 64, 128)  # lengths that prompts of up to MAX_ROWS tokens are padded to
_HEAD_TILE = 64  # channels of a head that a program of the fused QKV product takes at most
_TABLES = 512  # page tables on the device; more sequences than that take turns
_LOGGED = 32  # steps whose states lie in one tensor
# captured passes at most that prompts run in where they fit into none together: the decoder's own takes as long as several
_PROMPT_PASSES = 4
# a prompt of so many padded rows behind so many keys: 64 behind 8,000 of the 1.5B shape take 4.4 ms in a step on an H200, 200 in a pass 3.7
_FAR_ROWS, _FAR_KEYS = 32, 4096
_BLOCK = 32  # most new tokens of a request that a batch-invariant captured pass takes; a prompt's are the decoder's own

GREEDY = Drawing()


def bucket(count: int, sizes: Sequence[int] = _BATCHES) -> int:
    """The least of `sizes` that holds `count`."""
    return next(size for size in sizes if size >= count)


def sizes_up_to(most: int) -> tuple[int, ...]:
    """The sizes that batches of 1 to `most` requests are padded to."""
    return tuple(size for size in _BATCHES if size <= bucket(most))


def sizes_beside(max_batch: int) -> tuple[int, ...]:
    """Sizes that steps of some of so many requests, with tokens of others' prompts beside, are padded to."""
    return sizes_up_to(MAX_ROWS) if max_batch > 1 else ()


def padded_length(count: int) -> int:
    """New tokens a request that a step for `count` has: prompts of every length would each be captured else."""
    return count if count <= MOST_SKINNY else 1 << (count - 1).bit_length()


def prompt_length(count: int) -> int:
    """The same of what is left of a prompt: all short lengths share a captured step."""
    return max(padded_length(count), PROMPT_LENGTHS[0])


def page_bucket(pages: int, most: int) -> int:
    """Pages that a graph's tables hold: a power of two from _LEAST_PAGES on, at most `most`."""
    return min(most, max(_LEAST_PAGES, 1 << (pages - 1).bit_length()))


def row_groups(query_lens: Sequence[int], most: int = MOST_SKINNY) -> list[list[tuple[int, int, int]]]:
    """Requests' new tokens in passes of at most `most` padded rows: lists of (request, its tokens before these, how many).

    A request's tokens stand in consecutive passes, in order, as later ones attend to earlier ones.
    """
    passes: list[list[tuple[int, int, int]]] = []
    for at in range(0, max(query_lens), most):
        group: list[tuple[int, int, int]] = []
        longest = 0
        for b, count in enumerate(query_lens):
            size = min(most, count - at)
            if size <= 0:
                continue
            if group and bucket(len(group) + 1) * max(longest, size) > most:
                passes.append(group)
                group, longest = [], 0
            group.append((b, at, size))
            longest = max(longest, size)
        passes.append(group)
    return passes


def prompt_groups(query_lens: Sequence[int], most: int = MAX_ROWS) -> list[list[int]] | None:
    """Requests whose prompts share captured passes of at most `most` padded rows, the shortest first; None where a prompt fits into none."""
    groups: list[list[int]] = [[]]
    for b in sorted(range(len(query_lens)), key=query_lens.__getitem__):
        length = prompt_length(query_lens[b])
        if length > most:
            return None
        if groups[-1] and bucket(len(groups[-1]) + 1) * length > most:
            groups.append([])
        groups[-1].append(b)
    return groups


def decode_shape(config: DecoderConfig) -> DecodeShape:
    """What the fused kernels know of a model."""
    c = config
    return DecodeShape(c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size, c.vocab_size, c.rms_norm_eps)


@dataclass(frozen=True)
class StepKey:
    """What a captured step does: B requests of n tokens over P pages through layers [first, last), with residual streams at `taps`; embed: from
    token ids, else from given hidden states; deterministic: by kernels whose rows have the same bits in any company; drawing: how next tokens are drawn
    (steps of one token a request)."""

    batch: int
    length: int
    pages: int
    first: int
    last: int
    taps: tuple[int, ...]
    logits: bool
    embed: bool = True
    deterministic: bool = False
    drawing: Drawing = GREEDY


@dataclass
class Step:
    """One captured step: its buffers, and the graph (None where it runs operation by operation).

    inputs: [4, B] int64: the position of each request's first new token, the end of those it may have, its page table row, and how many keys right
    before the new ones other rows of the step write (`DecodeBuffers.unsettled`). A step of one token a request with logits leaves them, and its token
    ids, ready for the next one (`kernels.advance`): holds is then the launch whose successor they are ready for, of rows with these page table rows
    (table_rows); drawn, [2, B] int64, has the tokens of the last two, and copied says when the host has them. tokens: [B] int64, what is drawn; None
    where nothing is. tables: the requests', buffers.page_table among them; window_slots: [W, N] int64, where each kind of windowed layers writes the
    new tokens (buffers.slots: the others). tapped [k, N, E]: the taps, in the order of key.taps.
    """

    key: StepKey
    buffers: DecodeBuffers
    inputs: Tensor
    tables: StepTables
    window_slots: Tensor
    taps: dict[int, Tensor]
    tapped: Tensor
    graph: Any | None = None
    tokens: Tensor | None = None
    drawn: Tensor | None = None
    holds: Any | None = None
    copied: Any | None = None
    table_rows: list[int] = field(default_factory=list)

    def fill(
        self, starts: Sequence[int], counts: Sequence[int], rows: list[int], page_size: int, unsettled: Sequence[int] | None = None
    ) -> None:
        """Write the inputs of requests whose counts[b] new tokens begin at position starts[b], with these page table rows. unsettled: None: 0."""
        single, padding = self.key.length == 1, [0] * (self.key.batch - len(starts))
        # where every request has one token, later steps go on from these inputs: as far as the page tables reach
        ends = [self.key.pages * page_size] * len(starts) if single else [a + n for a, n in zip(starts, counts, strict=True)]
        if self.copied is not None:  # the step writes again what is being copied
            torch.cuda.current_stream(self.inputs.device).wait_event(self.copied)
        self.holds, self.copied, self.table_rows = None, None, rows
        settling = [0] * self.key.batch if unsettled is None else [*unsettled, *padding]
        fill(self.inputs, [[*starts, *padding], [*ends, *padding], [*rows, *padding], settling])


class GraphedDecoder(DecoderRunner):
    """A decoder whose small forward passes run as captured steps; all others are the decoder's own. Implements `draft.protocols.CausalDecoder`.

    Args:
        decoder: a model whose matrices are plain (not packed for a CPU).
        pool: its pool of plain pages, windowed layers' own ones among them. Steps are captured again when it grows, so give a GPU's pool its
            size at once.
        capture: whether steps become CUDA graphs; False runs the same steps operation by operation.
    """

    @torch.inference_mode(False)  # captures write these tensors outside of steps
    def __init__(self, decoder: Decoder, pool: KvPool, *, capture: bool) -> None:
        super().__init__(decoder)
        assert pool.is_plain, "captured steps read and write plain pages"
        self.pool, self.captures = pool, capture
        windowed = pool.windowed if isinstance(pool, WindowedPool) else ()
        main = pool.main_layers if isinstance(pool, WindowedPool) else range(decoder.config.num_layers)
        self._pools_begin = [layers[0] for layers in (main, *(group.layers for group in windowed)) if layers]  # a layer of each pool
        self.max_pages = min(pool.max_pages, -(-decoder.config.max_position_embeddings // pool.page_size))
        self.shape = decode_shape(decoder.config)
        self._family = None if self.fuses(decoder.config) else FamilyLayers(decoder, pool, self.max_pages * pool.page_size)
        self.tables = PageTables(_TABLES, self.max_pages, decoder.device, len(windowed))
        self.sampling = SamplingState(_BATCHES[-1], decoder.device)
        self._prompts = PromptPasses(decoder, pool, self.tables, self.capture if capture else None)
        self._zeros = torch.zeros(_BATCHES[-1], dtype=torch.int64, device=decoder.device)
        self._steps: dict[StepKey, Step] = {}
        self._compiled: set[StepKey] = set()  # steps whose kernels are compiled
        self._weights: DecodeWeights | None = None
        self._weights_over: tuple[int, ...] = ()  # `memory_version` of the pool whose pages they name
        self._graph_memory: Any | None = None
        self._capture_stream: Any | None = None

    @staticmethod
    def supports(decoder: Decoder, pool: KvPool) -> bool:
        """Whether the model's steps can be captured over a pool: on a CUDA device, with plain pages and all layers on that device. Llama's layers need
        heads that the fused kernels' tiles divide."""
        return pool.is_plain and GraphedDecoder.fits(decoder)

    @staticmethod
    def fits(decoder: Decoder) -> bool:
        """The same before there is a pool, where its pages will be plain."""
        layers = decoder.device_map is None and (GraphedDecoder.fuses(decoder.config) or not decoder.config.is_plain)
        return decoder.device.type == "cuda" and layers and use_triton(decoder.final_norm)

    @staticmethod
    def fuses(config: DecoderConfig) -> bool:
        """Whether the fused kernels have the model's layers: Llama's, with heads that their tiles divide."""
        return config.is_plain and config.head_dim % _HEAD_TILE == 0

    @property
    def follows_tables(self) -> bool:
        """The fused kernels do."""
        return True

    @property
    def captured_rows(self) -> int | None:
        """Padded ones."""
        return MAX_ROWS

    def head(self, hidden: Tensor, *, deterministic: bool = False) -> Tensor:
        """See `Decoder.head`."""
        return self.decoder.head(hidden, deterministic=deterministic)

    def run(self, asked: ForwardPass) -> DecoderOutput:
        """See `PassRunner.run`. Passes of more than MAX_ROWS padded rows, with tree positions, or observed are the decoder's own. Prompts of more rows,
        or far behind, run in a pass of `PromptPasses` where one is ready, other short ones in a few captured steps.

        In deterministic mode a prompt's passes (logits of the last tokens alone) are the decoder's own too, whatever their size; those of a
        block run as captured steps of at most MOST_SKINNY rows, one after another. Which of the two runs a token depends on nothing else.
        """
        if asked.tree_positions is not None or asked.observe is not None or asked.source is None or not asked.layers:
            return self.decoder.run(asked)
        batch, length = len(asked.sequences), padded_length(max(asked.query_lens))
        prompt = asked.logits == "last" or (asked.logits == "none" and length > 1)
        if prompt and not asked.deterministic and batch <= _BATCHES[-1] and bucket(batch) * PROMPT_LENGTHS[0] <= MAX_ROWS:
            length = prompt_length(length)
        if asked.deterministic:
            small = asked.logits != "last" and length <= _BLOCK
        else:
            small = batch <= _BATCHES[-1] and bucket(batch) * length <= MAX_ROWS
        groups = None
        if asked.deterministic:
            groups = row_groups(asked.query_lens) if small else None
        elif prompt and (not small or self._reads_far(asked, length)):
            if self._prompts.holds(asked):
                self._current_weights()
                if self._prompts.is_ready(asked):
                    return self._prompts.run(asked)
                self._prompts.note(asked)
            if not small:
                apart = prompt_groups(asked.query_lens) or []
                groups = [[(b, 0, asked.query_lens[b]) for b in group] for group in apart]
                small = 0 < len(groups) <= _PROMPT_PASSES
        if not small:
            return self.decoder.run(asked)
        asked.batch.check_pages()
        return self._pass(asked, length) if groups is None else self._in_groups(asked, groups)

    @staticmethod
    def _reads_far(asked: ForwardPass, length: int) -> bool:
        """Whether its attention is faster in a pass of `PromptPasses`: each tile of a few of a step's rows reads all keys."""
        return length >= _FAR_ROWS and max(asked.starts) >= _FAR_KEYS

    def _in_groups(self, asked: ForwardPass, groups: Sequence[Sequence[tuple[int, int, int]]]) -> DecoderOutput:
        """A pass as several, of these (request, its tokens before these, how many): of blocks, or of whole prompts."""
        lens, source = asked.query_lens, asked.source
        assert source is not None
        firsts = [sum(lens[:b]) for b in range(len(lens))]
        outs, order, last = [], [], []
        for group in groups:
            rows = [firsts[b] + at + j for b, at, count in group for j in range(count)]
            counts = [count for _, _, count in group]
            part = asked.of(
                source[upload(rows, self.device)],
                [asked.sequences[b] for b, _, _ in group],
                counts,
                [asked.starts[b] + at for b, at, _ in group],
            )
            longest = max(counts)
            outs.append(self._pass(part, padded_length(longest) if asked.deterministic else prompt_length(longest)))
            order += rows
            last += [b for b, _, _ in group]
        if len(outs) == 1:
            return outs[0]

        def places(of: list[int]) -> Tensor:
            return upload(sorted(range(len(of)), key=of.__getitem__), self.device)

        back = places(order)
        spoken = [out.logits for out in outs if out.logits is not None]
        found = torch.cat(spoken)[places(last) if asked.logits == "last" else back] if spoken else None
        taps = {tap: torch.cat([out.taps[tap] for out in outs])[back] for tap in outs[0].taps}
        return DecoderOutput(found, torch.cat([out.hidden for out in outs])[back], taps)

    def _pass(self, asked: ForwardPass, length: int) -> DecoderOutput:
        """A pass by one captured step, which has `length` new tokens a request; pages are there."""
        source, embed, speaks = asked.source, asked.hidden is None, asked.speaks(self.config.num_layers)
        assert source is not None
        step = self.step(
            len(asked.sequences),
            length,
            max(len(s.pages) for s in asked.sequences),
            asked.layers.start,
            asked.layers.stop,
            asked.taps,
            speaks,
            embed=embed,
            deterministic=asked.deterministic,
        )
        step.fill(asked.starts, asked.query_lens, self.tables.rows(asked.sequences), self.pool.page_size)
        rows = self._rows(step, asked.query_lens)
        into = step.buffers.token_ids if embed else step.buffers.stream
        if isinstance(rows, slice):
            into[rows] = source
        else:
            into.index_copy_(0, rows, source.to(into.dtype))
        self.replay(step)
        found = None
        if speaks:
            assert step.buffers.logits is not None
            wanted = rows if asked.logits == "all" else self._ends(step, asked.query_lens)
            found = step.buffers.logits[wanted].clone() if isinstance(wanted, slice) else step.buffers.logits[wanted]
        return DecoderOutput(found, step.buffers.stream[rows].clone(), {tap: rows_of[rows].clone() for tap, rows_of in step.taps.items()})

    def _rows(self, step: Step, query_lens: Sequence[int]) -> slice | Tensor:
        """Where the requests' new tokens lie among a step's rows."""
        n = step.key.length
        if len(query_lens) == 1 or all(count == n for count in query_lens):
            return slice(0, sum(query_lens))
        return upload([b * n + j for b, count in enumerate(query_lens) for j in range(count)], self.device)

    def _ends(self, step: Step, query_lens: Sequence[int]) -> Tensor:
        return upload([b * step.key.length + count - 1 for b, count in enumerate(query_lens)], self.device)

    # --- steps ----------------------------------------------------------------------------------------------------------

    def step(
        self,
        batch: int,
        length: int,
        pages: int,
        first: int,
        last: int,
        taps: tuple[int, ...],
        logits: bool,
        *,
        embed: bool = True,
        deterministic: bool = False,
        drawing: Drawing = GREEDY,
    ) -> Step:
        """The captured step for so many requests, captured now if it was not yet. drawing: by `sampling`, from logits of one token a request."""
        key = StepKey(bucket(batch), length, page_bucket(pages, self.max_pages), first, last, taps, logits, embed, deterministic, drawing)
        weights = self._current_weights()
        if key not in self._steps:
            step = built(lambda: self._build(key, weights), key in self._compiled, captures=self.captures)
            self._compiled.add(key)
            if compiling_ahead():
                return step
            self._steps[key] = step
        return self._steps[key]

    @property
    def num_steps(self) -> int:
        """Steps that were captured."""
        return len(self._steps) + len(self._prompts)

    def replay(self, step: Step) -> None:
        """Run a step over what its buffers hold."""
        if step.graph is None:
            self._run(step, self._current_weights())
        else:
            step.graph.replay()

    def capture_common(self, batch: int, drawing: Drawing = GREEDY, *, taps: tuple[int, ...] = (), deterministic: bool = False) -> None:
        """Capture the step of one token for each of `batch` requests over short contexts, so that no request waits for it."""
        if batch <= (MOST_SKINNY if deterministic else _BATCHES[-1]):
            self.step(batch, 1, 1, 0, self.config.num_layers, taps, True, deterministic=deterministic, drawing=drawing)

    def capture_prompts(
        self, batch: int, *, taps: tuple[int, ...] = (), logits: bool = True, embed: bool = True, until_s: float = math.inf
    ) -> None:
        """The same for the passes of `batch` short prompts, as `forward` is called for them, until `until_s` on `time.perf_counter`; deterministic ones
        are not captured."""
        for length in PROMPT_LENGTHS:
            if batch * length <= MAX_ROWS and time.perf_counter() < until_s:
                self.step(batch, length, 1, 0, self.config.num_layers, taps, logits, embed=embed)

    def capture_long_prompts(
        self,
        batch: int,
        *,
        layers: range | None = None,
        taps: tuple[int, ...] = (),
        logits: bool = True,
        embed: bool = True,
        until_s: float = math.inf,
    ) -> None:
        """The same for passes of more than MAX_ROWS tokens of up to `batch` prompts, those of few first. layers: None for all."""
        first, last = (0, self.config.num_layers) if layers is None else (layers.start, layers.stop)
        self._current_weights()
        for requests, rows in product(request_sizes(batch), PASS_ROWS):
            if time.perf_counter() < until_s:
                self._prompts.of(PassKey(rows, requests, first, last, taps, logits, embed))

    def _current_weights(self) -> DecodeWeights:
        """The decoder's tensors; captured steps hold addresses, so they go when the pool has moved."""
        known, version = self._weights, self.memory_version
        if known is not None and self._weights_over == version:
            return known
        self._steps.clear()
        self._prompts.forget()
        self._weights_over = version
        decoder = self.decoder
        head = decoder.embed_tokens.weight if decoder.lm_head is None else decoder.lm_head.matrix
        cos, sin = decoder.rope.table(self.max_pages * self.pool.page_size)
        pages = [self.pool.layer(number) for number in range(decoder.config.num_layers)]
        self._weights = DecodeWeights(
            decoder.layer_weights(), pages, decoder.embed_tokens.weight.data, decoder.final_norm.data, head.data, cos, sin
        )
        return self._weights

    @torch.inference_mode(False)
    @torch.no_grad()
    def _build(self, key: StepKey, weights: DecodeWeights) -> Step:
        step = self._allocate(key)
        if self.captures:
            step.graph = self.capture(lambda: self._run(step, weights))
        return step

    def _allocate(self, key: StepKey, *, token_ids: Tensor | None = None, tables: StepTables | None = None) -> Step:
        """A step's buffers, nothing captured. token_ids, tables: buffers of its input; None: its own."""
        rows = key.batch * key.length
        buffers = DecodeBuffers.allocate(
            self.shape,
            key.batch,
            key.length,
            key.pages,
            self.pool.page_size,
            dtype=self.dtype,
            device=self.device,
            logits=key.logits,
            plan=choose_plan(self.shape, rows, batch=key.batch, deterministic=key.deterministic),
        )
        inputs = torch.zeros(4, key.batch, dtype=torch.int64, device=self.device)
        tables = self.tables.new_step(key.batch, key.pages) if tables is None else tables
        buffers.page_table = tables.main
        window_slots = inputs.new_zeros(len(tables.windows), rows)
        if token_ids is not None:
            buffers.token_ids = token_ids
        tokens = None if key.drawing.greedy else torch.zeros(key.batch, dtype=torch.int64, device=self.device)
        drawn = None
        if key.length == 1 and key.embed and key.logits:
            drawn = torch.zeros(2, key.batch, dtype=torch.int64, device=self.device)
            buffers.unsettled = inputs[3]
        tapped = buffers.stream.new_empty(len(key.taps), *buffers.stream.shape)
        return Step(
            key, buffers, inputs, tables, window_slots, dict(zip(key.taps, tapped, strict=True)), tapped, tokens=tokens, drawn=drawn
        )

    def capture(self, run: Callable[[], None]) -> Any:
        """What `run` launches, as a CUDA graph; it runs once before, and must write no page then (padding). None in `compile_ahead`."""
        if compiling_ahead():
            run()
            return None
        # one for all, and of this model alone: the library's products keep a workspace for each stream, which graphs of two models may use at once
        stream = self._capture_stream = self._capture_stream or torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # compiles what is not compiled yet
            run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self._graph_memory = self._graph_memory or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # other threads (a store's codec, a conversation being put away) may use the device meanwhile
        with torch.cuda.graph(graph, pool=self._graph_memory, stream=stream, capture_error_mode="thread_local"):
            run()
        return graph

    def _run(self, step: Step, weights: DecodeWeights) -> None:
        key, buffers = step.key, step.buffers
        starts, ends, table_rows, _ = step.inputs
        self.tables.look_up(table_rows, step.tables)
        self._place(step, starts, self._zeros[: key.batch], ends, 0)
        self._run_layers(step, weights, head=key.logits)
        if step.tokens is not None:
            assert buffers.logits is not None
            step.tokens.copy_(self.sampling.draw(buffers.logits, buffers.next_tokens, buffers.positions + 1, key.drawing))
        if step.drawn is not None:
            advance(buffers.next_tokens if step.tokens is None else step.tokens, starts, buffers.token_ids, step.drawn)

    def _place(self, step: Step, lengths: Tensor, firsts: Tensor, limits: Tensor, offset: int) -> None:
        """Positions, context lengths, and slots in every pool of a step's new tokens (`kernels.block_inputs`), from its tables."""
        b, size = step.buffers, self.pool.page_size
        for table, slots in zip((step.tables.main, *step.tables.windows), (b.slots, *step.window_slots), strict=True):
            block_inputs(lengths, firsts, limits, table, offset, size, b.positions, slots, b.context_lens)

    def _run_layers(self, step: Step, weights: DecodeWeights, *, head: bool) -> None:
        """A step over positions, slots, context lengths and page tables that are in its buffers."""
        key, buffers = step.key, step.buffers
        if self._family is not None:
            layers = range(key.first, key.last)
            windows = step.tables.windows, step.window_slots
            return self._family.run(buffers, layers, step.taps, windows, embed=key.embed, head=head, deterministic=key.deterministic)
        decode_embed(weights, buffers, first_layer=key.first, embed=key.embed)
        at = key.first
        for tap in dict.fromkeys((*sorted(key.taps), key.last)):
            if tap > at:
                for layers in (range(at, at + 1), range(tap - 1, tap)) if compiling_ahead() else (range(at, tap),):  # others are alike
                    decode_layers(weights, buffers, self.shape, layers)
                at = tap
            if tap in step.taps:
                step.taps[tap].copy_(buffers.stream)
        if head:
            decode_head(weights, buffers, self.shape)

    # --- parts of a larger graph ----------------------------------------------------------------------------------------

    @property
    def memory_version(self) -> tuple[int, ...]:
        """Where the pool's pages lie: what was captured before they moved is void."""
        return tuple(self.pool.layer(layer)[0].data_ptr() for layer in self._pools_begin)

    def part(
        self,
        batch: int,
        length: int,
        layers: range,
        *,
        tables: StepTables,
        token_ids: Tensor | None = None,
        embed: bool = True,
        logits: bool = False,
        taps: tuple[int, ...] = (),
        deterministic: bool = False,
    ) -> Step:
        """Buffers of a pass of exactly `batch` requests that `run_part` runs, within what somebody else captures.

        tables: shared with other parts; token_ids [batch length] int64: the input (embed). logits: of every row, beside the
        most likely tokens. taps: as of `step`.
        """
        key = StepKey(batch, length, tables.main.shape[1], layers.start, layers.stop, taps, logits, embed, deterministic)
        return self._allocate(key, token_ids=token_ids, tables=tables)

    def run_part(self, step: Step, lengths: Tensor, firsts: Tensor, limits: Tensor, offset: int, *, head: bool) -> None:
        """Run a part for tokens at lengths[b] + offset and after (`kernels.block_inputs`). head: also the most likely token after each row."""
        self._place(step, lengths, firsts, limits, offset)
        self._run_layers(step, self._current_weights(), head=head)


@dataclass
class _Ahead:
    """A step that is under way: whose, how it draws, from which positions, the tokens it will have drawn (on the device), and what they are read from.

    step: the captured one, where one took all requests. logprobs: where the log probabilities will be, of all requests if one wants them. states: where
    the states of its tokens will be, if they are kept. beside: see `PlainStep`.
    """

    sequences: list[KvSequence]
    params: list[SamplingParams]
    starts: list[int]
    tokens: Tensor
    ready: Any
    step: Step | None = None
    logprobs: Any | None = None
    states: StepStates | None = None
    beside: Tensor | None = None

    def read(self) -> list[int]:
        """The tokens, once they are there."""
        tokens = read_out(self.ready)
        return tokens if self.step is None else [tokens[start % 2][b] for b, start in enumerate(self.starts)]  # see `kernels.advance`


@dataclass(frozen=True)
class PromptRows:
    """The next tokens of a text, run beside a step of others: each is a row of it, a request of one token to the attention.

    A row sees the keys of the rows before it, as a layer writes those of all rows first (prompts beside decodes: Agrawal et al., "Taming
    Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", 2024, section 4).

    sequence: with pages for them. tokens: from its length on, at least one where it does not join; the text's last token is none of them. joins:
    whether that one alone is left behind them; the request is then one of the step's. last: that token. params, seed: as `PlainDecoding.step` takes
    them.
    """

    sequence: KvSequence
    tokens: list[int]
    joins: bool
    last: int
    params: SamplingParams
    seed: int

    @property
    def end(self) -> int:
        """The position behind the tokens."""
        return self.sequence.length + len(self.tokens)


class PlainStep(NamedTuple):
    """What a step without drafts gives each request: its token, -1 where its logits are not finite, and its log probability where it is asked for.

    states: where those of the last tokens are, if they are kept; each request's in its one of `columns`. ran_beside: whether the prompts' tokens were
    launched. beside: the target's states of those [k, F, E], in their order, where states are kept; as they are until the next step is launched.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    states: StepStates | None
    columns: Sequence[int]
    ran_beside: bool = False
    beside: Tensor | None = None


class _Drawn(NamedTuple):
    """What a launched step will have drawn: tokens [B] int64, where they stay as long as no step of its kind is launched, and `logprob_rows` of them
    where they are asked for."""

    step: Step
    tokens: Tensor
    logprobs: Tensor | None


class PlainDecoding:
    """Decode steps without drafts, each launched before the one before it is read back.

    The next step's input is this step's output, which is on the device: where one captured step follows another of the same requests, nothing is
    copied to the device, and the tokens are copied from it beside the next step. Deterministic steps of more than MOST_SKINNY requests are several, one
    launched after another. A step under way is that of the requests that stay when others end; its tokens are thrown away when another one joins: what
    it wrote lies behind the committed tokens and is written again. Prompts that begin while others decode may have their rows in a step that is
    launched ahead (`PromptRows`), and then nothing waits for them.
    """

    def __init__(self, target: GraphedDecoder) -> None:
        self.target = target
        self._ahead: _Ahead | None = None
        self._penalties: PenaltyRows | None = None  # of the step under way
        self._log: StepStates | None = None  # where the last states were kept
        self._copies = torch.cuda.Stream(target.device) if target.device.type == "cuda" else None

    @staticmethod
    def takes(batch: int) -> bool:
        """Whether a step of so many requests consists of captured ones."""
        return batch <= _BATCHES[-1]

    def under_way(self, sequences: Sequence[KvSequence]) -> bool:
        """Whether the next step of these was launched, be it with others that have ended since."""
        return self._columns(sequences) is not None

    def forget(self, sequence: KvSequence) -> None:
        """A sequence's pages are given back: the step under way is none of its, whatever length it has once it is filled again."""
        if self._ahead is not None and sequence in self._ahead.sequences:
            starts = zip(self._ahead.sequences, self._ahead.starts, strict=True)
            self._ahead.starts = [-1 if own is sequence else start for own, start in starts]

    def _columns(self, sequences: Sequence[KvSequence]) -> Sequence[int] | None:
        """Where these are in the step that was launched; None where it is none of theirs."""
        ahead = self._ahead
        columns = None if ahead is None else places_of(sequences, ahead.sequences)
        if ahead is None or columns is None or [ahead.starts[c] for c in columns] != [s.length for s in sequences]:
            return None
        return columns

    def step(
        self,
        sequences: list[KvSequence],
        last_tokens: Sequence[int],
        room: Sequence[int],
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        *,
        penalties: Callable[[], PenaltyRows] | None = None,
        taps: tuple[int, ...] = (),
        deterministic: bool = False,
        beside: Sequence[PromptRows] = (),
    ) -> PlainStep:
        """One token for each request.

        Args:
            sequences: each with all tokens but the last one committed, and pages for it and, where it has room, for one token more, which is run
                ahead.
            last_tokens: each request's last token, which no model has run.
            room: tokens each may still get, this one included; one that may get no other has no part in the step that is launched ahead.
            params, seeds: how each draws, and the key of its random numbers. penalties: theirs as of their last tokens, asked for where no step is
                under way; None where no request has any. taps: layers after which the target's states are kept; a step that was launched before
                somebody asked has none.
            deterministic: whether the steps' rows have the same bits in any company.
            beside: prompts whose tokens run in the step that is launched ahead, where one is that takes them; their sequences are not advanced.
        """
        columns, current = self._columns(sequences), self._ahead
        self._ahead = None
        if current is not None and columns is not None:
            # penalties are of all requests of the step
            kept = self._penalties is None or len(columns) == len(current.sequences)
            columns = columns if kept and same_objects([current.params[c] for c in columns], params) else None
        if current is None or columns is None:
            self._penalties = None if penalties is None else penalties()
            starts = [sequence.length for sequence in sequences]
            columns = range(len(sequences))
            current = self._launch(sequences, starts, upload(last_tokens, self.target.device), params, seeds, taps, deterministic)
        tokens = None
        if (
            current.step is not None and current.step.holds is not current
        ):  # another pass has taken the step since: its buffers are no longer ours
            tokens = current.read()
        going = range(len(room)) if min(room) > 1 else [b for b, left in enumerate(room) if left > 1]
        if deterministic or self._penalties is not None or not (going or any(own.joins for own in beside)):
            beside = ()
        if beside or (going and (self._penalties is None or len(going) == len(current.sequences))):
            staying, their_seeds = [columns[b] for b in going], [seeds[b] for b in going]
            self._ahead = self._launch_ahead(current, tokens, staying, their_seeds, taps, deterministic, beside)
        tokens = current.read() if tokens is None else tokens
        told: list[TokenLogprobs | None] = [None] * len(columns)
        if current.logprobs is not None:
            rows = read_out(current.logprobs)
            for b, (column, p) in enumerate(zip(columns, params, strict=True)):
                if p.logprobs is not None:
                    told[b] = from_row(rows[column], tokens[column], p.logprobs)
        beside_states = None if self._ahead is None else self._ahead.beside
        return PlainStep([tokens[c] for c in columns], told, current.states, columns, bool(beside), beside_states)

    def _launch_ahead(
        self,
        current: _Ahead,
        tokens: list[int] | None,
        columns: list[int],
        seeds: list[int],
        taps: tuple[int, ...],
        deterministic: bool,
        beside: Sequence[PromptRows],
    ) -> _Ahead:
        """The step behind `current`, of its requests in these columns and of those that join. tokens: those of `current`, where they were read."""
        device, whole = self.target.device, len(columns) == len(current.sequences)
        joining = [own for own in beside if own.joins]
        last = [own.last for own in joining]
        if tokens is not None:
            given = upload([*(tokens[c] for c in columns), *last], device)
        else:
            given = current.tokens if whole else current.tokens[upload(columns, device)]
            given = torch.cat([given, upload(last, device)]) if last else given
        sequences = [*(current.sequences[c] for c in columns), *(own.sequence for own in joining)]
        params = [*(current.params[c] for c in columns), *(own.params for own in joining)]
        starts = [*(current.starts[c] + 1 for c in columns), *(own.end for own in joining)]
        seeds = [*seeds, *(own.seed for own in joining)]
        return self._launch(sequences, starts, given, params, seeds, taps, deterministic, current, beside)

    def _launch(
        self,
        sequences: list[KvSequence],
        starts: list[int],
        tokens: Tensor,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        taps: tuple[int, ...],
        deterministic: bool,
        after: _Ahead | None = None,
        beside: Sequence[PromptRows] = (),
    ) -> _Ahead:
        """after: the launch that draws `tokens`. beside: see `step`; those that join are among the sequences, the last ones."""
        count = len(sequences)
        states = self._room_for_states(count, len(taps)) if taps else None
        most = MOST_SKINNY if deterministic else count
        num_top = max((p.logprobs for p in params if p.logprobs is not None), default=None)
        found = [
            self._replay(
                sequences[own], starts[own], tokens[own], params[own], seeds[own], own, num_top, taps, states, deterministic, after, beside
            )
            for own in (slice(at, min(at + most, count)) for at in range(0, count, most))
        ]
        rows = [own.logprobs for own in found if own.logprobs is not None]
        logprobs = copy_out(torch.cat(rows)) if rows else None
        if len(found) > 1 or self._penalties is not None:
            drawn = torch.cat([own.tokens for own in found])
            return _Ahead(list(sequences), list(params), starts, drawn, copy_out(drawn), None, logprobs, states)
        step, drawn, _ = found[0]
        assert step.drawn is not None
        ready = copy_out(step.drawn, self._copies)
        num_beside = sum(len(own.tokens) for own in beside)
        kept = step.tapped[:, count : count + num_beside] if num_beside and taps else None
        launched = _Ahead(list(sequences), list(params), starts, drawn, ready, step, logprobs, states, kept)
        step.holds, step.copied = launched, None if isinstance(ready, Tensor) else ready[1]
        return launched

    def _room_for_states(self, count: int, num_layers: int) -> StepStates:
        """Where the next step keeps the states of `count` requests: behind those of the last one as long as its tensor has room."""
        log, target = self._log, self.target
        if log is None or log.step + 1 == len(log.source) or log.source.shape[1] != num_layers or log.source.shape[2] < count:
            source = torch.empty(_LOGGED, num_layers, bucket(count), target.config.hidden_size, dtype=target.dtype, device=target.device)
            log = StepStates(source, -1)
        self._log = StepStates(log.source, log.step + 1)
        return self._log

    def _replay(
        self,
        sequences: Sequence[KvSequence],
        starts: Sequence[int],
        tokens: Tensor,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        part: slice,
        num_top: int | None,
        taps: tuple[int, ...],
        states: StepStates | None,
        deterministic: bool,
        after: _Ahead | None,
        beside: Sequence[PromptRows],
    ) -> _Drawn:
        """Launch one captured step for these requests, `part` of all; behind it what draws under penalties and, where num_top is given, what
        tells the log probabilities of its tokens and so many alternatives."""
        target, batch, penalties = self.target, len(sequences), self._penalties
        wanted = target.sampling.set(params, seeds, target.config.vocab_size)
        drawing = wanted if penalties is None else GREEDY
        for sequence, start in zip(sequences, starts, strict=True):
            if not sequence.holds(start, start + 1):
                sequence.check_writable(start, start + 1)  # says what is wrong
        for own in beside:
            own.sequence.check_writable(own.sequence.length, own.end)
        everyone = [*sequences, *(own.sequence for own in beside)]
        prompts = [token for own in beside for token in own.tokens]
        total, pages = batch + len(prompts), max([len(s.pages) for s in everyone])
        step = target.step(total, 1, pages, 0, target.config.num_layers, taps, True, deterministic=deterministic, drawing=drawing)
        rows = target.tables.rows(everyone)
        if beside:
            rows, places, unsettled = rows_with(beside, rows, starts)
            step.fill(places, [1] * total, rows, target.pool.page_size, unsettled)
            step.buffers.token_ids[:total] = torch.cat([tokens, upload(prompts, target.device)])
        elif after is None or step.holds is not after or step.table_rows != rows:
            step.fill(starts, [1] * batch, rows, target.pool.page_size)
            step.buffers.token_ids[:batch] = tokens
        target.replay(step)
        if states is not None:
            states.source[states.step, :, part].copy_(step.tapped[:, :batch])
        drawn, logits = step.buffers.token_ids[:batch], step.buffers.logits  # -1 where logits are not finite
        assert logits is not None
        if penalties is not None:
            drawn = self._draw(logits[:batch], step.buffers, wanted, penalties, part)
        elif deterministic:  # another group of the requests may take the same step
            drawn = drawn.clone()
        return _Drawn(step, drawn, None if num_top is None else logprob_rows(logits[:batch], drawn, num_top))

    def _draw(self, logits: Tensor, buffers: DecodeBuffers, drawing: Drawing, penalties: PenaltyRows, part: slice) -> Tensor:
        """Tokens [B] int64 under penalties, which count them, from a step's logits [B, V]; -1 where these are not finite."""
        batch = len(logits)
        penalised = penalties.penalise(logits, part)
        drawn = torch.where(buffers.next_tokens[:batch] < 0, -1, penalised.argmax(-1))
        if not drawing.greedy:
            drawn = self.target.sampling.draw(penalised, drawn, buffers.positions[:batch] + 1, drawing)
        penalties.count(drawn, part)
        return drawn


def rows_with(beside: Sequence[PromptRows], rows: Sequence[int], starts: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """(page table rows, positions, unsettled keys) of a step's requests, those that join last, and behind them of all tokens beside.

    rows: page table rows of the requests, and then of each prompt. starts: the requests' positions.
    """
    batch, joining = len(starts), [len(own.tokens) for own in beside if own.joins]
    found, places, unsettled = list(rows[:batch]), list(starts), [0] * (batch - len(joining)) + joining
    for row, own in zip(rows[batch:], beside, strict=True):
        count = len(own.tokens)
        found += [row] * count
        places += range(own.sequence.length, own.end)
        unsettled += range(count)
    return found, places, unsettled


def same_objects(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether both hold the same objects in the same order."""
    return len(first) == len(second) and all(map(operator.is_, first, second))


def places_of(some: Sequence[Any], all_of_them: Sequence[Any]) -> Sequence[int] | None:
    """Where each of `some` objects is in a sequence of distinct ones; None where one is not, or where they are in another order there."""
    if same_objects(some, all_of_them):
        return range(len(some))
    places = {id(own): place for place, own in enumerate(all_of_them)}
    found = [places.get(id(own), -1) for own in some]
    return None if -1 in found or any(a >= b for a, b in pairwise(found)) else found


def copy_out(tokens: Tensor, stream: Any | None = None) -> Any:
    """Begin to copy tokens to the host: (host tensor, event), or a tensor on a CPU. stream: beside what is launched after it; the tokens must
    stay as they are until they are read."""
    if tokens.device.type != "cuda":
        return tokens.clone()
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    event = torch.cuda.Event()
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(tokens.device))
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        host.copy_(tokens, non_blocking=True)
        event.record()
    return host, event


def read_out(ready: Any) -> list[Any]:
    """What `copy_out` began to copy, as a list."""
    if isinstance(ready, Tensor):
        return ready.tolist()
    host, event = ready
    event.synchronize()
    return host.tolist()


def graphed(decoder: Decoder, pool: KvPool) -> CausalDecoder:
    """The decoder as it should be run over its pool: through captured or compiled steps where they are supported."""
    if GraphedDecoder.supports(decoder, pool):
        return GraphedDecoder(decoder, pool, capture=True)
    if CompiledDecoder.supports(decoder, pool):
        assert isinstance(pool, PagedPool)
        return CompiledDecoder(decoder, pool)
    return decoder


def plain_decoding(target: CausalDecoder) -> PlainDecoding | None:
    """Steps launched ahead, where the target is run through captured ones."""
    return PlainDecoding(target) if isinstance(target, GraphedDecoder) else None
