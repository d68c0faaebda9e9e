"""One picture of a codec benchmark: bits per KV element against KL, both logarithmic, every line named beside it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

STYLE = {
    "foretold": ("#c0182b", "foretold (predicted residual)"),
    "foretold-nopred": ("#e8833a", "foretold, same pack, prediction off"),
    "kvtc": ("#1f5fa8", "KVTC"),
    "aqua-kv": ("#2a8f5b", "AQUA-KV"),
    "turboquant-mean": ("#7a4fa3", "TurboQuant, mean removed"),
    "turboquant": ("#b79ad1", "TurboQuant"),
    "kivi": ("#8c6d46", "KIVI (128 recent tokens exact)"),
    "kivi-nowindow": ("#c2a37a", "KIVI, no window"),
    "cachegen": ("#3a9aa8", "CacheGen"),
    "cachegen-anchors": ("#8fcbd3", "CacheGen with anchors"),
    "fp8": ("#444444", "fp8"),
    "bf16+zstd": ("#888888", "bf16 + zstd"),
}
_LABEL_GAP = 0.034
_KL_FLOOR = 1e-4


def plot(document: dict[str, Any], path: str | Path, without_sinks: bool = False) -> None:
    """Writes a PNG from a benchmark's document (rows as in the contract).

    Args:
        without_sinks: leave out the four exact tokens that every method stores (16 bits an element, shared by the whole prefix).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines: dict[str, list[tuple[float, float, str]]] = {}
    for row in document["rows"]:
        bits = row["bits_per_element"] - (row["sink_bits_per_element"] if without_sinks else 0.0)
        lines.setdefault(row["method"], []).append((bits, max(row["kl"], _KL_FLOOR), row["quality"]))
    figure, axes = plt.subplots(figsize=(11, 7))
    axes.set_xscale("log")
    axes.set_yscale("log")
    for method, points in lines.items():
        points.sort()
        ours = method == "foretold"
        colour = STYLE.get(method, ("#000000", method))[0]
        axes.plot([p[0] for p in points], [p[1] for p in points], color=colour, lw=3 if ours else 1.6, zorder=3 if ours else 2)
        for x, y, _ in points:  # hollow: as good as exact, drawn on the floor
            axes.plot(x, y, "o", ms=7 if ours else 4.5, color=colour, mfc=colour if y > _KL_FLOOR else "white", zorder=4 if ours else 3)
    if "foretold" in lines:
        for bits, kl, quality in lines["foretold"]:
            axes.annotate(
                quality,
                (bits, kl),
                xytext=(-6, -4),
                textcoords="offset points",
                ha="right",
                va="top",
                fontsize=8,
                color=STYLE["foretold"][0],
            )
    bits = [p[0] for points in lines.values() for p in points]
    kls = [p[1] for points in lines.values() for p in points]
    axes.set_xlim(min(bits) / 1.8, max(bits) * 3)
    axes.set_ylim(min(kls) / 2, max(kls) * 2)
    _place_labels(axes, lines)
    what = "without the 4 exact tokens" if without_sinks else "everything stored"
    axes.set_xlabel(f"bits per KV element, real bytes, {what} (bf16 = 16)")
    hollow = f" (hollow: at or below {_KL_FLOOR:g})" if min(kls) <= _KL_FLOOR else ""
    axes.set_ylabel(f"KL to the untouched target, nats per token{hollow}")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title(
        f"{document['pair']}: {document['settings']['prefix']} cached tokens replaced, the next "
        f"{document['context'] - document['settings']['prefix']} scored (down and left is better)",
        loc="left",
        fontsize=11,
    )
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _place_labels(axes: Any, lines: dict[str, list[tuple[float, float, str]]]) -> None:
    """Names each line beside one of its points: the place that covers the fewest lines and names, nearest to the point (right side preferred)."""
    to_axes = axes.transAxes.inverted()
    at = {method: [tuple(to_axes.transform(axes.transData.transform(p[:2]))) for p in points] for method, points in lines.items()}
    obstacles = [
        (x0 + (x1 - x0) * t / 40, y0 + (y1 - y0) * t / 40)
        for path in at.values()
        for (x0, y0), (x1, y1) in pairwise([path[0], *path])
        for t in range(41)
    ]
    boxes: list[tuple[float, float, float, float]] = []
    for method in sorted(at, key=lambda m: (m != "foretold", -len(at[m]))):
        colour, label = STYLE.get(method, ("#000000", method))
        bold = method == "foretold"
        width = len(label) * (0.0079 if bold else 0.0072)
        if bold:  # its points are named below it already
            boxes += [(x - 0.09, y - 0.035, x, y) for x, y in at[method]]
        best = (float("inf"), 0.0, 0.0, 0.0, 0.0)
        for x, y in at[method]:
            for side in (1, 0, -1):  # name to the right of, over or under, to the left of the point
                for step in range(-5, 6):
                    left, middle = x + (0.012 if side == 1 else -width / 2 if side == 0 else -0.012 - width), y + step * _LABEL_GAP * 0.6
                    box = (left, middle - _LABEL_GAP / 2, left + width, middle + _LABEL_GAP / 2)
                    covered = sum(box[0] < ox < box[2] and box[1] < oy < box[3] for ox, oy in obstacles)
                    touching = sum(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in boxes)
                    outside = box[0] < 0 or box[2] > 1.02 or box[1] < 0 or box[3] > 1
                    cost = covered + 40 * touching + 100 * outside + 0.8 * abs(step) + 0.5 * (side != 1)
                    best = min(best, (cost, left, middle, x, y))
        _, left, middle, x, y = best
        boxes.append((left, middle - _LABEL_GAP / 2, left + width, middle + _LABEL_GAP / 2))
        axes.annotate(
            label,
            (x, y),
            xycoords=axes.transAxes,
            xytext=(left, middle),
            textcoords=axes.transAxes,
            va="center",
            fontsize=9.5,
            color=colour,
            fontweight="bold" if bold else "normal",
            zorder=5,
        )
