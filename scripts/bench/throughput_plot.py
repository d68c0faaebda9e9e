"""A plot of bench_throughput: tokens a second by batch, one line a way to decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(document: dict[str, Any], file: Path) -> None:
    """Write a PNG; one panel a temperature."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = document["rows"]
    temperatures = sorted({row["temperature"] for row in rows})
    figure, panels = pyplot.subplots(1, len(temperatures), figsize=(5 * len(temperatures), 4), squeeze=False, layout="constrained")
    for panel, temperature in zip(panels[0], temperatures, strict=True):
        for way in dict.fromkeys((row["engine"], row["mode"]) for row in rows):
            own = [row for row in rows if (row["engine"], row["mode"]) == way and row["temperature"] == temperature]
            panel.plot([r["batch"] for r in own], [r["tokens_per_s"] for r in own], marker="o", label=" ".join(way))
        batches = sorted({row["batch"] for row in rows})
        panel.set(xscale="log", yscale="log", xlabel="requests in a batch", ylabel="tokens a second", title=f"temperature {temperature:g}")
        panel.set_xticks(batches, [str(batch) for batch in batches])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.suptitle(f"{document['pair']}, {document['prompt_kind']} prompts, {document['device']}", fontsize="medium")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
