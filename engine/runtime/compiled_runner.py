"""A model's small forward passes on a CPU as compiled steps; all others are the decoder's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.kv.pool import KvPool, KvSequence, PagedPool
from engine.model.attention import AttentionBatch
from engine.model.decoder import Decoder
from engine.model.forward_pass import DecoderOutput, ForwardPass
from engine.model.linear import Gemm
from engine.runtime.decoder_runner import DecoderRunner
from kernels.cpu_decode import most_rows
from kernels.cpu_decode.crew import num_threads

_ROWS = 64  # of a deterministic pass that run together


def page_tables(sequences: Sequence[KvSequence]) -> np.ndarray:
    """Their pages, int64 [B, P], rows filled up with 0."""
    if len(sequences) == 1:  # most steps, and short ones: what the host does counts
        return np.array([sequences[0].pages], np.int64)
    tables = np.zeros((len(sequences), max(len(s.pages) for s in sequences)), np.int64)
    for number, sequence in enumerate(sequences):
        tables[number, : len(sequence.pages)] = sequence.pages
    return tables


class CompiledDecoder(DecoderRunner):
    """A decoder whose passes of up to `most_rows` rows, and all deterministic ones, run as compiled steps. Implements `draft.protocols.CausalDecoder`.

    Args:
        decoder: a model that `supports` names.
        pool: its pool of plain pages.
    """

    def __init__(self, decoder: Decoder, pool: PagedPool) -> None:
        super().__init__(decoder)
        self.pool = pool
        layers = decoder.layer_weights()
        self._plain = all(isinstance(w.qkv, Tensor) for w in layers)
        self._layer_bytes = sum(m.nbytes for w in layers[:1] for m in (w.qkv, w.o, w.gate_up, w.down))
        self._known: tuple[Sequence[Any], int] | None = None  # the weights and where the pool lay
        self._compiled: Any = None

    @staticmethod
    def supports(decoder: Decoder, pool: KvPool) -> bool:
        """Whether the model's steps can run compiled: Llama's layers with compiled products, over plain pages in the weights' dtype."""
        c = decoder.config
        if not (isinstance(pool, PagedPool) and c.is_plain and c.head_dim % 32 == 0 and decoder.gemm is Gemm.COMPILED):
            return False
        from kernels.cpu_decode.step import fits

        matrices = [m for w in decoder.layer_weights() for m in (w.qkv, w.o, w.gate_up, w.down)]
        return all(fits(matrix) for matrix in (*matrices, decoder.head_matrix))

    @property
    def num_threads(self) -> int:
        """A compiled step runs in the thread that asks for it; others help only while that is faster."""
        return 1

    @property
    def follows_tables(self) -> bool:
        """A compiled step reads a row of keys at a time, by its page."""
        return True

    @property
    def most_rows(self) -> int:
        """Of a pass that runs compiled where its bits may depend on the rows beside: more, where threads share the compiled products, too."""
        return most_rows(torch.get_num_threads() // num_threads(self._layer_bytes), plain=self._plain)

    def head(self, hidden: Tensor, *, deterministic: bool = False) -> Tensor:
        """See `Decoder.head`."""
        if not deterministic and hidden.shape[0] > self.most_rows:
            return self.decoder.head(hidden)
        from kernels.cpu_decode.step import head

        return head(hidden, self.decoder.output_norm, self._head_matrix(), self.config.rms_norm_eps)

    def _head_matrix(self) -> Any:
        """The head's weight [V, E] that compiled steps multiply by."""
        return self.decoder.head_matrix

    def _layer_weights(self) -> Sequence[Any]:
        """The layers' weights that compiled steps multiply by, the same object while they are the same."""
        return self.decoder.layer_weights()

    def run(self, asked: ForwardPass) -> DecoderOutput:
        """See `PassRunner.run`. Passes of more rows, and those that are observed, are the decoder's own."""
        many = not asked.deterministic and sum(asked.query_lens) > self.most_rows
        if many or asked.source is None or not asked.layers or asked.observe is not None:
            return self.decoder.run(asked)
        asked.check(self.config.num_layers)
        batch = asked.batch
        batch.check_pages()
        hidden = asked.hidden
        if hidden is None:
            assert asked.token_ids is not None
            hidden = self.decoder.embed(asked.token_ids)
        stream = hidden.float() if hidden.dtype != torch.float32 else hidden.clone()
        taken = self._run(batch, stream, asked.layers, asked.taps)
        out = None
        if asked.speaks(self.config.num_layers):
            wanted = stream if asked.logits == "all" else stream[torch.tensor(asked.ends)]
            out = self.head(wanted, deterministic=asked.deterministic)
        return DecoderOutput(out, stream.to(self.dtype), taken)

    def _run(self, batch: AttentionBatch, stream: Tensor, layers: range, taps: Sequence[int]) -> dict[int, Tensor]:
        """Run layers over the residual stream, in place. Returns the streams at taps."""
        compiled = self._layers()
        angles = batch.angles(self.decoder.rope)
        positions = np.array(batch.positions, np.int64)
        trees = batch.tree_positions
        places = positions if trees is None else np.array([slot for tree in trees for slot in tree.slots], np.int64)
        requests = np.repeat(np.arange(len(batch.sequences)), batch.query_lens)
        tables = page_tables(batch.sequences)
        taken = {tap: torch.empty(stream.shape, dtype=self.dtype) for tap in taps}
        for first in range(0, len(stream), _ROWS):
            part = slice(first, first + _ROWS)
            cos, sin = (angle[part] for angle in angles)
            at = layers.start
            for tap in (*sorted(taps), layers.stop):
                compiled.run(range(at, tap), stream[part], (cos, sin), positions[part], places[part], requests[part], tables)
                if tap in taken:
                    taken[tap][part] = stream[part]
                at = tap
        return taken

    def _layers(self) -> Any:
        """The layers as the compiled code takes them, made anew when the weights or the pool have moved."""
        from kernels.cpu_decode.step import CompiledLayers, StepShape

        weights, lies_at = self._layer_weights(), self.pool.layer(0)[0].data_ptr()
        if self._known is None or self._known[0] is not weights or self._known[1] != lies_at:
            c, shape = self.config, self.decoder.layer_shapes[0]
            sizes = StepShape(c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size, c.rms_norm_eps, shape.scale)
            pages = [self.pool.layer(number) for number in range(len(weights))]
            self._compiled, self._known = CompiledLayers(weights, pages, sizes), (weights, lies_at)
        return self._compiled
