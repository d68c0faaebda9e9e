"""Copies of weights in few bits for drafts on a CPU: a target's first layers, and a draft head's own, whose results only decide what is proposed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from draft.draft_head import DraftHead
from draft.exit_copy import ExitCopy
from engine.kv.pool import KvSequence
from engine.model.embedding import BlockEmbedding
from engine.model.layers import LayerWeights
from engine.runtime.compiled_runner import CompiledDecoder, page_tables
from kernels.cpu_decode.blocks import BlockWeight
from kernels.cpu_decode.stopping import Stopping
from kernels.cpu_decode.tiles import OUTPUTS, TILES_4, TILES_8, TileWeight
from kernels.memory import HugePages

if TYPE_CHECKING:  # importing it compiles
    from kernels.cpu_decode.drafts import Drafted, Part

_MATRICES = ("qkv", "o", "gate_up", "down")
_COPIES_VERSION = 1  # of what `TileWeight.of` makes of a weight, and of the order of the matrices


class KeptCopies(Protocol):
    """Copies that an earlier process has left."""

    @property
    def exists(self) -> bool: ...

    def read_into(self, room: memoryview) -> bool: ...

    def write(self, room: memoryview) -> None: ...


class CopiedDecoder(CompiledDecoder):
    """A compiled decoder whose first layers, and whose head, are multiplied from copies in few bits; passes of many rows are the decoder's own.

    The copies are made at the first pass that needs them, in pages of 2 MiB, or read from `kept`, where an earlier process has left them.

    Args:
        runner: of the decoder.
        num_layers: layers that are copied, from the first one on; passes end after them.
        kind: of the copies, `tiles.TILES_4` or `TILES_8`.
        with_head: whether its head is copied, too; only then it may be asked for one.
    """

    def __init__(self, runner: CompiledDecoder, num_layers: int, kind: int, *, with_head: bool) -> None:
        super().__init__(runner.decoder, runner.pool)
        self._num_layers, self._kind, self._with_head = num_layers, kind, with_head
        self._plain = False
        self._copies: tuple[list[LayerWeights], TileWeight | None] | None = None
        self.kept: KeptCopies | None = None

    @property
    def fits(self) -> bool:
        """Whether all of the matrices have whole tiles."""
        return all(TileWeight.fits(matrix.shape) for matrix in self.matrices())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the copies, made or not."""
        return sum(TileWeight.num_bytes(matrix.shape, self._kind) for matrix in self.matrices())

    @property
    def ready(self) -> bool:
        """Whether the copies are there, or were left by an earlier process."""
        return self._copies is not None or (self.kept is not None and self.kept.exists)

    @property
    def facts(self) -> tuple[object, ...]:
        """What the copies' bytes depend on, beside the weights."""
        return _COPIES_VERSION, self._kind, self._num_layers, self._with_head, str(self.dtype), repr(self.config)

    def matrices(self) -> list[Tensor]:
        """The weights that are copied."""
        layers = self.decoder.layer_weights()[: self._num_layers]
        return [getattr(w, name) for w in layers for name in _MATRICES] + [self.decoder.head_matrix] * self._with_head

    def _made(self) -> tuple[list[LayerWeights], TileWeight | None]:
        if self._copies is None:
            matrices = self.matrices()
            sizes = [TileWeight.num_bytes(matrix.shape, self._kind) for matrix in matrices]
            starts = [0, *accumulate(HugePages.num_bytes((size,), torch.uint8) for size in sizes)]
            room = HugePages(starts[-1]).zeros((starts[-1],), torch.uint8)
            parts = [room[start : start + size] for start, size in zip(starts, sizes, strict=False)]
            if self.kept is not None and self.kept.read_into(room.numpy().data):
                copies: list[Any] = [  # stand in for tensors
                    TileWeight(part.view(matrix.shape[0] // OUTPUTS, -1), self._kind, matrix.dtype)
                    for matrix, part in zip(matrices, parts, strict=True)
                ]
            else:
                copies = _coded(matrices, self._kind, parts)
                if self.kept is not None:
                    self.kept.write(room.numpy().data)
            count = len(_MATRICES)
            layers = [
                w._replace(**dict(zip(_MATRICES, copies[count * number : count * (number + 1)], strict=True)))
                for number, w in enumerate(self.decoder.layer_weights()[: self._num_layers])
            ]
            self._copies = layers, copies[-1] if self._with_head else None
        return self._copies

    def _layer_weights(self) -> Sequence[LayerWeights]:
        return self._made()[0]

    def part(self, sequences: Sequence[KvSequence], longest: int) -> Part:
        """The copied layers as a compiled call takes them, over these sequences of up to `longest` tokens."""
        from kernels.cpu_decode.drafts import Part

        return Part(self._layers(), self.decoder.rope.table(longest), page_tables(sequences))

    def _head_matrix(self) -> Any:
        head = self._made()[1]
        assert head is not None, "a copy without a head was asked for logits"
        return head


def _coded(matrices: Sequence[Tensor | BlockWeight], kind: int, parts: Sequence[Tensor]) -> list[TileWeight]:
    """Copies of matrices, put into memory uint8 of their sizes."""
    from kernels.cpu_decode.step import tiled, unpack

    copies = []
    for matrix, part in zip(matrices, parts, strict=True):
        dense = unpack(matrix) if isinstance(matrix, BlockWeight) else matrix.to_dense() if matrix.is_mkldnn else matrix
        copies.append(tiled(dense, kind, part))
    return copies


class CopiedBlocks:
    """Blocks of drafts by compiled calls; implements `draft.exit_copy.BlockRunner`.

    Args:
        first, own: copies of a target's first layers, and of a draft head's layers and head; layers of one shape.
        token_ids: [R] int64, what the head's rows stand for.
    """

    def __init__(self, first: CopiedDecoder, own: CopiedDecoder, token_ids: Tensor) -> None:
        self.first, self.own, self.token_ids = first, own, token_ids

    def __call__(
        self,
        sequences: Sequence[KvSequence],
        own: Sequence[KvSequence],
        last: Sequence[int],
        pending: Sequence[Tensor | None],
        lengths: Sequence[int],
        candidates: int,
        stopping: Stopping,
    ) -> Drafted:
        """See `draft.exit_copy.BlockRunner`. Raises PagesNotReserved."""
        from kernels.cpu_decode.drafts import Vocabulary, draft

        positions = [sequence.length for sequence in sequences]
        for sequence, own_sequence, start, length in zip(sequences, own, positions, lengths, strict=True):
            sequence.check_writable(start, start + length)
            own_sequence.check_writable(own_sequence.length, start + length)
        longest, decoder = max(positions) + max(lengths), self.own.decoder
        return draft(
            self.first.part(sequences, longest),
            self.own.part(own, longest),
            Vocabulary(self.first.decoder.embed_tokens.weight, decoder.output_norm, self.own._head_matrix(), self.token_ids),
            last,
            positions,
            pending,
            lengths,
            candidates,
            stopping,
        )


def exit_copy(target: Any, exit_layer: int, head: Any, token_ids: Tensor, *, deterministic: bool) -> ExitCopy | None:
    """Copies for drafts of a draft head, run by `head`, after the first exit_layer layers of a target, run by `target`; None where these are not
    compiled steps, a matrix has no whole tiles, or the target's are in few bits already, its embeddings among them."""
    if not (isinstance(target, CompiledDecoder) and isinstance(head, CompiledDecoder)):
        return None
    first, own = (
        CopiedDecoder(target, exit_layer, TILES_4, with_head=False),
        CopiedDecoder(head, head.config.num_layers, TILES_8, with_head=True),
    )
    in_blocks = isinstance(target.decoder.embed_tokens, BlockEmbedding) or any(
        isinstance(m, (BlockWeight, TileWeight)) for m in first.matrices()
    )
    if in_blocks or not (first.fits and own.fits):
        return None
    blocks = CopiedBlocks(first, own, token_ids) if target.decoder.layer_shapes[0] == head.decoder.layer_shapes[0] else None
    return ExitCopy(first, DraftHead(own, token_ids, own.pool, deterministic=deterministic), lambda: first.ready and own.ready, blocks)
