"""What a model writes by itself: conversations drawn from it in large batches, to train a draft on.

Given only a chat template's opening, a model writes a user's message; when it ends its turn, the template's next marker is put in and it
answers (the idea of Magpie, Xu et al., 2024, arXiv 2406.08464). Some conversations may begin with a message that is given instead. Every row of
the batch holds one conversation and starts a new one when it is over, so no row idles.
A step reads nothing back, and on a GPU it is one CUDA graph: the rows' lengths, turns and temperatures live on the device.

Axes: B rows, V vocabulary, T context, S steps of a round, P given messages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.errors import InvalidOption
from engine.model.attention import DeviceBatch, TritonBackend
from engine.model.decoder import Decoder
from engine.text.chat_opening import ChatOpening
from engine.train.documents import TokenDocuments

ROUND_STEPS = 64  # steps between two looks at the clock
PAGE_SIZE = 64
MIN_OWN_TOKENS = 16  # shorter pieces of unfinished conversations are dropped
_ANSWER, _FINISHED = 1, 2  # bits of a recorded token's flags


@dataclass(frozen=True)
class SelfGenerationOptions:
    """rows: conversations at a time. context: tokens of the longest conversation. temperatures: drawn uniformly between these for each
    conversation. answer_temperature: for answers, instead of the conversation's (0: greedy). given_share: conversations that begin with one of the
    given messages, where there are any."""

    rows: int = 2048
    context: int = 512
    temperatures: tuple[float, float] = (0.6, 1.0)
    answer_temperature: float | None = None
    given_share: float = 0.5
    seed: int = 0


class SelfGenerationSampler:
    """Rows of conversations that go on from round to round; draws from the device's global generator.

    Sampling is Gumbel's: the largest of logits - T log(E), E exponential, follows softmax(logits / T), and is the largest logit for T = 0.
    What is not drawn is put in from a script: number 0 is the template's closing, the others a given message and the closing after it.

    Args:
        given: token ids of users' messages; those that leave less than half of the context to the answer are cut.

    Raises:
        InvalidOption: an option out of range, a template that leaves no room in the context, or given messages without a template.
    """

    def __init__(self, decoder: Decoder, chat: ChatOpening, options: SelfGenerationOptions, given: Sequence[Sequence[int]] = ()) -> None:
        low, high = options.temperatures
        if options.rows < 1 or not 0 <= low <= high or not 0 <= options.given_share <= 1:
            what = f"{options.rows} conversations at temperatures {low} to {high}, {options.given_share} of them given"
            raise InvalidOption(what, "use at least 1, 0 <= lowest <= highest, and a share from 0 to 1")
        if given and not chat.closing:
            raise InvalidOption("a model without a chat template answers no messages", "train on text instead")
        context = min(options.context, decoder.config.max_position_embeddings) // PAGE_SIZE * PAGE_SIZE
        if context < len(chat.opening) + len(chat.closing) + MIN_OWN_TOKENS:
            raise InvalidOption(f"a context of {options.context} tokens leaves no room behind the chat template", "use a longer one")
        self.decoder, self.chat, self.options, self.context = decoder, chat, options, context
        self.captured = False
        self._graph: torch.cuda.CUDAGraph | None = None
        rows, device = options.rows, decoder.device
        pool = decoder.new_pool(rows * context // PAGE_SIZE, PAGE_SIZE)
        backend = decoder.attention_backend(pool, kernels=True)
        assert isinstance(backend, TritonBackend)
        self._backend = backend
        self._first_slot = torch.arange(rows, device=device) * context
        self._table = torch.arange(rows * context // PAGE_SIZE, dtype=torch.int32, device=device).view(rows, -1)
        self._ones = torch.ones(rows, dtype=torch.int32, device=device)
        self._angles = [rope.slice(0, context) for rope in backend.ropes]
        self._ends = torch.zeros(decoder.config.vocab_size, dtype=torch.bool, device=device)
        self._ends[list(chat.ends)] = True
        self._turn_ends = self._ends.clone()  # of a user's message: the template's own marker as well
        self._turn_ends[list(chat.closing[:1])] = True
        longest = max(1, context // 2 - len(chat.opening) - len(chat.closing))
        scripts = [list(chat.closing or (0,)), *([*message[:longest], *chat.closing] for message in given)]
        self._script_lengths = torch.tensor([len(script) for script in scripts], device=device)
        self._scripts = torch.zeros(len(scripts), int(self._script_lengths.max()), dtype=torch.int64)
        for number, script in enumerate(scripts):
            self._scripts[number, : len(script)] = torch.tensor(script)
        self._scripts = self._scripts.to(device)
        self._num_given = len(given)
        self._turn_end = chat.closing[0] if chat.closing else 0
        # state of the rows: next token to run and its position, script and place in it (-1: none), whether in an answer, temperature
        self._tokens = torch.full((rows,), chat.opening[-1], device=device)
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._script = torch.zeros(rows, dtype=torch.int64, device=device)
        self._place = torch.full((rows,), -1, device=device)
        self._answering = torch.full((rows,), not chat.closing, device=device)
        self._temperature = torch.zeros(rows, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._said = torch.zeros(ROUND_STEPS, rows, dtype=torch.int32, device=device)
        self._flags = torch.zeros(ROUND_STEPS, rows, dtype=torch.uint8, device=device)
        self._open_all()

    def _open_all(self) -> None:
        """Write the opening's keys and values into every row once; a new conversation only goes back behind them."""
        for position, token in enumerate(self.chat.opening[:-1]):
            self._lengths.fill_(position)
            self._run(torch.full_like(self._tokens, token))
        self._lengths.fill_(len(self.chat.opening) - 1)
        self._temperature.copy_(self._fresh_temperatures())
        if self._num_given:
            script, place = self._fresh_scripts()
            self._script.copy_(script)
            self._place.copy_(place)

    def _fresh_scripts(self) -> tuple[Tensor, Tensor]:
        """What each row would begin a conversation with: a given message (script, place 0), or nothing (0, place -1)."""
        chosen = torch.rand_like(self._temperature)
        share = self.options.given_share
        taken = chosen < share
        script = (chosen / max(share, 1e-9) * self._num_given).long().clamp_max(self._num_given - 1) + 1
        return script.masked_fill(~taken, 0), taken.long() - 1

    def _fresh_temperatures(self) -> Tensor:
        low, high = self.options.temperatures
        return torch.rand_like(self._temperature) * (high - low) + low

    def _run(self, tokens: Tensor) -> Tensor:
        at = self._lengths
        self._backend.batch = DeviceBatch(
            angles=tuple((cos[at], sin[at]) for cos, sin in self._angles),
            slots=self._first_slot + at,
            page_table=self._table,
            query_lens=self._ones,
            context_lens=(at + 1).int(),
            max_query_len=1,
        )
        return self.decoder.decode(tokens, self._backend)

    def _advance(self) -> None:
        """Every row says one token more. No operation here takes a host number as a tensor: its copy could not be captured."""
        logits = self._run(self._tokens)
        temperature, fixed = self._temperature, self.options.answer_temperature
        if fixed is not None:
            temperature = temperature.masked_fill(self._answering, fixed)
        noise = torch.empty_like(logits).exponential_().log_()
        said = logits.addcmul_(noise, temperature[:, None], value=-1.0).argmax(-1)
        placing = self._place >= 0
        said = torch.where(placing, self._scripts[self._script, self._place.clamp_min(0)], said)
        asked = self._turn_ends[said] & ~placing & ~self._answering
        said = said.masked_fill(asked, self._turn_end)
        finished = (self._ends[said] & self._answering) | (self._lengths + 2 >= self.context)
        script = self._script.masked_fill(asked, 0)
        # the first token of the closing is the one that was just said
        place = (self._place + 1).masked_fill(asked, 1).masked_fill(~(placing | asked), -1)
        answer_begins = place == self._script_lengths[script]
        self._said.index_copy_(0, self._step, said.int()[None])
        flags = self._answering.to(torch.uint8) * _ANSWER + finished.to(torch.uint8) * _FINISHED
        self._flags.index_copy_(0, self._step, flags[None])
        self._step.add_(1)
        self._tokens.copy_(said.masked_fill(finished, self.chat.opening[-1]))
        self._lengths.copy_((self._lengths + 1).masked_fill(finished, len(self.chat.opening) - 1))
        if self.chat.closing:
            place = place.masked_fill(finished | answer_begins, -1)
            self._answering.copy_((self._answering | answer_begins) & ~finished)
            if self._num_given:
                fresh, begin = self._fresh_scripts()
                script, place = torch.where(finished, fresh, script), torch.where(finished, begin, place)
            self._script.copy_(script)
            self._place.copy_(place)
        self._temperature.copy_(torch.where(finished, self._fresh_temperatures(), self._temperature))

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._advance()  # compiles what is to be captured, and is a step like any other
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance()
        self._graph = graph
        self.captured = True

    def round(self) -> tuple[np.ndarray, np.ndarray]:
        """ROUND_STEPS more tokens of every row: (tokens int32 [S, B], flags uint8 [S, B])."""
        self._step.zero_()
        steps = ROUND_STEPS
        if self._graph is None and self.decoder.device.type == "cuda":
            self._capture()
            steps -= 1  # the one before the capture; capturing itself runs nothing
        for _ in range(steps):
            if self._graph is not None:
                self._graph.replay()
            else:
                self._advance()
        return self._said.cpu().numpy(), self._flags.cpu().numpy()


@torch.no_grad()
def draw(
    decoder: Decoder,
    chat: ChatOpening,
    options: SelfGenerationOptions,
    *,
    given: Sequence[Sequence[int]] = (),
    tokens: int | None = None,
    seconds: float | None = None,
    log: Callable[[str], None] | None = None,
) -> TokenDocuments:
    """Conversations of the model with itself, in rounds until `tokens` are drawn or `seconds` have passed (whichever is given and first).

    The same seed, options and number of tokens give the same documents on the same device. Conversations that are not over at the end are kept
    as far as they got.

    Raises:
        InvalidOption: neither limit is given; see also `SelfGenerationSampler`.
    """
    if tokens is None and seconds is None:
        raise InvalidOption("sampling without end", "give a number of tokens or of seconds")
    started = time.monotonic()
    devices = [decoder.device] if decoder.device.type == "cuda" else []
    rounds: list[tuple[np.ndarray, np.ndarray]] = []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(options.seed)  # the device's own generator: the one whose state a CUDA graph carries on
        sampler = SelfGenerationSampler(decoder, chat, options, given)
        ready, drawn, shown = time.monotonic(), 0, started
        while (tokens is None or drawn < tokens) and (seconds is None or not rounds or time.monotonic() - started < seconds):
            rounds.append(tuple(part.copy() for part in sampler.round()))  # type: ignore[arg-type]
            drawn += ROUND_STEPS * options.rows
            if log is not None and time.monotonic() - shown > 10:
                shown = time.monotonic()
                log(f"sampled {drawn:,} tokens, {drawn / (shown - ready):,.0f} tokens/s")
    rate = drawn / (time.monotonic() - ready)
    facts = {
        "rows": options.rows,
        "context": sampler.context,
        "temperatures": list(options.temperatures),
        "seed": options.seed,
        "answer_temperature": options.answer_temperature,
        "drawn_tokens": drawn,
        "tokens_per_s": round(rate),
        "cuda_graph": sampler.captured,
        "seconds": round(time.monotonic() - started, 1),
        "given_messages": len(given),
        "given_share": options.given_share if given else 0.0,
    }
    return assemble(chat, np.concatenate([said for said, _ in rounds]), np.concatenate([flags for _, flags in rounds]), facts)


def assemble(chat: ChatOpening, said: np.ndarray, flags: np.ndarray, facts: dict) -> TokenDocuments:
    """Documents from the recorded tokens and flags, each [S, B]: every row is cut where a conversation was over, and the opening put before."""
    documents, starts, answers = [], [], []
    opening = np.asarray(chat.opening, said.dtype)
    for tokens, bits in zip(np.ascontiguousarray(said.T), np.ascontiguousarray(flags.T), strict=True):
        cuts = np.flatnonzero(bits & _FINISHED) + 1
        begins = np.concatenate([[0], cuts])
        for begin, end in zip(begins, np.append(cuts, len(tokens)), strict=True):
            over = end > begin and bits[end - 1] & _FINISHED
            if end - begin < (1 if over else MIN_OWN_TOKENS):
                continue
            answer = np.flatnonzero(bits[begin:end] & _ANSWER)
            documents.append(np.concatenate([opening, tokens[begin:end]]))
            starts.append(len(opening))
            answers.append(len(opening) + (int(answer[0]) if len(answer) else int(end - begin)))
    return TokenDocuments.of(documents, starts, answers, facts)
