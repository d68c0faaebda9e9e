"""A draft head on disk: the layers, norm and head that run on a target's hidden states after its first m layers.

A folder with `config.json` (`DraftHeadConfig`), `adapter.safetensors` (the tensors, and a digest over them and the config), optionally
`pack.safetensors` (a codec pack of the pair) and `README.md` (the model card).

Tensors: "token_ids" int32 [R], the ids of the reduced vocabulary in the target's, ascending; each own layer under its Hugging Face name,
"model.layers.{i}.self_attn.q_proj.weight" and so on with i from 0; "model.norm.weight" [E]; "lm_head.weight" [R, E] when the head is the
draft head's own (a tied one is the target's head at token_ids). A head that joins the target's last states with embeddings (`draft.state_join`) has
"state_norm.weight" and "embed_norm.weight" [E], "join.weight" [E, 2E] and, for k > 1 layers' states, "fuse.weight" [E, kE].
In 8 bits a matrix "name" is int8 [out, in] with "name.scale" float16
[out, ceil(in / 64)]: symmetric, rounded to nearest, one scale for each 64 inputs. In 16 bits it is bfloat16. Vectors are float32.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save as serialised
from torch import Tensor

from draft.errors import CorruptedDraftHead, DraftHeadMismatch, DraftHeadNotFound, ForeignDraftHead, NewerDraftHead
from kernels.files import write_atomically, write_bytes

FORMAT, VERSION = "foretold-trunk-adapter", 2  # 1 where no states are joined
CONFIG_FILE, TENSOR_FILE, PACK_FILE = "config.json", "adapter.safetensors", "pack.safetensors"
TOKEN_IDS, NORM, HEAD = "token_ids", "model.norm.weight", "lm_head.weight"
STATE_NORM, EMBED_NORM, JOIN, FUSE = "state_norm.weight", "embed_norm.weight", "join.weight", "fuse.weight"
GROUP = 64  # inputs that share a scale
SCALE = ".scale"
# fields under the names that files and reports made earlier have for them
_FILE_KEYS = {"exit_layer": "trunk_layers", "draft_layers": "own_layers"}
_STATE_KEYS = ("state_layers", "unroll", "unroll_weight")  # which other heads' digests and reports do not have
_BLOCK_ELEMENTS = 1 << 17
_MAX_CONFIG_BYTES = 16 << 20
_REMEDY = "copy the draft head's folder again, or train one with scripts/train_draft.py"
# what the layers of a draft head have in common with the target's
_FACTS = (
    "architecture",
    "num_layers",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
    "qkv_bias",
    "o_bias",
    "qk_norm",
)


@dataclass(frozen=True)
class DraftHeadConfig:
    """What `config.json` says of a draft head.

    target: name of the model it was trained for. target_fingerprint_config: `target_digest` of that model's config. exit_layer: m.
    num_layers: n, own layers. vocab_size: R. head: "own" or "tied" (to the target's). bits: 8 or 16, of the stored matrices. training: facts and
    figures of the training, for reports only. state_layers: numbers of the target's layers whose states of the token before are joined with a token's
    embedding, ascending, exit_layer (the target's last) at the end; () where the own layers go on from a token's state at the exit. digest: SHA-256 of
    the draft head as stored, "" before it was (not in the file).
    """

    target: str
    target_fingerprint_config: str
    exit_layer: int
    num_layers: int
    vocab_size: int
    head: Literal["own", "tied"]
    bits: Literal[8, 16] = 8
    training: dict[str, Any] = field(default_factory=dict)
    state_layers: tuple[int, ...] = ()
    digest: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        counts = {"trunk_layers": self.exit_layer, "num_layers": self.num_layers, "vocab_size": self.vocab_size}
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 31:
                raise ForeignDraftHead(f"a draft head with {name} {value!r}", "give a whole number from 1 on")
        if not all(isinstance(text, str) for text in (self.target, self.target_fingerprint_config)) or not isinstance(self.training, dict):
            raise ForeignDraftHead("a draft head without the name and digest of its target", "give both, as texts")
        if self.head not in ("own", "tied") or type(self.bits) is not int or self.bits not in (8, 16):
            raise ForeignDraftHead(f"a draft head with head {self.head!r} in {self.bits!r} bits", 'use "own" or "tied", 8 or 16')
        layers = self.state_layers
        if not isinstance(layers, list | tuple) or any(type(layer) is not int for layer in layers):
            raise ForeignDraftHead(f"a draft head on the states after {layers!r} layers", "give whole numbers")
        object.__setattr__(self, "state_layers", tuple(layers))  # a file has a list
        if layers and not (layers[0] > 0 and all(a < b for a, b in pairwise(layers)) and layers[-1] == self.exit_layer):
            what = f"a draft head on the states after {list(layers)} layers, with exit layer {self.exit_layer}"
            raise ForeignDraftHead(what, "give them in order, from 1 on, the exit layer last")

    def join_elements(self, size: int) -> int:
        """Numbers in the tensors that join the states of a target of this hidden size."""
        count = len(self.state_layers)
        return (2 * size + 2 * size**2 + (count > 1) * count * size**2) if count else 0

    def check_target(self, config: Any) -> None:
        """DraftHeadMismatch unless `config` (a decoder's) has the shape of the target the draft head was trained for."""
        elsewhere = bool(self.state_layers) and self.exit_layer != config.num_layers
        if self.target_fingerprint_config != target_digest(config) or elsewhere:
            raise DraftHeadMismatch(
                f"the draft head was trained for another model, {self.target}", "use it with that one, or --draft trunk"
            )


def file_fields(facts: Any) -> dict[str, Any]:
    """A dataclass's fields by the keys that draft heads' configs, checkpoints and reports have for them; without those of heads on states in others."""
    found = {_FILE_KEYS.get(name, name): value for name, value in asdict(facts).items()}
    return found if getattr(facts, "state_layers", ()) else {name: value for name, value in found.items() if name not in _STATE_KEYS}


def target_digest(config: Any) -> str:
    """SHA-256 (hex) over the sizes and options in a decoder's config that a draft head depends on; fine-tuned models of one shape agree."""
    facts = {name: getattr(config, name) for name in _FACTS} | {"rope_theta": config.rope.theta} | getattr(config, "traits", {})
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_draft_head(
    folder: str | Path, config: DraftHeadConfig, tensors: Mapping[str, Tensor], bits: Literal[8, 16] | None = None
) -> DraftHeadConfig:
    """Write the folder's config.json and adapter.safetensors, each whole or not at all.

    tensors: as in the module's description, matrices and vectors in any float type, not quantised. bits: instead of config.bits.
    Returns the config with the bits and digest that were written. Raises CorruptedDraftHead when tensors and config do not fit each other.
    """
    folder = Path(folder)
    config = replace(config, bits=config.bits if bits is None else bits)
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        if name == TOKEN_IDS:
            stored[name] = tensor.to(torch.int32)
        elif tensor.dim() < 2:
            stored[name] = tensor.float()
        elif config.bits == 16:
            stored[name] = tensor.bfloat16()
        else:
            stored[name], stored[name + SCALE] = quantise(tensor)
    stored = {name: tensor.contiguous() for name, tensor in stored.items()}
    _check(config, stored, folder)
    config = replace(config, digest=_digest(config, stored))
    folder.mkdir(parents=True, exist_ok=True)
    texts = {key: value for key, value in file_fields(config).items() if key != "digest"}
    write_bytes(folder / TENSOR_FILE, serialised(stored, {"format": FORMAT, "digest": config.digest}))
    text = json.dumps({"format": FORMAT, "version": VERSION if config.state_layers else 1} | texts, indent=2) + "\n"
    write_atomically(folder / CONFIG_FILE, text)
    return config


def read_draft_head(folder: str | Path) -> tuple[DraftHeadConfig, dict[str, Tensor]]:
    """The folder's config, and its tensors as `write_draft_head` took them, quantised ones as float32.

    Raises:
        DraftHeadNotFound, CorruptedDraftHead, ForeignDraftHead, NewerDraftHead.
    """
    config, stored = open_draft_head(folder)
    plain = {name: tensor for name, tensor in stored.items() if not name.endswith(SCALE)}
    return config, {n: dequantise(t, stored[n + SCALE]) if n + SCALE in stored else t for n, t in plain.items()}


def read_draft_head_tensor(stored: Mapping[str, Tensor], name: str, place: Tensor) -> None:
    """Put a tensor of `open_draft_head` into `place`, of its shape and any float dtype, in blocks of rows that stay in a core's cache."""
    tensor, scale = stored[name], stored.get(name + SCALE)
    if scale is None:
        place.copy_(tensor)
        return
    rows = max(1, _BLOCK_ELEMENTS // max(1, tensor.shape[1]))
    for start in range(0, tensor.shape[0], rows):
        place[start : start + rows] = dequantise(tensor[start : start + rows], scale[start : start + rows])


def open_draft_head(folder: str | Path) -> tuple[DraftHeadConfig, dict[str, Tensor]]:
    """The folder's config and its tensors as they are stored, checked against each other and the digest.

    Raises:
        DraftHeadNotFound, CorruptedDraftHead, ForeignDraftHead, NewerDraftHead.
    """
    config = read_config(folder)
    path = Path(folder) / TENSOR_FILE
    if not _is_file(path):
        raise DraftHeadNotFound(f"there is no {path}", _REMEDY)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:  # the library has errors of many types for headers and for dtypes it cannot turn into tensors
        raise CorruptedDraftHead(f"the draft head {path} cannot be read: {error}", _REMEDY) from error
    if metadata.get("format") != FORMAT:
        raise ForeignDraftHead(f"{path} is not a draft head", "check the path")
    config = replace(config, digest=_digest(config, stored))
    if metadata.get("digest") != config.digest:
        raise CorruptedDraftHead(f"the draft head {path} is damaged, or its {CONFIG_FILE} is another's", _REMEDY)
    _check(config, stored, Path(folder))
    return config, stored


def read_config(folder: str | Path) -> DraftHeadConfig:
    """The folder's config alone, unchecked against the tensors. Raises DraftHeadNotFound, CorruptedDraftHead, ForeignDraftHead, NewerDraftHead."""
    path = Path(folder) / CONFIG_FILE
    if not _is_file(path):
        raise DraftHeadNotFound(f"there is no {path}", _REMEDY)
    try:
        fields = json.loads(_read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptedDraftHead(f"{path} cannot be read: {error}", _REMEDY) from error
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        raise ForeignDraftHead(f"{path} does not describe a draft head", "check the path")
    version = fields.pop("version", None)
    if not isinstance(version, int) or isinstance(version, bool):
        raise CorruptedDraftHead(f"{path} names no version", _REMEDY)
    if version > VERSION:
        raise NewerDraftHead(f"the draft head has format version {version}, this program reads up to {VERSION}", "update the program")
    try:
        return DraftHeadConfig(exit_layer=fields.pop(_FILE_KEYS["exit_layer"]), **fields)
    except (KeyError, TypeError) as error:
        raise CorruptedDraftHead(f"{path} lacks a field, or has one too many: {error}", _REMEDY) from error


def is_draft_head(folder: str | Path) -> bool:
    """True when the folder's config.json says that it holds a draft head, of any version and in any state."""
    path = Path(folder) / CONFIG_FILE
    try:
        return _is_file(path) and json.loads(_read_text(path)).get("format") == FORMAT
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """matrix [out, in] any float type -> int8 [out, in] and float16 scales [out, ceil(in / 64)], rounded to nearest."""
    width = matrix.shape[1]
    groups = torch.nn.functional.pad(matrix.float(), (0, -width % GROUP)).unflatten(1, (-1, GROUP))
    # away from zero, or a group of tiny weights would divide by nothing
    scale = (groups.abs().amax(-1) / 127).clamp_min(2.0**-24).half()
    steps = (groups / scale.float()[..., None]).round().clamp(-127, 127)
    return steps.flatten(1)[:, :width].to(torch.int8), scale


def dequantise(steps: Tensor, scale: Tensor) -> Tensor:
    """float32 [out, in] from what `quantise` returned."""
    return steps.float() * scale.float().repeat_interleave(GROUP, 1)[:, : steps.shape[1]]


def _check(config: DraftHeadConfig, stored: Mapping[str, Tensor], folder: Path) -> None:
    """CorruptedDraftHead unless the tensors that do not depend on the target are those the config speaks of."""
    ids = stored.get(TOKEN_IDS)
    right = ids is not None and ids.dtype == torch.int32 and ids.shape == (config.vocab_size,)
    if ids is None or not right or ids[0] < 0 or not bool((ids[1:] > ids[:-1]).all()):
        raise CorruptedDraftHead(f"the draft head {folder} needs {config.vocab_size} ascending token_ids", _REMEDY)
    layers = {match[1] for name in stored if (match := re.match(r"model\.layers\.(0|[1-9]\d{0,5})\.", name))}
    # counted first: the config's number may be any
    whole = len(layers) == config.num_layers and layers == {str(number) for number in range(config.num_layers)}
    if not whole or NORM not in stored or (HEAD in stored) != (config.head == "own"):
        raise CorruptedDraftHead(f"the draft head {folder} lacks tensors its config speaks of, or holds others", _REMEDY)
    size, count = stored[NORM].shape[-1:].numel(), len(config.state_layers)
    joins = {STATE_NORM: (size,), EMBED_NORM: (size,), JOIN: (size, 2 * size)} | ({FUSE: (size, count * size)} if count > 1 else {})
    held = {name: tuple(stored[name].shape) for name in (STATE_NORM, EMBED_NORM, JOIN, FUSE) if name in stored}
    if held != (joins if count else {}):
        raise CorruptedDraftHead(f"the draft head {folder} joins other states than its config speaks of", _REMEDY)
    for name, tensor in stored.items():
        if name != TOKEN_IDS and tensor.dtype not in (torch.int8, torch.float16, torch.bfloat16, torch.float32):
            raise CorruptedDraftHead(f"the draft head {folder} stores {name} as {tensor.dtype}", _REMEDY)
        scaled, scale = tensor.dtype == torch.int8, stored.get(name + SCALE)
        if scaled and (config.bits != 8 or tensor.ndim != 2 or scale is None):
            raise CorruptedDraftHead(f"the draft head {folder} has no scales that fit {name}", _REMEDY)
        if scaled and scale is not None:
            fits = scale.dtype == torch.float16 and scale.shape == (tensor.shape[0], -(-tensor.shape[1] // GROUP))
            if not fits or (scale.numel() and float(scale.min()) < 0):
                raise CorruptedDraftHead(f"the draft head {folder} has no scales that fit {name}", _REMEDY)
        if name.endswith(SCALE) and stored.get(name.removesuffix(SCALE), ids).dtype != torch.int8:
            raise CorruptedDraftHead(f"the draft head {folder} has scales of nothing, {name}", _REMEDY)
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CorruptedDraftHead(f"the draft head {folder} holds numbers that are not finite, in {name}", _REMEDY)


def _is_file(path: Path) -> bool:
    """Whether a regular file is there; a pipe would be waited for, and some names no system takes."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _read_text(path: Path) -> str:
    """A config's text. Raises ValueError when it is no UTF-8, or larger than a config is."""
    with path.open("rb") as file:
        content = file.read(_MAX_CONFIG_BYTES + 1)
    if len(content) > _MAX_CONFIG_BYTES:
        raise ValueError(f"it has more than {_MAX_CONFIG_BYTES:,} bytes")
    return content.decode("utf-8")


def _digest(config: DraftHeadConfig, stored: Mapping[str, Tensor]) -> str:
    facts = {key: value for key, value in file_fields(config).items() if key not in ("training", "digest")}
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(stored):
        tensor = stored[name].contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
