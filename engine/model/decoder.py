"""Our own decoder over a paged KV pool, for all families of `engine.model.families`.

Axes: B requests, N = sum of new tokens over the batch (flattened, ragged), L layers, H query heads, G KV heads, d head size, E hidden size,
V vocabulary, S page size, P pages, D = L_coded * 2 * G * d.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn

from draft.protocols import CausalDecoder
from draft.tree import TreePosition
from engine.errors import InvalidOption
from engine.kv.pool import KvPool, KvSequence, LayerAngles, PagedPool
from engine.kv.spread_pool import SpreadPool
from engine.kv.windowed_pool import WindowedPool
from engine.model.attention import AttentionBackend, AttentionBatch, SpreadBackend, TritonBackend, WindowedBackend, open_backend
from engine.model.batch_invariant import batch_invariant, batch_invariant_gate, batch_invariant_grouped
from engine.model.config import DecoderConfig
from engine.model.device import on_device
from engine.model.device_map import DeviceMap
from engine.model.embedding import BlockEmbedding
from engine.model.forward_pass import DecoderOutput, ForwardPass, Observer, PassRunner
from engine.model.layers import GATES, DecoderLayer, LayerOps, LayerWeights, layer_forward, with_offset
from engine.model.linear import Gemm, Projection, packed_copy, select_gemm
from engine.model.rope import RopeTable
from engine.model.weights import load_tensors, open_checkpoint, sum_of_all
from kernels.cpu_decode.blocks import BlockWeight
from kernels.cpu_decode.file_blocks import laid_out, row_bytes
from kernels.cpu_decode.machine_code import allows_tiles
from kernels.cpu_decode.tiles import TileWeight
from kernels.grouped_linear import grouped_linear
from kernels.memory import HugePages
from kernels.rms_norm import rms_norm
from kernels.upload import upload

__all__ = ["Decoder", "DecoderConfig", "DecoderOutput", "Observer", "forward_reserved"]

_LEAST_HUGE_BYTES = 32 << 20  # of matrices that go into pages of 2 MiB: far less is read from the processor's caches


class QuantizedBlocks(Protocol):
    """Quantised matrices by Hugging Face name: (one of `kernels.cpu_decode.file_blocks.formats`, shape), and their bytes; `engine.hub.gguf_blocks`."""

    def get(self, name: str, /) -> tuple[int, tuple[int, ...]] | None: ...

    def read(self, name: str, out: torch.Tensor) -> None: ...  # to uint8 [rows, bytes of a row]


def forward_reserved(
    model: CausalDecoder,
    token_ids: torch.Tensor | None,
    sequences: Sequence[KvSequence],
    query_lens: Sequence[int],
    *,
    starts: Sequence[int] | None = None,
    tree_positions: list[TreePosition] | None = None,
    **options: Any,
) -> Any:
    """Reserve the new tokens' pages, then `Decoder.forward`: for callers outside of the scheduler, which reserves for a whole step.

    Raises:
        InvalidOption: as `Decoder.forward`. PoolExhausted: the pool has too few pages.
    """
    firsts = [sequence.length for sequence in sequences] if starts is None else list(starts)
    if len(firsts) == len(query_lens) == len(sequences):  # else the forward refuses them
        batch = AttentionBatch(sequences, query_lens, firsts, tree_positions)
        for sequence, first, context in zip(sequences, firsts, batch.contexts, strict=True):
            sequence.ensure(context, first)
    return model.forward(
        token_ids, list(sequences), list(query_lens), starts=None if starts is None else firsts, tree_positions=tree_positions, **options
    )


class Decoder(PassRunner, nn.Module):
    """Causal language model over `KvSequence`s. Build it with `from_pretrained` or `from_config`.

    gemm: how its weights are multiplied; None: the fastest way for its dtype and device.
    """

    def __init__(
        self,
        config: DecoderConfig,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        device_map: DeviceMap | None = None,
        gemm: Gemm | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.device_map = device_map  # of layers over several devices; None: all on one
        # given a weight, the module does not fill one with random numbers
        embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.embed_tokens: nn.Embedding | BlockEmbedding = nn.Embedding(config.vocab_size, config.hidden_size, _weight=embedding)
        self.layers = nn.ModuleList(
            DecoderLayer(config, number, dtype, device if device_map is None else device_map.of(number))
            for number in range(config.num_layers)
        )
        self.final_norm = nn.Parameter(torch.empty(config.hidden_size, dtype=dtype, device=device))
        # a tied head has no weights: the embedding, which is looked up row by row, or a copy of it made for products
        self.lm_head = None if config.tie_word_embeddings else Projection(config.hidden_size, config.vocab_size, False, dtype, device)
        self._tied_head: torch.Tensor | None = None
        self.weight_sum: int | None = None  # over the bytes it was loaded from (`sum_of_all`)
        self._weights: list[LayerWeights] = []
        self._output_norm: torch.Tensor | None = None
        self._ropes: dict[tuple[bool, torch.device], RopeTable] = {}
        self._parts: dict[tuple[int, ...], DecoderConfig] = {}
        self.layer_shapes = [config.layer_shape(number) for number in range(config.num_layers)]
        self.gemm = select_gemm(self.dtype, self.device) if gemm is None else gemm
        self._choose_ops()

    def _choose_ops(self) -> None:
        """What depends on dtype, device and `gemm`: operations of the layers, batch-invariant ones too, and the embeddings' factor."""
        # as the dtype holds it: so the models were trained
        self._embedding_scale = float(torch.tensor(self.config.embedding_scale, dtype=self.dtype))
        linear = self.gemm.linear
        gates = {name: batch_invariant_gate(gate) for name, gate in GATES.items()}
        self._ops = {
            False: LayerOps(linear, rms_norm, GATES, grouped_linear),
            True: LayerOps(batch_invariant(linear), rms_norm, gates, batch_invariant_grouped(linear)),
        }

    # --- making one -----------------------------------------------------------------------------------------------------

    @classmethod
    def _materialise(
        cls,
        config: DecoderConfig,
        dtype: torch.dtype,
        device: torch.device | str,
        device_map: DeviceMap | None = None,
        gemm: Gemm | None = None,
    ) -> Decoder:
        """A decoder whose parameters have an address but no values yet; a CPU's take up memory as they are filled."""
        decoder = cls(config, dtype, device if device_map is None else device_map.main, device_map, gemm)
        decoder.requires_grad_(False)
        return decoder.eval()

    def _use_huge_pages(self) -> None:
        """Puts a CPU's matrices, which have no values yet, into pages of 2 MiB; small models, which caches hold, stay where they are."""
        projections = [
            own for own in self.modules() if isinstance(own, Projection) and own.plain is not None and own.plain.device.type == "cpu"
        ]
        embedding = self.embed_tokens.weight if isinstance(self.embed_tokens, nn.Embedding) else None
        total = sum(HugePages.num_bytes(own.matrix.shape, own.matrix.dtype) for own in projections)
        total += 0 if embedding is None else HugePages.num_bytes(embedding.shape, embedding.dtype)
        if self.device.type != "cpu" or total < _LEAST_HUGE_BYTES:
            return
        memory = HugePages(total)
        for own in projections:
            own.borrow(memory.zeros((own.matrix.numel(),), own.matrix.dtype))
        if isinstance(self.embed_tokens, nn.Embedding) and embedding is not None:
            self.embed_tokens.weight = nn.Parameter(memory.zeros(embedding.shape, embedding.dtype), requires_grad=False)

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        num_layers: int | None = None,
        blocks: QuantizedBlocks | None = None,
        device_map: DeviceMap | None = None,
        gemm: Gemm | None = None,
    ) -> Decoder:
        """Load a Hugging Face folder (config.json and safetensors, sharded or not), one tensor at a time.

        num_layers: the first so many layers alone, without a head: for their states, keys and values. blocks: of the file the folder was converted
        from: projections, and the head, whose parts are all of one format there stay in it. device_map: of its layers over several devices,
            instead of `device`. gemm: see the class; blocks are multiplied by compiled code.

        Raises:
            ModelNotFound: the folder, its config or weights are missing, broken or do not fit each other.
            UnsupportedArchitecture: the model is one our decoder does not run.
            InvalidOption: it has fewer layers.
        """
        config, stored = open_checkpoint(Path(path))
        if num_layers is not None:
            if not 1 <= num_layers <= config.num_layers:
                raise InvalidOption(f"the first {num_layers} layers of a model of {config.num_layers}", "ask for some of its layers")
            part = replace(config, num_layers=num_layers, tie_word_embeddings=True)
            decoder = cls.filled(part, lambda places: load_tensors(stored, places), dtype=dtype, device=device, gemm=gemm)
            decoder._tied_head = None
            return decoder
        sums: dict[str, int] = {}
        decoder = cls.filled(
            config,
            lambda places: sums.update(load_tensors(stored, places)),
            dtype=dtype,
            device=device,
            blocks=blocks,
            device_map=device_map,
            gemm=gemm,
        )
        if blocks is None:
            decoder.weight_sum = sum_of_all(stored, sums)
        return decoder

    @classmethod
    def filled(
        cls,
        config: DecoderConfig,
        fill: Callable[[dict[str, torch.Tensor]], object],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        int8: bool = False,
        blocks: QuantizedBlocks | None = None,
        device_map: DeviceMap | None = None,
        gemm: Gemm | None = None,
    ) -> Decoder:
        """A packed decoder with the values that `fill` puts into the tensors it is given, by their Hugging Face names, some at a time.

        Where weights are packed, a layer's matrices are filled in memory that the next layer's use again: memory that is touched for the first time
        costs several times what reading a file in the system's cache does. int8: see `pack`. blocks, gemm: see `from_pretrained`;
        `fill` is not asked for what the blocks give.
        """
        decoder = cls._materialise(config, dtype, device, device_map, gemm if blocks is None else Gemm.COMPILED)
        if blocks is not None:
            decoder._take_blocks(blocks)
        if not int8:  # whose plain weights are given up one by one, and could not be while others lie in the same room
            decoder._use_huge_pages()
        fill({"model.norm.weight": decoder.final_norm.data})
        if not isinstance(decoder.embed_tokens, BlockEmbedding):
            fill({"model.embed_tokens.weight": decoder.embed_tokens.weight.data})
        if decoder.lm_head is not None and decoder.lm_head.plain is not None:
            fill({"lm_head.weight": decoder.lm_head.weight})
            decoder.lm_head.pack(decoder.gemm, int8=int8)
        memory: torch.Tensor | None = None
        for number, module in enumerate(decoder.layers):
            layer = cast(DecoderLayer, module)
            projections = [part for part in layer.modules() if isinstance(part, Projection)]
            if decoder.gemm is Gemm.PACKED:
                if memory is None:
                    memory = torch.empty(sum(projection.matrix.numel() for projection in projections), dtype=dtype, device=device)
                used = 0
                for projection in projections:
                    used += projection.borrow(memory[used:])
            fill({f"model.layers.{number}.{name}": part for name, part in layer.to_fill()})
            for projection in projections:
                projection.pack(decoder.gemm, int8=int8)
        return decoder.pack(int8=int8)

    def _take_blocks(self, blocks: QuantizedBlocks) -> None:
        """Quantised matrices in place of plain ones that have no values yet."""

        def joined(names: Sequence[str]) -> BlockWeight | TileWeight | None:
            found = [blocks.get(name) for name in names]
            if any(own is None or own[0] != cast(tuple, found[0])[0] for own in found):
                return None
            (kind, (_, width)), sizes = cast(tuple, found[0]), [cast(tuple, own)[1][0] for own in found]
            memory = torch.empty(sum(sizes), row_bytes(kind, width), dtype=torch.uint8)
            for name, part in zip(names, memory.split(sizes), strict=True):
                blocks.read(name, part)
            return laid_out(memory, kind, self.dtype)

        for number, module in enumerate(self.layers):
            for projection, parts in cast(DecoderLayer, module).projections():
                own = joined([f"model.layers.{number}.{part}.weight" for part in parts])
                if own is not None:
                    projection.take_blocks(own)
        if self.lm_head is not None and (head := joined(["lm_head.weight"])) is not None:
            self.lm_head.take_blocks(head)
        embedding = joined(["model.embed_tokens.weight"])
        if embedding is not None:
            self.embed_tokens = BlockEmbedding(embedding)
            self._tied_head = None if self.lm_head is not None else cast(torch.Tensor, embedding)

    @classmethod
    def from_config(
        cls,
        config: DecoderConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        seed: int = 0,
        device_map: DeviceMap | None = None,
    ) -> Decoder:
        """Random weights of the usual scale (normal, 0.02; norms 1; biases 0), the same for the same seed and kind of device."""
        decoder = cls._materialise(config, dtype, device, device_map)
        generator = torch.Generator(device=decoder.device).manual_seed(seed)
        for name, parameter in decoder.named_parameters():
            if "norm" in name:
                parameter.fill_(0.0 if config.norm_offset else 1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.copy_(torch.empty_like(parameter, device=decoder.device).normal_(0.0, 0.02, generator=generator))
        return decoder.pack()

    def hf_tensors(self) -> dict[str, torch.Tensor]:
        """Hugging Face tensor name -> our parameter, or the contiguous part of a fused one."""
        named = {"model.embed_tokens.weight": self.embed_tokens.weight.data, "model.norm.weight": self.final_norm.data}
        if self.lm_head is not None:
            named["lm_head.weight"] = self.lm_head.weight
        for number, module in enumerate(self.layers):
            layer = cast(DecoderLayer, module)
            named |= {f"model.layers.{number}.{name}": part for name, part in layer.stored().hf_parts(layer.shape)}
        return named

    def pack(self, *, int8: bool = False) -> Decoder:
        """Lay the weights out for the CPU where that pays (bf16); each plain matrix is given up as its packed one is made. int8: keep 8 bits of the
        projections' weights instead, for a draft, which need not be exact."""
        self._weights = []  # it would keep every plain matrix alive
        for module in self.modules():
            if isinstance(module, Projection):
                module.pack(self.gemm, int8=int8)
        if self.gemm is Gemm.PACKED and self.lm_head is None and self._tied_head is None:
            self._tied_head = packed_copy(self.embed_tokens.weight.data)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # every move of the parameters (to, float, cuda, ...) comes through here: what was looked up before is stale
        projections = [module for module in self.modules() if isinstance(module, Projection)]
        packed = any(projection.packed is not None for projection in projections)
        for projection in projections:
            projection.unpack()
        if isinstance(self.embed_tokens, BlockEmbedding):
            self.embed_tokens = nn.Embedding.from_pretrained(self.embed_tokens.weight)
        self._weights, self._output_norm, self._ropes, self._tied_head = [], None, {}, None
        before = self.dtype, self.device
        result = super()._apply(*args, **kwargs)
        if (self.dtype, self.device) != before:
            self.gemm = select_gemm(self.dtype, self.device)
        if self.device_map is not None:
            where = [(first, end, cast(DecoderLayer, self.layers[first]).input_norm.device) for first, end, _ in self.device_map.parts]
            self.device_map = DeviceMap(self.device, tuple(where))
        self._choose_ops()
        return self.pack() if packed else result

    def layer_weights(self) -> list[LayerWeights]:
        """Tensors of every layer, as the forward pass takes them."""
        if not self._weights:
            self._weights = [cast(DecoderLayer, layer).weights() for layer in self.layers]
        return self._weights

    @property
    def output_norm(self) -> torch.Tensor:
        """What the final norm multiplies by, [E]: its weight, with the family's offset."""
        if not self.config.norm_offset:
            return self.final_norm.data
        if self._output_norm is None:
            self._output_norm = with_offset(self.final_norm.data)
        return self._output_norm

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of the KV pool."""
        return self.final_norm.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.final_norm.device

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights; a tied head counts once more where it has a copy for products."""
        packed = [module.packed for module in self.modules() if isinstance(module, Projection)]
        rows = self.embed_tokens.blocks if isinstance(self.embed_tokens, BlockEmbedding) and self._tied_head is None else None
        held = [*self.parameters(), *(tensor for tensor in (*packed, self._tied_head, rows) if tensor is not None)]
        return sum(tensor.nbytes for tensor in held)

    @property
    def num_threads(self) -> int:
        """CPU threads that a pass uses."""
        return torch.get_num_threads()

    @property
    def multiplies_matrices(self) -> bool:
        """Whether the processor multiplies the weights as matrices, 16 rows in about the time of one: bf16 ones, not float32 or weights in few bits."""
        projections = (module for module in self.modules() if isinstance(module, Projection))
        as_stored = self.device.type == "cpu" and self.dtype == torch.bfloat16
        return as_stored and allows_tiles() and not any(projection.in_few_bits for projection in projections)

    @property
    def follows_tables(self) -> bool:
        """Whether passes of few tokens read a sequence's pages wherever they lie: a GPU's kernels do, a CPU's attention gathers them first."""
        return self.device.type != "cpu"

    @property
    def captured_rows(self) -> int | None:
        """None: no pass is captured."""
        return None

    @property
    def rope(self) -> RopeTable:
        """Table of rotary angles on the decoder's device, of all layers but those with a RoPE of their own (`rope_table`)."""
        return self.rope_table(local=False)

    def rope_table(self, *, local: bool, device: torch.device | None = None) -> RopeTable:
        """Table of rotary angles of layers whose kind says `local_rope`, or of the others; device: another than the decoder's."""
        key = local, self.device if device is None else device
        if key not in self._ropes:
            options = self.config.local_rope if local else self.config.rope
            assert options is not None, "a family with local_rope layers has options for them"
            self._ropes[key] = RopeTable(options, self.config.head_dim, key[1])
        return self._ropes[key]

    def _angles(self, start: int, end: int, *, inverse: bool = False) -> LayerAngles:
        """Angles of positions [start, end) by layer; inverse: those that turn back."""
        tables = [self.rope_table(local=local) for local in ([False] if self.config.local_rope is None else [False, True])]
        angles = tuple(table.inverse(start, end) if inverse else table.slice(start, end) for table in tables)
        return LayerAngles(angles, tuple(int(shape.local_rope) for shape in self.layer_shapes))

    def new_pool(self, num_pages: int, page_size: int = 64, *, max_pages: int | None = None, num_layers: int | None = None) -> Any:
        """A KV pool of this model's shape, dtype and device, that holds all tokens of all layers: a `PagedPool`, or a `SpreadPool` where the layers lie
        on several devices. num_layers: of fewer layers, on one device."""
        c = self.config

        def part(layers: int, device: torch.device) -> PagedPool:
            return PagedPool(layers, c.num_kv_heads, c.head_dim, num_pages, page_size, dtype=self.dtype, device=device, max_pages=max_pages)

        if self.device_map is None:
            return part(c.num_layers if num_layers is None else num_layers, self.device)
        return SpreadPool([(first, part(end - first, device)) for first, end, device in self.device_map.parts], self.device)

    # --- running it -----------------------------------------------------------------------------------------------------

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embedding rows [N, E] of token ids [N] int64, scaled as the family does."""
        rows = self.embed_tokens(token_ids)
        return rows if self._embedding_scale == 1.0 else rows * self._embedding_scale

    @property
    def head_matrix(self) -> torch.Tensor:
        """The output projection [V, E] as a `LinearFn` takes it."""
        if self.lm_head is not None:
            return self.lm_head.matrix
        return self.embed_tokens.weight.data if self._tied_head is None else self._tied_head

    def head(self, hidden: torch.Tensor, *, deterministic: bool = False) -> torch.Tensor:
        """Final norm and output projection of the residual stream [N, E] -> float32 logits [N, V]."""
        normed, _ = rms_norm(hidden, self.output_norm, self.config.rms_norm_eps)
        logits = self._ops[deterministic].linear(normed, self.head_matrix, None).float()
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def run(self, asked: ForwardPass) -> DecoderOutput:
        """See `PassRunner.run`."""
        asked.check(self.config.num_layers)
        batch = asked.batch
        batch.check_pages()
        backend = self.attention_backend(asked.sequences[0].pool, deterministic=asked.deterministic)
        backend.plan(batch)
        hidden = asked.hidden
        if hidden is None:
            assert asked.token_ids is not None
            hidden = self.embed(asked.token_ids)
        stream, taken = self._run_layers(hidden, backend, asked.layers, asked.taps, asked.observe)
        out = None
        if asked.speaks(self.config.num_layers):
            rows = stream if asked.logits == "all" else stream[upload(asked.ends, stream.device)]
            out = self.head(rows, deterministic=asked.deterministic)
        return DecoderOutput(out, stream, taken)

    def run_layers(
        self, hidden: torch.Tensor, backend: AttentionBackend, layers: range, taps: tuple[int, ...] = ()
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Layers over the residual stream [N, E] of new tokens, for a batch that the backend was planned or prepared for -> the stream after them, and
        after tap layers for each tap. Nothing is allocated in the pool and nothing read back."""
        return self._run_layers(hidden, backend, layers, taps, None)

    def _run_layers(
        self,
        hidden: torch.Tensor,
        backend: AttentionBackend,
        layers: range,
        taps: tuple[int, ...],
        observe: Observer | None,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        weights, shapes, ops = self.layer_weights(), self.layer_shapes, self._ops[backend.deterministic]
        stream, update, queries = hidden, None, None
        taken: dict[int, torch.Tensor] = {}
        place = None if self.device_map is None else self.device_map.of
        for number in layers:
            rotate, attend = partial(backend.rotate, number), partial(backend.attend, number)
            if place is None:
                out = layer_forward(weights[number], stream, rotate, attend, shapes[number], ops, update)
            else:
                device = place(number)
                stream, update = stream.to(device), None if update is None else update.to(device)
                with on_device(device):
                    out = layer_forward(weights[number], stream, rotate, attend, shapes[number], ops, update)
            if number in taps:
                taken[number] = out.entered
            if observe is not None and queries is not None:
                observe(number - 1, queries.to(self.device), out.entered.to(self.device))
            stream, update, queries = out.stream, out.update, out.queries
        if update is not None:
            stream = stream + update
        if place is not None:  # callers know one device
            stream, taken = stream.to(self.device), {tap: rows.to(self.device) for tap, rows in taken.items()}
        if layers.stop in taps:
            taken[layers.stop] = stream
        if observe is not None and queries is not None:
            observe(layers.stop - 1, queries.to(self.device), stream)
        return stream, taken

    def attention_backend(self, pool: KvPool, *, deterministic: bool = False, kernels: bool = False) -> AttentionBackend:
        """Attention of this model over one of its pools. kernels: over plain pages in tensors that a caller may set itself, on any device."""
        if isinstance(pool, SpreadPool):
            assert self.device_map is not None and not kernels
            found = []
            for (first, end, device), (_, part) in zip(self.device_map.parts, pool.parts, strict=True):
                own = replace(self.config, num_layers=end - first, layer_kinds=self.config.layer_kinds[first:end])
                ropes = [self.rope_table(local=local, device=device) for local in ([False] if own.local_rope is None else [False, True])]
                found.append((first, open_backend(part, own, *ropes, deterministic=deterministic)))
            return SpreadBackend(found, deterministic=deterministic)
        if isinstance(pool, WindowedPool):
            parts = [(group.layers, group.pool) for group in pool.windowed]
            if pool.main_layers:
                parts.insert(0, (pool.main_layers, pool.main))
            opened = [(layers, self._open_backend(part, self._part(layers), deterministic, kernels)) for layers, part in parts]
            return WindowedBackend(opened, whole=bool(pool.main_layers), deterministic=deterministic)
        return self._open_backend(pool, self.config, deterministic, kernels)

    def _part(self, layers: tuple[int, ...]) -> DecoderConfig:
        """The config of some layers, as attention takes it."""
        if layers not in self._parts:
            kinds = tuple(self.config.layer_kinds[layer] for layer in layers)
            self._parts[layers] = replace(self.config, num_layers=len(layers), layer_kinds=kinds)
        return self._parts[layers]

    def _open_backend(self, pool: KvPool, config: DecoderConfig, deterministic: bool, kernels: bool) -> AttentionBackend:
        local = None if config.local_rope is None else self.rope_table(local=True)
        if kernels:
            assert isinstance(pool, PagedPool)
            return TritonBackend(pool, config, self.rope, local, deterministic=deterministic)
        return open_backend(pool, config, self.rope, local, deterministic=deterministic)

    def decode(self, token_ids: torch.Tensor, backend: AttentionBackend) -> torch.Tensor:
        """New tokens [N] int64 of a batch that the backend was planned or prepared for -> float32 logits [N, V].

        Nothing is allocated in the pool and nothing read back, so a CUDA graph can hold it.
        """
        stream, _ = self._run_layers(self.embed(token_ids), backend, range(self.config.num_layers), (), None)
        return self.head(stream, deterministic=backend.deterministic)

    # --- keys and values as data ----------------------------------------------------------------------------------------

    def read_kv(self, sequence: KvSequence, start: int, end: int, *, first_layer: int = 0) -> torch.Tensor:
        """Keys before rotation and values of tokens [start, end) of layers [first_layer, L).

        Returns:
            [T, D] float32 in the order (layer, key | value, head, channel).
        """
        assert 0 <= start <= end <= sequence.capacity, "only reserved tokens can be read"
        return sequence.pool.read(sequence, start, end, first_layer, self._angles(start, end, inverse=True)).flatten(1)

    def write_kv(self, sequence: KvSequence, start: int, y: torch.Tensor, *, first_layer: int = 0) -> None:
        """Inverse of `read_kv`: rotate the keys of y [T, D] float32 and write tokens start .. start + T - 1; does not advance.

        Raises:
            InvalidOption: y has another width than the layers need.
            PagesNotReserved: the sequence does not own these tokens' pages alone.
        """
        config = self.config
        layers = config.num_layers - first_layer
        if y.dim() != 2 or y.shape[1] != layers * config.kv_width:
            what = f"KV rows of shape {list(y.shape)} do not fit {layers} layers of {config.kv_width} channels"
            raise InvalidOption(what, "check first_layer")
        end = start + y.shape[0]
        sequence.check_writable(start, end)
        kv = y.to(self.device, torch.float32).view(-1, layers, 2, config.num_kv_heads, config.head_dim)
        sequence.pool.write(sequence, start, kv, first_layer, self._angles(start, end))
