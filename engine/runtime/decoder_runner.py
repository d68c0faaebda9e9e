"""What runners of a decoder's passes have in common."""

from __future__ import annotations

import torch

from engine.model.decoder import Decoder
from engine.model.forward_pass import PassRunner


class DecoderRunner(PassRunner):
    """A runner of a decoder's passes: the decoder, and the attributes that `draft.protocols.CausalDecoder` asks of it."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.config = decoder, decoder.config

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.decoder.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.decoder.weight_bytes

    @property
    def num_threads(self) -> int:
        """CPU threads that a pass uses."""
        return self.decoder.num_threads

    @property
    def follows_tables(self) -> bool:
        """Whether passes of few tokens read a sequence's pages wherever they lie."""
        return self.decoder.follows_tables

    @property
    def captured_rows(self) -> int | None:
        """New tokens up to which passes are captured; None: none is."""
        return None
