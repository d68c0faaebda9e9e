"""Rows of bench_throughput, their ratios, and the table that is printed."""

from __future__ import annotations

import statistics
from typing import Any

from bench.throughput_runs import Contestant, Foretold, Sample


def row(who: Contestant, rounds: list[list[Sample]], batches: list[list[list[int]]], temperature: float, floor_s: float) -> dict[str, Any]:
    """One row of the contract."""
    later = [sum(len(t) - 1 for s in samples for t in s.texts) for samples in rounds]
    after_first = [sum(s.seconds - s.ttft_s for s in samples) for samples in rounds]
    speeds = [n / s for n, s in zip(later, after_first, strict=True)]
    everything = [s for samples in rounds for s in samples]
    prompts = [prompt for batch in batches for prompt in batch]
    count, proposed, steps = len(everything[0].texts[0]), sum(s.proposed for s in everything), sum(s.steps for s in everything)
    step_s = statistics.median(after_first) / (len(batches) * (count - 1))
    speculates = isinstance(who, Foretold) and who.mode in ("speculative", "ngram")
    own = isinstance(who, Foretold)
    return {
        "engine": who.name,
        "mode": who.mode,
        "batch": len(batches[0]),
        "prompt_tokens": round(sum(map(len, prompts)) / len(prompts)),
        "new_tokens": count,
        "temperature": temperature,
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_best": max(speeds),
        "tokens_per_s_rounds": speeds,
        "ttft_s": statistics.median(s.ttft_s for s in everything),
        "acceptance_rate": sum(s.accepted for s in everything) / max(1, proposed) if speculates else None,
        "tokens_per_step": sum(s.step_tokens for s in everything) / max(1, steps) if speculates else None,
        "drafts_per_step": proposed / max(1, steps) if speculates else None,
        "from_text_share": sum(s.from_text for s in everything) / max(1, proposed) if speculates else None,
        "draft_length": who.draft_length if isinstance(who, Foretold) and speculates else None,
        "draft_share": sum(s.draft_s for s in everything) / sum(s.seconds - s.ttft_s for s in everything) if own else None,
        "verify_share": sum(s.verify_s for s in everything) / sum(s.seconds - s.ttft_s for s in everything) if own else None,
        "floor_fraction": floor_s / step_s if who.mode == "plain" else None,
    }


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """To each row its tokens per second over those of the plain rows of its batch and temperature: of the medians, and of the bests."""
    for one in rows:
        for name in ("foretold", "transformers"):
            same = [
                r
                for r in rows
                if (r["engine"], r["mode"], r["batch"], r["temperature"]) == (name, "plain", one["batch"], one["temperature"])
            ]
            one[f"over_{name}_plain"] = one["tokens_per_s"] / same[0]["tokens_per_s"] if same else None
            one[f"over_{name}_plain_best"] = one["tokens_per_s_best"] / same[0]["tokens_per_s_best"] if same else None


def table(rows: list[dict[str, Any]]) -> str:
    """One line a row; ratios as median (best)."""
    lines = [
        f"{'engine':13}{'mode':12}{'batch':>5}{'temp':>6}{'tokens/s':>10}{'best':>9}{'ttft s':>9}{'accept':>8}{'tok/step':>9}{'floor':>7}"
        f"{'over our plain':>17}{'over transformers':>19}"
    ]

    def number(value: float | None, places: int) -> str:
        return "-" if value is None else f"{value:.{places}f}"

    for r in rows:
        ratios = [
            f"{number(r[f'over_{name}_plain'], 2)} ({number(r[f'over_{name}_plain_best'], 2)})" for name in ("foretold", "transformers")
        ]
        lines.append(
            f"{r['engine']:13}{r['mode']:12}{r['batch']:5}{r['temperature']:6g}{r['tokens_per_s']:10.2f}{r['tokens_per_s_best']:9.2f}"
            f"{r['ttft_s']:9.4f}{number(r['acceptance_rate'], 3):>8}{number(r['tokens_per_step'], 2):>9}"
            f"{number(r['floor_fraction'], 3):>7}{ratios[0]:>17}{ratios[1]:>19}"
        )
    return "\n".join(lines)
