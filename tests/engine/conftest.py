"""Tiny random models of every supported family, saved by transformers and loaded by our decoder."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from codec.pack import CodecPack
from draft.head_file import DraftHeadConfig, target_digest, write_draft_head
from engine.calibrate.recipe import quick_pack
from engine.model.decoder import Decoder, DecoderConfig, forward_reserved
from engine.runtime import memory
from engine.runtime.turns import Turns
from engine.sessions.codec_params import find_pack
from engine.sessions.rates import Rates

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-bias": {"attention_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "qwen2": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    # windows shorter than the tests' texts, on all layers, on the last, on every other and on two of three
    "mistral-window": {"sliding_window": 7, "head_dim": 16},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
    "gemma2": {
        "head_dim": 16,
        "sliding_window": 9,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 7.0,
    },
    "gemma3": {
        "head_dim": 16,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        },
    },
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": None},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "head_dim": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
    },
}
NEW_FAMILIES = (
    "mistral-window",
    "qwen2-window",
    "gemma2",
    "gemma3",
    "mixtral",
    "qwen3_moe",
)  # those that are not Llama's layers throughout
_CLASSES = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma2": "Gemma2Config",
    "gemma3": "Gemma3TextConfig",
    "mixtral": "MixtralConfig",
    "qwen3_moe": "Qwen3MoeConfig",
}
_SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 5,
}


@dataclass(frozen=True)
class TinyModel:
    """transformers' model (float32, eval), the folder it was saved to, and ours loaded from there."""

    reference: Any
    folder: Path
    decoder: Decoder

    @torch.inference_mode()
    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T, V] of transformers for one sequence [T]."""
        return self.reference(token_ids[None]).logits[0]


def tiny_config(family: str, **options: Any) -> Any:
    """A transformers config of the family, tiny."""
    config_class = getattr(transformers, _CLASSES[family.split("-")[0]])
    return config_class(**(_SHAPE | FAMILIES.get(family, {}) | options))


@pytest.fixture(autouse=torch.cuda.is_available())
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests in several processes share a GPU: each engine takes it for one of 4 GiB that nobody else uses."""
    measured = memory.device_memory
    monkeypatch.setattr(memory, "device_memory", lambda device: measured(device) and memory.DeviceMemory(4 << 30, 4 << 30))


@pytest.fixture(scope="session")
def hf_config() -> Callable[..., Any]:
    """`hf_config(family, **options)` -> a tiny transformers config."""
    return tiny_config


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """`tiny_model(family, **config options)` -> TinyModel, made once per session and set of options."""
    made: dict[str, TinyModel] = {}

    def make(family: str, **options: Any) -> TinyModel:
        key = f"{family} {sorted(options.items())}"
        if key not in made:
            torch.manual_seed(zlib.crc32(key.encode()))  # the same model whatever tests came before
            config = tiny_config(family, **options)
            # eager: the attention that caps scores in every version of transformers
            reference = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
            for parameter in reference.parameters():
                # large enough that attention is far from uniform; norms and biases away from 1 and 0
                noise = torch.randn_like(parameter.data)
                parameter.data = noise * 0.3 if parameter.dim() > 1 else parameter.data + 0.2 * noise
            folder = tmp_path_factory.mktemp("tiny")
            reference.save_pretrained(folder)
            made[key] = TinyModel(reference, folder, Decoder.from_pretrained(folder, dtype=torch.float32))
        return made[key]

    return make


@pytest.fixture(scope="session")
def random_decoder() -> Callable[..., Decoder]:
    """`random_decoder(seed, **config options)` -> a tiny Llama of ours, float32, with weights large enough to be sure of its tokens."""

    def make(seed: int, scale: float = 0.3, **options: Any) -> Decoder:
        config = DecoderConfig.from_hf(tiny_config("llama", **({"eos_token_id": None} | options)))
        decoder = Decoder.from_config(config, dtype=torch.float32, seed=seed)
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale / 0.02)
        return decoder

    return make


def _make_draft_head(
    folder: Path,
    target: Decoder,
    *,
    exit_layer: int = 2,
    layers: int = 1,
    size: int = 60,
    head: str = "own",
    bits: int = 8,
    noise: float = 0.1,
    state_layers: tuple[int, ...] = (),
) -> Path:
    """A draft head of the target's last layers and head, a little altered, so that some of its drafts are accepted. state_layers: of which states it
    joins; its rows are then little but embeddings, as an untrained state says what is known already."""
    generator = torch.Generator().manual_seed(size + layers)
    named, depth = {name: tensor.cpu() for name, tensor in target.hf_tensors().items()}, target.config.num_layers
    if target.config.norm_offset:  # a draft head stores what norms multiply by
        named = {name: tensor + 1 if "norm" in name else tensor for name, tensor in named.items()}
    ids = torch.randperm(target.config.vocab_size, generator=generator)[:size].sort().values
    tensors = {"token_ids": ids, "model.norm.weight": named["model.norm.weight"]}
    for i in range(layers):
        prefix = f"model.layers.{depth - layers + i}."
        for name, tensor in named.items():
            if name.startswith(prefix):
                altered = tensor * (1 + noise * torch.randn(tensor.shape, generator=generator)) if tensor.dim() > 1 else tensor
                tensors[f"model.layers.{i}.{name.removeprefix(prefix)}"] = altered
    if head == "own":
        tensors["lm_head.weight"] = named.get("lm_head.weight", named["model.embed_tokens.weight"])[ids]
    if state_layers:
        exit_layer, width = depth, target.config.hidden_size
        tensors |= {"state_norm.weight": torch.ones(width), "embed_norm.weight": torch.ones(width)}
        tensors["join.weight"] = torch.cat([torch.randn(width, width, generator=generator) * 0.02, torch.eye(width)], 1)
        if len(state_layers) > 1:
            tensors["fuse.weight"] = torch.randn(width, len(state_layers) * width, generator=generator) * 0.1
    digest = target_digest(target.config)
    config = DraftHeadConfig("tiny", digest, exit_layer, layers, size, head, bits, state_layers=state_layers)  # type: ignore[arg-type]
    write_draft_head(folder, config, tensors)
    return folder


@pytest.fixture(scope="session")
def make_draft_head() -> Callable[..., Path]:
    """`make_draft_head(folder, target, exit_layer=2, layers=1, size=60, head="own", bits=8, noise=0.1, state_layers=())` -> a draft head's folder for
    the target."""
    return _make_draft_head


def _naive_probabilities(logits: list[float], params: Any) -> list[float]:
    """One row's distribution, written from the filters' definitions without tensors."""
    if params.temperature == 0:
        return [float(i == logits.index(max(logits))) for i in range(len(logits))]
    weights = [math.exp(x / params.temperature) for x in logits]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    kept = order[: params.top_k] if params.top_k else order
    total, mass, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        if mass < params.top_p * total:
            nucleus.append(i)
        mass += weights[i]
    kept = [i for i in nucleus if weights[i] >= params.min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


@pytest.fixture(scope="session")
def naive_probabilities() -> Callable[[list[float], Any], list[float]]:
    """`naive_probabilities(logits, params)` -> the distribution that temperature, top-k, top-p and min-p define."""
    return _naive_probabilities


def _chi_square_p_value(observed: dict[Any, int], expected: dict[Any, float]) -> float:
    """p-value of counts against probabilities; cells expected fewer than 5 times are merged. Anything outside the support gives 0."""
    draws = sum(observed.values())
    if any(expected.get(cell, 0.0) <= 0 for cell in observed):
        return 0.0
    large = [cell for cell, p in expected.items() if p * draws >= 5]
    wanted = [expected[cell] * draws for cell in large]
    found = [float(observed.get(cell, 0)) for cell in large]
    rest = draws - sum(wanted)
    if rest >= 5:
        wanted.append(rest)
        found.append(draws - sum(found))
    statistic = sum((f - w) ** 2 / w for f, w in zip(found, wanted, strict=True))
    return float(stats.chi2.sf(statistic, len(wanted) - 1)) if len(wanted) > 1 else 1.0


@pytest.fixture(scope="session")
def chi_square_p_value() -> Callable[[dict[Any, int], dict[Any, float]], float]:
    """`chi_square_p_value(counts, probabilities)` -> p-value of the counts under the probabilities."""
    return _chi_square_p_value


@pytest.fixture(scope="session")
def check_sampled_text(naive_probabilities) -> Callable[..., None]:
    """`check_sampled_text(target, draft, draws, prompt=(1, 2), seen=(), **filters)`: three sampled tokens have the target's distribution, some drafts
    are refused. seen: texts of earlier requests that began with the prompt."""
    from engine.engine import Engine
    from engine.runtime.sampling import SamplingParams

    def check(
        target: Any, draft: Any, draws: int, *, prompt: Sequence[int] = (1, 2), seen: Sequence[Sequence[int]] = (), **filters: Any
    ) -> None:
        # without a seed, so that drafts are accepted and rejected; what would be fresh random keys are the same in every run
        params = [SamplingParams(**({"temperature": 1.0} | filters), max_new_tokens=3, draft_length=2)] * draws
        with mock.patch("secrets.randbits", side_effect=range(draws)):
            engine = Engine(target, draft=draft, page_size=8, max_batch=draws)
            for text in seen:
                engine.core.scheduler.drafting.end(text, len(prompt), "")
            results = engine.generate([list(prompt)] * draws, params)
        counts: dict[Any, int] = {}
        for r in results:
            counts[tuple(r.token_ids)] = counts.get(tuple(r.token_ids), 0) + 1

        def following(prefix: list[int]) -> Any:
            sequence = target.new_pool(1, 8).new_sequence()
            logits = forward_reserved(target, torch.tensor(prefix), [sequence], [len(prefix)], logits="last").logits
            return naive_probabilities(logits[0].double().tolist(), params[0])

        expected: dict[Any, float] = {(): 1.0}
        for _ in range(3):
            expected = {(*cell, t): p * q for cell, p in expected.items() if p > 0 for t, q in enumerate(following([*prompt, *cell]))}
        assert _chi_square_p_value(counts, expected) > 1e-3
        assert 0 < sum(r.speculation.accepted for r in results) < sum(r.speculation.proposed for r in results)

    return check


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class ChatFolders:
    """Model folders with one byte-level tokenizer: 256 bytes, then <|im_end|> (the end of a turn), <|endoftext|>, <|im_start|>."""

    target: Path
    draft: Path
    head: Path  # on an exit after one layer
    stranger: Path  # of the target's shape, other weights
    states: Path  # a draft head on the target's last states


def _byte_tokenizer(chat_template: str | None = CHATML) -> Any:
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    )
    wrapped.chat_template = chat_template
    return wrapped


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., Any]:
    """`byte_tokenizer(chat_template)` -> the tokenizer of `ChatFolders`, ChatML unless another template is given."""
    return _byte_tokenizer


@pytest.fixture(scope="session")
def chat_folders(tmp_path_factory: pytest.TempPathFactory) -> ChatFolders:
    """Tiny Llamas; the draft is the target's first two of four layers, a little altered: its drafts are accepted now and then, and its states say
    something about the target's KV, but not all."""
    root = tmp_path_factory.mktemp("chat")
    shape: dict[str, Any] = {"vocab_size": 264, "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 1024}
    weights: dict[str, torch.Tensor] = {}
    for name, layers, seed in (("target", 4, 1), ("draft", 2, 1), ("stranger", 4, 2)):
        torch.manual_seed(seed)
        config = tiny_config("llama", **shape, hidden_size=32, num_hidden_layers=layers, eos_token_id=256, tie_word_embeddings=True)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data = torch.randn_like(parameter.data) * 0.2
        if name == "target":
            for layer in model.model.layers[2:]:
                layer.self_attn.o_proj.weight.data *= 0.4
                layer.mlp.down_proj.weight.data *= 0.4
            weights = model.state_dict()
        elif name == "draft":
            model.load_state_dict({key: weights[key] * (1 + 0.2 * torch.randn_like(weights[key])) for key in model.state_dict()})
        model.save_pretrained(root / name)
        _byte_tokenizer().save_pretrained(root / name)
    decoder = Decoder.from_pretrained(root / "target", dtype=torch.float32)
    head = _make_draft_head(root / "head", decoder, exit_layer=1, size=200)
    states = _make_draft_head(root / "states", decoder, size=200, state_layers=(decoder.config.num_layers,))
    return ChatFolders(root / "target", root / "draft", head, root / "stranger", states)


_small_packs: dict[Any, CodecPack] = {}


def _small_pack(*models: Any, fingerprints: dict[str, str], recomputed_layers: int, **options: Any) -> CodecPack:
    """A quick pack from few tokens, fitted once for each pair, whatever cache folder (or none) a test has."""
    key = (tuple(sorted(fingerprints.items())), recomputed_layers)
    if key not in _small_packs:
        fit = partial(quick_pack, num_tokens=768, context=128, rank=48)
        _small_packs[key] = fit(*models, fingerprints=fingerprints, recomputed_layers=recomputed_layers, **options)
    return _small_packs[key]


def measured(rates: Rates) -> Callable[[Any], Generator[None, None, Rates]]:
    """What stands for `engine.sessions.rates.measure` and finds these."""

    def measure(codec: Any) -> Generator[None, None, Rates]:
        yield
        return rates

    return measure


@pytest.fixture(scope="session")
def pack_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own, where the tiny models' packs are fitted once, from few tokens."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORETOLD_HOME", str(home))
        patch.setattr("engine.sessions.codec_params.quick_pack", _small_pack)
        patch.setattr("engine.sessions.kv_codec.known_pack", find_pack)  # known before anybody asks, in whatever order tests run
        # restoring tiny models takes longer than recomputing them: measured rates would leave nothing to be decoded
        patch.setattr("engine.sessions.rates.measure", measured(Rates(0.0, 1e-6, 0.0, 1.0)))
        patch.setattr("engine.sessions.rates.SHORTEST", 0)
        yield home


@pytest.fixture(scope="session")
def chat_engine(chat_folders: ChatFolders, pack_home: Path) -> Callable[..., Any]:
    """`chat_engine(draft="draft"|"head"|"states"|"trunk"|"none"|"stranger", target="target", **options)` -> a new float32 Engine over
    `chat_folders`."""
    from engine.engine import Engine

    def make(draft: str = "draft", target: str = "target", **options: Any) -> Engine:
        source = getattr(chat_folders, draft, draft)
        options = {"device": "cpu", "dtype": "float32", "page_size": 16, "pool_tokens": 1 << 14} | options
        return Engine.from_pretrained(getattr(chat_folders, target), source, **options)

    return make


@pytest.fixture
def model_options(chat_folders, pack_home):
    """Options that name the tiny pair."""
    return ["--target", str(chat_folders.target), "--draft", str(chat_folders.draft), "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def let_others(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, Callable[[], object]], None]:
    """`let_others(core, act)`: until `monkeypatch.undo`, act() runs between two pieces of `EngineCore.in_turns`, where threads that wait for the
    engine's lock would, as long as requests are served."""

    def patch(core: Any, act: Callable[[], object]) -> None:
        in_turns, ended = core.in_turns, []

        def noted(pieces: Generator[None, None, Any]) -> Generator[None, None, Any]:
            with closing(pieces):
                while True:
                    try:
                        next(pieces)
                    except StopIteration as end:
                        return end.value
                    ended.append(True)
                    yield

        class Lock(Turns):
            def __exit__(self, *error: object) -> None:
                super().__exit__(*error)
                if ended and not self.mine:
                    ended.clear()
                    if not core.scheduler.idle:
                        act()

        monkeypatch.setattr(core, "lock", Lock())
        monkeypatch.setattr(core, "in_turns", lambda pieces: in_turns(noted(pieces)))

    return patch


@pytest.fixture
def all_coded(monkeypatch):
    """Sessions of a few tokens are coded to their last one, at every quality."""
    monkeypatch.setattr("engine.sessions.kv_codec._LAST_TOKENS", {})
