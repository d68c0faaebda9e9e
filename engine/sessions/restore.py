"""Coded spans back into a conversation's caches piece by piece, so that other requests run in between."""

from __future__ import annotations

from collections.abc import Sequence

from codec.references import Lent
from engine.runtime.request import SequenceState
from engine.sessions.file import Span
from engine.sessions.kv_codec import SessionCodec
from engine.sessions.stages import StageClock


class SpanRestore:
    """One restore (`SessionCodec.restore`), cut between spans. Before and after every piece the caches hold a beginning of the text, as behind a
    restore of so much: a conversation may be closed, cut or gone on with then. The caller holds the engine's lock during a piece.

    Args:
        codec: the engine's.
        conversation: its caches are empty or hold what comes before the spans.
        spans: without a gap.
        lent: as of `SessionCodec.restore`; the same spans, read. None: no span refers to another.
        leaves_head: as of `SessionCodec.restore`, for all of the text.
    """

    def __init__(
        self,
        codec: SessionCodec,
        conversation: SequenceState,
        spans: Sequence[Span],
        lent: Lent | None = None,
        *,
        leaves_head: bool = False,
    ) -> None:
        self.codec, self.conversation, self.spans, self.lent = codec, conversation, spans, lent
        self._leaves_head = leaves_head and codec.may_leave_head(spans[-1].end)
        self._done = 0  # spans that are back
        self._draft_end = 0  # tokens that a separate draft's first layers have run, where a restore leaves out the others

    @property
    def left(self) -> bool:
        """Whether a span is still to come."""
        return self._done < len(self.spans)

    def piece(self, tokens: int, clock: StageClock | None = None) -> int:
        """Bring back the next spans, up to `tokens` tokens of them but one at least; advances. Where the draft lies so far behind them that it has
        more to run, it runs `tokens` tokens and nothing else. Returns how many spans came.

        Raises the codec's errors and PoolExhausted; the caches may then hold anything, and must be given up.
        """
        codec, conversation = self.codec, self.conversation
        behind = codec.draft_end(conversation, self._draft_end)
        # what comes before the spans and is not there yet, the target runs as well: not here
        if behind is not None and conversation.sequence.length - behind > tokens:
            self._draft_end = codec.run_draft(conversation, behind, behind + tokens)
            return 0
        if not self._done and not conversation.sequence.windows:  # whose pages are taken pass by pass
            conversation.sequence.ensure(self.spans[-1].end)  # at once, so that they follow one another
        first, last = self._done, self._done + 1
        until = conversation.sequence.length + tokens
        while last < len(self.spans) and self.spans[last].end <= until:
            last += 1
        some, whole = self.spans[first:last], last - first == len(self.spans)
        lent = self.lent if whole or self.lent is None else self.lent.part(first, last)
        codec.restore(conversation, some, clock, lent, leaves_head=self._leaves_head, draft_end=self._draft_end)
        self._draft_end, self._done = some[-1].end, last
        return last - first
