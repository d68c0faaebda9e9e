"""One picture of a codec benchmark: bits per KV element against KL, both logarithmic, every line named where it ends."""
from __future__ import annotations

from pathlib import Path
from typing import Any

STYLE = {
    "foretold": ("#c0182b", "foretold (predicted residual)"), "foretold-nopred": ("#e8833a", "foretold without prediction"),
    "kvtc": ("#1f5fa8", "KVTC"), "aqua-kv": ("#2a8f5b", "AQUA-KV"),
    "turboquant-mean": ("#7a4fa3", "TurboQuant, mean removed"), "turboquant": ("#b79ad1", "TurboQuant"),
    "kivi": ("#8c6d46", "KIVI (128 recent tokens exact)"), "kivi-nowindow": ("#c2a37a", "KIVI, no window"),
    "cachegen": ("#3a9aa8", "CacheGen"),
    "cachegen-anchors": ("#8fcbd3", "CacheGen with anchors"), "fp8": ("#444444", "fp8"), "bf16+zstd": ("#888888", "bf16 + zstd"),
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
    anchors = []
    for method, points in lines.items():
        points.sort()
        ours = method == "foretold"
        colour, label = STYLE.get(method, ("#000000", method))
        axes.plot([p[0] for p in points], [p[1] for p in points], color=colour, lw=3 if ours else 1.6, zorder=3 if ours else 2)
        for x, y, _ in points:                                                          # hollow: as good as exact, drawn on the floor
            axes.plot(x, y, "o", ms=7 if ours else 4.5, color=colour, mfc=colour if y > _KL_FLOOR else "white", zorder=4 if ours else 3)
        anchors.append((points[-1][0], points[-1][1], label, colour, ours))
    if "foretold" in lines:
        for bits, kl, quality in lines["foretold"]:
            axes.annotate(quality, (bits, kl), xytext=(-6, -4), textcoords="offset points", ha="right", va="top", fontsize=8,
                          color=STYLE["foretold"][0])
    bits = [p[0] for points in lines.values() for p in points]
    kls = [p[1] for points in lines.values() for p in points]
    axes.set_xlim(min(bits) / 1.8, max(bits) * 6)
    axes.set_ylim(min(kls) / 2, max(kls) * 2)
    _label_ends(axes, anchors)
    what = "without the 4 exact tokens" if without_sinks else "everything stored"
    axes.set_xlabel(f"bits per KV element, real bytes, {what} (bf16 = 16)")
    hollow = f" (hollow: at or below {_KL_FLOOR:g})" if min(kls) <= _KL_FLOOR else ""
    axes.set_ylabel(f"KL to the untouched target, nats per token{hollow}")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title(f"{document['pair']}: {document['settings']['prefix']} cached tokens replaced, the next "
                   f"{document['context'] - document['settings']['prefix']} scored (down and left is better)", loc="left", fontsize=11)
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _label_ends(axes: Any, anchors: list[tuple[float, float, str, str, bool]]) -> None:
    """Names each line beside its point of most bits, moved up or down just enough that names do not touch; a thin line leads back."""
    placed: list[tuple[float, float]] = []                                              # (left edge, height) in axes fractions
    to_axes = axes.transAxes.inverted()
    for x, y, label, colour, bold in sorted(anchors, key=lambda a: -a[1]):
        left, height = to_axes.transform(axes.transData.transform((x, y)))
        target = height
        for step in range(200):
            target = height + _LABEL_GAP / 4 * (-1) ** step * ((step + 1) // 2)
            if 0 <= target <= 1 and all(abs(target - h) >= _LABEL_GAP or abs(left - a) > 0.28 for a, h in placed):
                break
        placed.append((left, target))
        axes.annotate(label, (x, y), xytext=(left + 0.015, target), textcoords=axes.transAxes, va="center", fontsize=9.5, color=colour,
                      fontweight="bold" if bold else "normal",
                      arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6} if abs(target - height) > _LABEL_GAP / 3 else None)
