"""One picture of trainings of a draft head: acceptance against time, from the JSON that train_draft.py writes.

python scripts/train/plot.py training.json training.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLOURS = ("#c0182b", "#1f5fa8", "#2a8f5b", "#e8833a", "#7a4fa3", "#3a9aa8", "#8c6d46", "#444444")


def plot(document: dict[str, Any], path: str | Path) -> None:
    """Writes a PNG: a line a training, thin for the batches just trained on, with the held-out measurements as points on a thick one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trainings = document.get("search") or [document]
    figure, axes = plt.subplots(figsize=(10, 6))
    for training, colour in zip(trainings, COLOURS * (1 + len(trainings) // len(COLOURS)), strict=False):
        a = training["architecture"]
        label = f"m={a['trunk_layers']} n={a['own_layers']} R={a['vocab_size']:,} {a['head']} head, cost {training['draft_step_cost']:.0%}"
        curve = training["curve"]
        axes.plot([e["seconds"] for e in curve], [e["acceptance"] for e in curve], color=colour, lw=0.8, alpha=0.5)
        held = [(e["seconds"], e["held_out"]["acceptance"]) for e in curve if "held_out" in e]
        held.append((training["training_seconds"], training["temperature_1"]["acceptance"]))
        axes.plot(*zip(*held, strict=True), "o-", color=colour, lw=2.2, ms=4, label=f"{label}: {held[-1][1]:.3f}")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("acceptance at temperature 1, sum of min(p, q)")
    axes.set_title(f"{document['target']}: held-out answers (points), batches in training (thin)", loc="left", fontsize=11)
    axes.legend(loc="lower right", fontsize=9)
    axes.grid(True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print("usage: python scripts/train/plot.py training.json training.png", file=sys.stderr)
        sys.exit(2)
    plot(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), sys.argv[2])
