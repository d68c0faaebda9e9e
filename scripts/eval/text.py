"""What a pack costs on other kinds of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from engine.errors import InvalidOption
from eval.codec_methods import RECOMPUTED, ForetoldMethod, Method, PairCodec, RecomputedMethod
from eval.codec_quality import Quality
from eval.suspend import step_name
from eval.text_tokens import read_files, windows

Encode = Callable[[str], list[int]]


def named_paths(option: str, words: Sequence[str]) -> dict[str, str]:
    """{"logs": "path"} from an option's words of the form logs=path. Raises InvalidOption."""
    found = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not name or not equals or not path or "/" in name or name in found:
            raise InvalidOption(f"{option} {word}", "give NAME=PATH, every name once")
        found[name] = path
    return found


def domain_windows(path: str, context: int, num_tokens: int, encode: Encode) -> list[list[int]]:
    """Windows of `context` tokens from a folder's files, num_tokens in all at most; where all files are shorter, as a chat's answers are, from
    the files one after the other. Raises InvalidOption when there is not one."""
    texts = list(read_files([path]).values())
    found = windows([encode(text) for text in texts], context, num_tokens // context)
    if not found:
        found = windows([encode("\n\n".join(texts))], context, num_tokens // context)
    if not found:
        raise InvalidOption(
            f"{path} has fewer than {context} tokens", "give longer text, more --domain-tokens, or a smaller --domain-context"
        )
    return found


def measure_domain(
    pair: PairCodec, sequences: list[list[int]], methods: Sequence[str], done: Callable[[str, dict[str, Any]], None]
) -> None:
    """Bits per element, KL and top-1 agreement of each method (a quality's name, or "recomputed") on windows, by the protocol of bench_codec;
    done(method, row)."""
    from bench_codec import measure

    on_gpu = pair.device.type == "cuda"
    quality = Quality(pair.target, len(sequences[0]), pair.device if on_gpu else "cpu")
    cases = quality.untouched(sequences)
    config = pair.target.config
    full_dim = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    for name in methods:
        method: Method
        if name == RECOMPUTED:
            method = RecomputedMethod(pair.target)
        else:
            step = step_name(name)
            method = ForetoldMethod(step if isinstance(step, str) else f"step{step!r}", pair, predict=True)
        row = measure(method, quality, cases, full_dim, len(cases) if on_gpu else 2)
        done(name, {key: value for key, value in row.items() if key not in ("method", "quality", "inputs")})
    pair.forget()


def domain_rows(parts: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each domain, pack and method."""
    found = [(key.split("/"), part) for key, part in parts.items() if key.startswith("domain/")]
    return [{"task": "domain", "domain": words[1], "pack": words[3], "method": words[-1], **part} for words, part in found]
