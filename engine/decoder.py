"""Our own decoder for the Llama family (Llama, Mistral, Qwen2, Qwen3) over a paged KV pool.

Axes: B requests, N = sum of new tokens over the batch (flattened, ragged), L layers, H query heads, G KV heads, d head size, E hidden size,
V vocabulary, S page size, P pages, D = L_coded * 2 * G * d.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from engine.decoder_config import DecoderConfig
from engine.errors import InvalidOption
from engine.pool import KvSequence, PagedPool
from engine.rope import RopeTable
from engine.stable import StableLinear, stable_silu_mul
from engine.weights import load_folder, read_config
from kernels.dispatch import use_triton
from kernels.kv_write import kv_write
from kernels.kv_write.reference import store
from kernels.paged_attention import paged_attention
from kernels.paged_attention.reference import Plan, attend, plan
from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope
from kernels.rope.reference import rotate, widen
from kernels.silu_mul import silu_mul

__all__ = ["Decoder", "DecoderConfig", "DecoderOutput", "Observer"]

Observer = Callable[[int, torch.Tensor, torch.Tensor], None]  # (layer, queries before rotation [N, H, d], residual stream after it [N, E])


class DecoderOutput(NamedTuple):
    """What a forward pass returns."""

    logits: torch.Tensor | None  # float32 [N, V] ("all"), [B, V] ("last") or None ("none", or the last layer was not run)
    hidden: torch.Tensor  # [N, E] residual stream after the last layer run, before the final norm
    taps: dict[int, torch.Tensor]  # layer count i -> [N, E] residual stream after i layers


class _Batch(NamedTuple):
    """What all layers of one forward pass share."""

    cos: torch.Tensor  # [N, d/2] float32
    sin: torch.Tensor
    wide: tuple[torch.Tensor, torch.Tensor] | None  # the same, laid out for the reference
    slots: torch.Tensor | slice  # [N] int64; a slice where the slots follow one another
    attention: Plan | None  # reference path
    page_table: torch.Tensor | None  # Triton path, [B, max_pages] int32
    query_lens: list[int]
    context_lens: list[int]


class DecoderLayer(nn.Module):
    """Parameters of one layer; q, k, v are one product, gate and up another."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        heads, kv_heads, d, width = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
        self.input_norm = nn.Parameter(torch.empty(width))
        self.qkv_proj = nn.Linear(width, (heads + 2 * kv_heads) * d, bias=config.qkv_bias)
        self.qk_norm = nn.Parameter(torch.empty(2, d)) if config.qk_norm else None  # row 0 for queries, row 1 for keys
        self.o_proj = nn.Linear(heads * d, width, bias=config.o_bias)
        self.post_norm = nn.Parameter(torch.empty(width))
        self.gate_up_proj = nn.Linear(width, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, width, bias=False)


class _Weights(NamedTuple):
    """A layer's tensors, looked up once: attribute access of modules costs more than a small operation."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Decoder(nn.Module):
    """Causal language model over `KvSequence`s. Build it with `from_pretrained` or `from_config`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.final_norm = nn.Parameter(torch.empty(config.hidden_size))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self._weights: list[_Weights] = []
        self._rope: RopeTable | None = None
        self._stable_linear = StableLinear()

    # --- making one -----------------------------------------------------------------------------------------------------

    @classmethod
    def _materialise(cls, config: DecoderConfig, dtype: torch.dtype, device: torch.device | str) -> Decoder:
        """A decoder whose parameters have memory but no values yet."""
        with torch.device("meta"):
            decoder = cls(config).to(dtype)
        decoder.to_empty(device=device)
        decoder.requires_grad_(False)
        return decoder.eval()

    @classmethod
    def from_pretrained(cls, path: Path | str, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Decoder:
        """Load a Hugging Face folder (config.json and safetensors, sharded or not), one tensor at a time.

        Raises:
            ModelNotFound: the folder, its config or weights are missing, broken or do not fit each other.
            UnsupportedArchitecture: the model is one our decoder does not run.
        """
        config = DecoderConfig.from_hf(read_config(Path(path)))
        decoder = cls._materialise(config, dtype, device)
        # an untied checkpoint of a tied model may repeat the head; old ones store the rotary frequencies
        load_folder(Path(path), decoder.hf_tensors(), ignored=("rotary_emb.inv_freq",) + (("lm_head.weight",) if config.tie_word_embeddings else ()))
        return decoder

    @classmethod
    def from_config(cls, config: DecoderConfig, *, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Decoder:
        """Random weights of the usual scale (normal, 0.02; norms 1; biases 0), the same for the same seed and device."""
        decoder = cls._materialise(config, dtype, device)
        generator = torch.Generator(device=device).manual_seed(seed)
        for name, parameter in decoder.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
        return decoder

    def hf_tensors(self) -> dict[str, torch.Tensor]:
        """Hugging Face tensor name -> our parameter, or the contiguous part of a fused one."""
        config = self.config
        q, kv, inner = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.intermediate_size
        named: dict[str, torch.Tensor] = {"model.embed_tokens.weight": self.embed_tokens.weight.data, "model.norm.weight": self.final_norm.data}
        if not config.tie_word_embeddings:
            named["lm_head.weight"] = self.lm_head.weight.data
        for number, w in enumerate(self._layer_weights()):
            prefix = f"model.layers.{number}."
            named[prefix + "input_layernorm.weight"] = w.input_norm
            named[prefix + "post_attention_layernorm.weight"] = w.post_norm
            for name, weight, bias in zip("qkv", w.qkv.split((q, kv, kv)), w.qkv_bias.split((q, kv, kv)) if w.qkv_bias is not None else (None,) * 3, strict=True):
                named[f"{prefix}self_attn.{name}_proj.weight"] = weight
                if bias is not None:
                    named[f"{prefix}self_attn.{name}_proj.bias"] = bias
            if w.qk_norm is not None:
                named[prefix + "self_attn.q_norm.weight"], named[prefix + "self_attn.k_norm.weight"] = w.qk_norm
            named[prefix + "self_attn.o_proj.weight"] = w.o
            if w.o_bias is not None:
                named[prefix + "self_attn.o_proj.bias"] = w.o_bias
            named[prefix + "mlp.gate_proj.weight"], named[prefix + "mlp.up_proj.weight"] = w.gate_up.split((inner, inner))
            named[prefix + "mlp.down_proj.weight"] = w.down
        return named

    def _apply(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        # every move of the parameters (to, float, cuda, ...) comes through here: what was looked up before is stale
        self._weights, self._rope = [], None
        result = super()._apply(*args, **kwargs)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        return result

    def _layer_weights(self) -> list[_Weights]:
        if not self._weights:
            for layer in self.layers:
                assert isinstance(layer, DecoderLayer)
                qkv, o = layer.qkv_proj, layer.o_proj
                self._weights.append(
                    _Weights(
                        layer.input_norm.data,
                        qkv.weight.data,
                        None if qkv.bias is None else qkv.bias.data,
                        None if layer.qk_norm is None else layer.qk_norm.data,
                        o.weight.data,
                        None if o.bias is None else o.bias.data,
                        layer.post_norm.data,
                        layer.gate_up_proj.weight.data,
                        layer.down_proj.weight.data,
                    )
                )
        return self._weights

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
        """Bytes of all parameters, a tied head counted once."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())

    @property
    def rope(self) -> RopeTable:
        """Table of rotary angles on the decoder's device."""
        if self._rope is None:
            self._rope = RopeTable(self.config.rope, self.config.head_dim, self.device)
        return self._rope

    def new_pool(self, num_pages: int, page_size: int = 64, *, max_pages: int | None = None) -> PagedPool:
        """A KV pool of this model's shape, dtype and device (see `PagedPool`)."""
        c = self.config
        return PagedPool(
            c.num_layers, c.num_kv_heads, c.head_dim, num_pages, page_size, dtype=self.dtype, device=self.device, max_pages=max_pages
        )

    # --- running it -----------------------------------------------------------------------------------------------------

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embedding rows [N, E] of token ids [N] int64."""
        return F.embedding(token_ids, self.embed_tokens.weight)

    def head(self, hidden: torch.Tensor, *, deterministic: bool = False) -> torch.Tensor:
        """Final norm and output projection of the residual stream [N, E] -> float32 logits [N, V]."""
        normed, _ = rms_norm(hidden, self.final_norm, self.config.rms_norm_eps)
        linear = self._stable_linear if deterministic else F.linear
        return linear(normed, self.lm_head.weight).float()

    def forward(
        self,
        token_ids: torch.Tensor | None,
        sequences: list[KvSequence],
        query_lens: list[int],
        *,
        starts: list[int] | None = None,
        taps: tuple[int, ...] = (),
        logits: Literal["all", "last", "none"] = "all",
        first_layer: int = 0,
        last_layer: int | None = None,
        hidden: torch.Tensor | None = None,
        observe: Observer | None = None,
        deterministic: bool = False,
    ) -> DecoderOutput:
        """Run new tokens of a ragged batch through the layers, write their keys and values, attend causally to all before.

        Sequence lengths do not move: commit with `sequence.advance(n)`, roll back by not doing so.

        Args:
            token_ids: [N] int64, the requests' new tokens one after another; not used, and may be None, when `hidden` is given.
            sequences: one per request, all of one pool of this model.
            query_lens: new tokens of each request, at least 1.
            starts: position of each request's first new token; default the sequence's length.
            taps: layer counts i (0 to L) whose residual stream is returned: 0 the embeddings, L before the final norm.
            logits: of all new tokens, of each request's last, or none. Only computed when the last layer is run.
            first_layer, last_layer: run layers [first_layer, last_layer); last_layer None is L.
            hidden: [N, E] residual stream to start from; needed when first_layer > 0.
            observe: called after each layer with its number, its queries before rotation and the residual stream after it.
            deterministic: the result of a token is the same bits alone, in any batch and in any block.

        Raises:
            InvalidOption: the arguments do not fit each other.
            PoolExhausted: the pool has too few pages.
        """
        depth = self.config.num_layers
        last = depth if last_layer is None else last_layer
        self._check(token_ids, sequences, query_lens, starts, taps, first_layer, last, hidden)
        if starts is None:
            starts = [sequence.length for sequence in sequences]
        batch = self._prepare(sequences, query_lens, starts, deterministic)
        if hidden is None:
            assert token_ids is not None
            hidden = self.embed(token_ids)
        stream, queries = self._run_layers(hidden, sequences[0].pool, batch, range(first_layer, last), taps, observe, deterministic)
        out = None
        if logits != "none" and last == depth:
            rows = stream
            if logits == "last":
                ends = torch.tensor(query_lens, device=stream.device).cumsum(0) - 1
                rows = stream[ends]
            out = self.head(rows, deterministic=deterministic)
        return DecoderOutput(out, stream, queries)

    def _check(
        self,
        token_ids: torch.Tensor | None,
        sequences: list[KvSequence],
        query_lens: list[int],
        starts: list[int] | None,
        taps: tuple[int, ...],
        first: int,
        last: int,
        hidden: torch.Tensor | None,
    ) -> None:
        count = sum(query_lens)
        if not sequences or len(sequences) != len(query_lens) or min(query_lens) < 1 or (starts is not None and len(starts) != len(sequences)):
            raise InvalidOption("a batch needs one query length of at least 1, and one start, per sequence", "check sequences, query_lens and starts")
        if not 0 <= first <= last <= self.config.num_layers:
            raise InvalidOption(f"layers {first} to {last} are not within 0 to {self.config.num_layers}", "check first_layer and last_layer")
        if any(not first <= tap <= last for tap in taps):
            raise InvalidOption(f"taps {taps} are not all within the layers run, {first} to {last}", "ask for taps of those layers")
        if hidden is None and (first > 0 or token_ids is None):
            raise InvalidOption("a forward pass without token ids, or from a later layer, needs hidden states", "pass hidden")
        given = token_ids if hidden is None else hidden
        assert given is not None
        if given.shape[0] != count:
            raise InvalidOption(f"{given.shape[0]} rows were given for {count} new tokens", "the sum of query_lens must be the number of rows")

    def _prepare(self, sequences: list[KvSequence], query_lens: list[int], starts: list[int], deterministic: bool) -> _Batch:
        pool = sequences[0].pool
        size = pool.page_size
        contexts = [start + count for start, count in zip(starts, query_lens, strict=True)]
        for sequence, context in zip(sequences, contexts, strict=True):
            assert sequence.pool is pool, "the sequences of a batch share one pool"
            sequence.ensure(context)
        cos, sin = self.rope.gather(list(zip(starts, contexts, strict=True)))
        numbers = [
            sequence.pages[position // size] * size + position % size
            for sequence, start, context in zip(sequences, starts, contexts, strict=True)
            for position in range(start, context)
        ]
        pages = [sequence.pages for sequence in sequences]
        if use_triton(pool.kv):
            width = max(len(own) for own in pages)
            table = torch.tensor([own + [0] * (width - len(own)) for own in pages], dtype=torch.int32, device=self.device)
            return _Batch(cos, sin, None, torch.tensor(numbers, device=self.device), None, table, query_lens, contexts)
        slots: torch.Tensor | slice
        if numbers[-1] - numbers[0] == len(numbers) - 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
            slots = slice(numbers[0], numbers[-1] + 1)
        else:
            slots = torch.tensor(numbers, device=self.device)
        attention = plan(
            pages,
            query_lens,
            contexts,
            size,
            self.config.num_heads // self.config.num_kv_heads,
            self.dtype,
            self.device,
            deterministic=deterministic,
        )
        return _Batch(cos, sin, widen(cos, sin), slots, attention, None, query_lens, contexts)

    def _run_layers(
        self,
        hidden: torch.Tensor,
        pool: PagedPool,
        batch: _Batch,
        layers: range,
        taps: tuple[int, ...],
        observe: Observer | None,
        deterministic: bool,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        eps = self.config.rms_norm_eps
        weights = self._layer_weights()
        linear = self._stable_linear if deterministic else F.linear
        activate = stable_silu_mul if deterministic else silu_mul
        stream, update, queries = hidden, None, None
        taken: dict[int, torch.Tensor] = {}
        for number in layers:
            w = weights[number]
            normed, stream = rms_norm(stream, w.input_norm, eps, update)
            if number in taps:
                taken[number] = stream
            if observe is not None and queries is not None:
                observe(number - 1, queries, stream)
            attended, queries = self._attend(linear(normed, w.qkv, w.qkv_bias), w, pool.layer(number), batch, deterministic)
            normed, stream = rms_norm(stream, w.post_norm, eps, linear(attended, w.o, w.o_bias))
            update = linear(activate(linear(normed, w.gate_up)), w.down)
        if update is not None:
            stream = stream + update
        if layers.stop in taps:
            taken[layers.stop] = stream
        if observe is not None and queries is not None:
            observe(layers.stop - 1, queries, stream)
        return stream, taken

    def _attend(
        self, qkv: torch.Tensor, w: _Weights, pages: tuple[torch.Tensor, torch.Tensor], batch: _Batch, deterministic: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of one layer: qkv [N, (H + 2G) d] -> (output [N, H d], queries before rotation [N, H, d])."""
        config = self.config
        heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.head_dim
        split = qkv.unflatten(1, (-1, d))
        q, k, v = split[:, :heads], split[:, heads : heads + kv_heads], split[:, heads + kv_heads :]
        if w.qk_norm is not None:
            q = rms_norm(q, w.qk_norm[0], config.rms_norm_eps)[0]
            k = rms_norm(k, w.qk_norm[1], config.rms_norm_eps)[0]
        scale = d**-0.5
        if batch.attention is None:
            assert batch.page_table is not None and isinstance(batch.slots, torch.Tensor)
            kv_write(k, v, batch.cos, batch.sin, batch.slots, *pages)
            rotated = apply_rope(q, batch.cos, batch.sin)
            attended = paged_attention(
                rotated, *pages, batch.page_table, batch.query_lens, batch.context_lens, scale, deterministic=deterministic
            )
        else:
            # the reference path turns queries and keys in one go and reuses the plan: fewer small operations a layer
            assert batch.wide is not None
            both = split[:, : heads + kv_heads] if w.qk_norm is None else torch.cat((q, k), dim=1)
            rotated = rotate(both, *batch.wide)
            store(rotated[:, heads:], batch.slots, pages[0])
            store(v, batch.slots, pages[1])
            attended = attend(rotated[:, :heads], *pages, batch.attention, scale)
        return attended.flatten(1), q

    # --- keys and values as data ----------------------------------------------------------------------------------------

    def read_kv(self, sequence: KvSequence, start: int, end: int, *, first_layer: int = 0) -> torch.Tensor:
        """Keys before rotation and values of tokens [start, end) of layers [first_layer, L).

        Returns:
            [T, D] float32 in the order (layer, key | value, head, channel).
        """
        assert 0 <= start <= end <= sequence.capacity, "only reserved tokens can be read"
        kv = self._token_rows(sequence, start, end, first_layer).float()  # [T, L, 2, G, d]
        cos, sin = self.rope.inverse(start, end)
        kv[:, :, 0] = apply_rope(kv[:, :, 0], cos, sin)
        return kv.flatten(1)

    def write_kv(self, sequence: KvSequence, start: int, y: torch.Tensor, *, first_layer: int = 0) -> None:
        """Inverse of `read_kv`: rotate the keys of y [T, D] float32 and write tokens start .. start + T - 1; does not advance.

        Raises:
            InvalidOption: y has another width than the layers need.
            PoolExhausted: the pool has too few pages.
        """
        config = self.config
        layers = config.num_layers - first_layer
        if y.dim() != 2 or y.shape[1] != layers * config.kv_width:
            raise InvalidOption(f"KV rows of shape {list(y.shape)} do not fit {layers} layers of {config.kv_width} channels", "check first_layer")
        end = start + y.shape[0]
        sequence.ensure(end)
        kv = y.to(self.device, torch.float32).view(-1, layers, 2, config.num_kv_heads, config.head_dim).clone()
        cos, sin = self.rope.slice(start, end)
        kv[:, :, 0] = apply_rope(kv[:, :, 0], cos, sin)
        pages, offsets = self._addresses(sequence, start, end)
        # two index tensors with a slice of layers before them: the token axis comes first after the permutation
        sequence.pool.kv[first_layer:, :, pages, offsets] = kv.permute(1, 2, 0, 3, 4).to(self.dtype)

    def _addresses(self, sequence: KvSequence, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = sequence.pool.page_size
        positions = torch.arange(start, end)
        pages = torch.tensor(sequence.pages, dtype=torch.int64)[positions // size] if end > start else positions
        return pages.to(self.device), (positions % size).to(self.device)

    def _token_rows(self, sequence: KvSequence, start: int, end: int, first_layer: int) -> torch.Tensor:
        """[T, L - first_layer, 2, G, d] copy of the pages, keys as stored."""
        pages, offsets = self._addresses(sequence, start, end)
        return sequence.pool.kv[first_layer:, :, pages, offsets].permute(2, 0, 1, 3, 4).contiguous()
