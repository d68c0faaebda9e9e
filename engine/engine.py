"""The library's front door: loads models, and generates text through an `EngineCore`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch

from draft.policy import CostModel
from engine.calibrate.channel_means import channel_means
from engine.config import EngineConfig, LoadedAs
from engine.errors import EmptyPrompt, InvalidOption
from engine.hub.cache import CacheFolder
from engine.hub.resolve import resolve_model, resolve_pair, resolve_target
from engine.inputs import shown
from engine.kv.formats import PLAIN, check_format
from engine.loading import (
    choose_device_map,
    choose_draft,
    quantized_blocks,
    read_sampling_defaults,
    remember_copies,
    remember_costs,
    remember_products,
)
from engine.model.config import DecoderConfig, read_config
from engine.model.decoder import Decoder
from engine.model.device import QUANTIZED, WEIGHTS, device_named, dtype_named, own_torch_modes
from engine.model.device_map import devices_named
from engine.runtime.core import EngineCore
from engine.runtime.drafters import Draft, as_source
from engine.runtime.request import GenerationResult, Request, StreamEvent
from engine.runtime.sampling import SamplingParams
from engine.sessions.session import AUTO, Session
from engine.store.prefix_cache import DEFAULT_NAMESPACE, PrefixCache
from engine.store.store import DEFAULT_LIMIT_BYTES, RunStore
from engine.text.decoder import TextDecoder
from engine.text.prompts import Prompt, as_prompts, encode_prompt, end_tokens
from engine.text.tokenizer import check_vocabularies, load_tokenizer


class Engine:
    """Generates text with a target and a source of drafts; `core` is what runs. Threads may share an engine: they take turns (docs/guarantees.md).

    A seed names one text, whatever drafts, draft length and batch (docs/guarantees.md). The automatic draft length rests on costs measured once
    (`core.cost_model`), after the first tokens, and remembered for a model that came from a folder;
    they are corrected while text is generated.

    Args:
        target: the model whose distribution is sampled.
        tokenizer: None allows token ids only.
        draft: a small model with the target's vocabulary, a number of the target's first layers (early exit), a loaded draft source, or None for
            no speculation.
        pool_tokens, page_size, max_batch, prefill_chunk, deterministic, costs, target_dir, pair, ngrams, prefix_sharing,
            gpu_memory_utilization, loaded_as: see `EngineConfig`.
        kv_cache_dtype: `EngineConfig.kv_cache_dtype`: "bf16" (the model's own), "q4", "q3" or "q2".
        draft_dir: where a draft model came from, for fingerprints.
        store: a folder that keeps prefixes for every process that names it (docs/store.md): what is known of a prompt comes back before it runs, what
            is new is kept behind the answer. store_bytes: what it may take on disk; store_memory: of it, bytes of coded pages that
            stay in host memory, too. namespace: whose prefixes are seen. quality, pack: how they are
            coded, as in `session`. log: told what the store has to say.

    Raises:
        InvalidOption: an early exit after more layers than the target has, or another bad option.
        BadStore, CacheNotWritable, DiskFull, PackMismatch: the store cannot be used.
    """

    def __init__(
        self,
        target: Decoder,
        tokenizer: Any | None = None,
        *,
        draft: Draft = None,
        pool_tokens: int | None = None,
        page_size: int = 64,
        max_batch: int = 64,
        prefill_chunk: int | None = None,
        deterministic: bool = False,
        kv_cache_dtype: str = PLAIN,
        costs: CostModel | None = None,
        target_dir: Path | None = None,
        draft_dir: Path | None = None,
        pair: str | None = None,
        store: str | Path | None = None,
        store_bytes: int = DEFAULT_LIMIT_BYTES,
        store_memory: int = 0,
        namespace: str = DEFAULT_NAMESPACE,
        quality: str = AUTO,
        pack: str | Path | None = None,
        log: Callable[[str], None] = print,
        ngrams: bool = True,
        prefix_sharing: bool = True,
        gpu_memory_utilization: float | None = None,
        loaded_as: LoadedAs | None = None,
    ) -> None:
        config = EngineConfig(
            pool_tokens,
            page_size,
            max_batch,
            prefill_chunk,
            deterministic,
            kv_cache_dtype,
            costs,
            target_dir,
            pair,
            ngrams,
            prefix_sharing,
            gpu_memory_utilization,
            loaded_as,
        )
        check_format(kv_cache_dtype, target.config.head_dim)
        self.core = EngineCore(
            target,
            as_source(draft, draft_dir),
            config,
            text=TextDecoder(tokenizer),
            eos_token_ids=end_tokens(target.config.eos_token_ids, tokenizer),
            sampling_defaults=read_sampling_defaults(target_dir),
            kv_means=None if kv_cache_dtype == PLAIN else channel_means(target, tokenizer, target_dir),
        )
        if target_dir is not None:
            remember_costs(self.core)
            remember_copies(self.core)
        self.prefix_cache: PrefixCache | None = None
        if store is not None:
            opened = RunStore(store, store_bytes)
            try:
                cache = PrefixCache(self.core, opened, namespace=namespace, quality=quality, pack=pack, log=log, memory_bytes=store_memory)
            except BaseException:
                opened.close()
                raise
            self.prefix_cache = cache.attach()

    @classmethod
    def from_pretrained(
        cls,
        target: str | Path,
        draft: str | Path | None = "none",
        *,
        device: str | torch.device = "auto",
        devices: str | Sequence[str | torch.device] | None = None,
        dtype: str | torch.dtype = "auto",
        exit_layer: int | None = None,
        weights: str = "auto",
        **options: Any,
    ) -> Engine:
        """Load models. target: folder, GGUF file or hub id (`resolve_model`); draft: the same, the folder of a draft head, "trunk" (the draft head that
        ships for a target of this shape, else an early exit from its own first layers, untrained), "ngram" (each request's own text), or "none" (None
        too).

        device: "auto", "cpu", "cuda", "cuda:1". devices: "cuda:0,cuda:1", or a list: the target's layers are spread over them
        (`engine.model.device_map`); None: over all GPUs where the target is larger than one, unless `device` has a number. dtype: "auto"
        (bfloat16), "bfloat16", "float32". exit_layer: early exit after so many layers, untrained. weights: "auto" (in the dtype), or "quantized":
        those of a target in a GGUF file stay in its blocks of 4 or 8 bits (Q8_0, Q4_0,
        Q4_1; other formats become bfloat16), on a CPU. options: see the constructor.

        Raises:
            ModelNotFound, DownloadFailed, UnsupportedArchitecture, VocabularyMismatch, BadDraftHead, InvalidOption.
        """
        kind, draft = dtype_named(dtype), "none" if draft is None else draft
        named = None if devices is None else devices_named(devices)
        if named is not None and device != "auto":
            raise InvalidOption("device and devices both say where the models go", "give one of them")
        where = device_named(device) if named is None else named[0]
        if weights not in WEIGHTS:
            raise InvalidOption(f"unknown kind of weights {shown(weights)}", f"use {' or '.join(WEIGHTS)}")
        blocks = quantized_blocks(target, kind, where) if weights == QUANTIZED else None
        target_dir = resolve_model(target)
        # first: the tokenizer of a model we do not run may fail to load in ways of its own
        target_config = DecoderConfig.from_hf(read_config(target_dir))
        choice = choose_draft(draft, target_config, exit_layer)
        device_map = choose_device_map(target_config, kind, where, named, options.get("gpu_memory_utilization"), choice)
        if device_map is not None and blocks is not None:
            raise InvalidOption("quantised weights lie on one device", "leave out --devices, or --weights")
        if choice.model is not None:
            DecoderConfig.from_hf(read_config(choice.model))
        if blocks is None:
            remember_products(kind, where)
        remembered = CacheFolder("tokenizers")
        tokenizer = load_tokenizer(target_dir, remembered)
        if choice.model is not None:
            check_vocabularies(tokenizer, load_tokenizer(choice.model, remembered))
        with own_torch_modes():
            with nullcontext() if blocks is None else closing(blocks):
                decoder = Decoder.from_pretrained(target_dir, dtype=kind, device=where, blocks=blocks, device_map=device_map)
            loaded_as = LoadedAs(
                target=str(target if blocks is not None else target_dir.absolute()),
                draft=str((choice.model or choice.head or Path(draft)) if choice.exit_layer is None else draft),
                dtype=str(kind).removeprefix("torch."),
                exit_layer=choice.exit_layer,
                weights=weights,
            )
            return cls(decoder, tokenizer, draft=choice.load(decoder), target_dir=target_dir, loaded_as=loaded_as, **options)

    @classmethod
    def from_pair(cls, name: str, *, progress: Any | None = None, draft: str | Path | None = None, **options: Any) -> Engine:
        """Load a known pair, fetched on first use. draft: another draft than the pair's own, which is not fetched then; options: see
        `from_pretrained`.

        Raises:
            UnknownPair, DownloadFailed, HashMismatch, DiskFull, and what `from_pretrained` raises.
        """
        if draft is not None:
            return cls.from_pretrained(resolve_target(name, progress), draft, pair=name, **options)
        paths = resolve_pair(name, progress)
        return cls.from_pretrained(paths.target_dir, paths.draft, pair=name, **options)

    @property
    def tokenizer(self) -> Any | None:
        """The target's; None where only token ids are given."""
        return self.core.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the models lie."""
        return self.core.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of KV pages in the model's own format."""
        return self.core.dtype

    @property
    def context(self) -> int:
        """Most tokens a request may have, prompt and new ones together."""
        return self.core.context

    @property
    def drafter_name(self) -> str:
        """The source of drafts, for reports."""
        return self.core.drafter_name

    def flush(self) -> None:
        """Wait until the store has kept what was generated so far; nothing without a store. At the process's end this happens by itself."""
        if self.prefix_cache is not None:
            self.prefix_cache.flush()

    def close(self) -> None:
        """`flush`, and give the store back; the engine goes on without it."""
        if self.prefix_cache is not None:
            self.prefix_cache.close()

    def memory(self) -> dict[str, int]:
        """Bytes held: target_bytes and draft_bytes of weights, pool_bytes of both KV pools as they are now."""
        return self.core.memory()

    def encode(self, prompt: Prompt, *, continue_final_message: bool | None = None) -> list[int]:
        """Token ids of a prompt: text as it is, chat messages through the model's template. Raises EmptyPrompt, InvalidOption, PromptTooLong.

        continue_final_message: the last message goes on instead of being closed; None: if it is the assistant's.
        """
        return encode_prompt(self.tokenizer, prompt, self.context, continue_final_message=continue_final_message)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        continue_final_message: bool | None = None,
    ) -> list[GenerationResult]:
        """Continue prompts (texts, lists of token ids, or lists of chat messages) as one batch of ragged requests; results in order.

        params: one for all (also the same seed for all), or one per prompt; None: as the model's generation_config.json says, else greedy.
        continue_final_message: see `encode`; the result's text is what comes after
        the message.

        Raises:
            EmptyPrompt, PromptTooLong, InvalidOption, PoolExhausted: before or while generating; nothing stays behind.
        """
        given = as_prompts(prompts)
        if not given:
            raise EmptyPrompt("there is no prompt", "give at least one")
        if params is None or isinstance(params, SamplingParams):
            each = [params or self.core.sampling_defaults.params()] * len(given)
        elif isinstance(params, (list, tuple)) and all(isinstance(own, SamplingParams) for own in params):
            each = list(params)
        else:
            raise InvalidOption(f"sampling parameters are {shown(params)}", "give SamplingParams(...), or a list of them")
        if len(each) != len(given):
            raise InvalidOption(
                f"{len(each)} sampling parameters were given for {len(given)} prompts", "give one for all, or one per prompt"
            )
        ids = [self.encode(prompt, continue_final_message=continue_final_message) for prompt in given]
        rows = [self.core.check_tokens(tokens) for tokens in ids]
        requests: list[Request] = []
        with self.core.lock:  # for the whole batch, so that it is served as if nobody else were there
            try:
                for tokens, own, row in zip(ids, each, rows, strict=True):
                    requests.append(self.core.submit(self.core.open_sequence_state(), tokens, own, owns_cache=True, row=row))
                return [self.core.finish(request) for request in requests]
            except BaseException:
                for request in requests:
                    self.core.abandon(request)
                raise

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, continue_final_message: bool | None = None
    ) -> Iterator[StreamEvent]:
        """Continue one prompt, yielding text as it is accepted; the last event has finish_reason and result. continue_final_message: see `encode`.

        Closing the iterator ends the request. Raises as `generate`; a bad prompt is refused here, before the first event is asked for.
        """
        if params is not None and not isinstance(params, SamplingParams):
            raise InvalidOption(f"sampling parameters are {shown(params)}", "give SamplingParams(...)")
        tokens = self.encode(prompt, continue_final_message=continue_final_message)
        row = self.core.check_tokens(tokens)

        def events() -> Iterator[StreamEvent]:
            with self.core.lock:
                own = params or self.core.sampling_defaults.params()
                request = self.core.submit(self.core.open_sequence_state(), tokens, own, owns_cache=True, row=row)
            yield from self.core.events(request)

        return events()

    def session(
        self,
        file: str | Path | None = None,
        *,
        quality: str | None = None,
        pack: str | Path | None = None,
        restore: str = "auto",
        log: Callable[[str], None] = print,
    ) -> Session:
        """A conversation that can be suspended to a file; with `file`, one resumed from it. See `engine.sessions.session.Session`.

        quality: "auto", "near-lossless", "balanced", "compact", "tiny" or "tokens" (default: the file's own, else "auto": what comes back fastest on
        this machine). pack: a codec pack's file (default: the pair's own, fitted when tokens are coded). restore: "auto", "decode" or "recompute".

        Raises:
            BadSessionFile and its kinds, PackMismatch, InvalidOption.
        """
        return Session(self.core, quality=quality, pack=pack, file=file, restore=restore, log=log)
