"""Time to the first token when a session lies behind a link, and from which length on ours is the fastest way."""

from __future__ import annotations

from typing import Any

HOST = "host memory"
LINKS: dict[str, float | None] = {"1 Gbit/s": 0.125e9, "10 Gbit/s": 1.25e9, "100 Gbit/s": 12.5e9, "NVMe": 5e9, HOST: None}
"""Bytes a second; None: as fast as the copy of a raw cache was measured to be."""
WAYS = ("recompute", "raw bf16", "fp8", "kvtc", "foretold")


def seconds(row: dict[str, Any], bytes_per_s: float, step_s: float) -> dict[str, float]:
    """Of every way, link and step included. Raw and 8-bit caches need nothing but to arrive; the others and ids arrive and are worked on. KVTC where
    it was measured."""
    found = {
        "recompute": row["ids_bytes"] / bytes_per_s + row["recompute_s"] + step_s,
        "raw bf16": row["raw_bytes"] / bytes_per_s + step_s,
        "fp8": row["raw_bytes"] / 2 / bytes_per_s + step_s,
        "foretold": row["stored_bytes"] / bytes_per_s + row["resume_s"] + step_s,
    }
    if "kvtc_decode_s" in row:
        found["kvtc"] = row["kvtc_bytes"] / bytes_per_s + row["kvtc_decode_s"] + step_s
    return found


def ways_of(found: list[dict[str, Any]]) -> list[str]:
    """Those that all rows of a table have, ours last."""
    return [way for way in WAYS if all(way in r for r in found)]


def link_rows(rows: list[dict[str, Any]], links: dict[str, float | None], step_s: float) -> list[dict[str, Any]]:
    """One for every measured length and link: seconds of each way."""
    return [
        {"target": r["target"], "draft": r["draft"], "quality": r["quality"], "tokens": r["tokens"], "link": name}
        | seconds(r, r["raw_bytes"] / r["host_copy_s"] if rate is None else rate, step_s)
        for r in rows
        for name, rate in links.items()
    ]


def crossovers(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each link and other way the shortest length from which on ours is faster, straight between measured lengths; None where it never is."""
    result = []
    others = ways_of(found)[:-1]
    for quality in dict.fromkeys(r["quality"] for r in found):
        for link in dict.fromkeys(r["link"] for r in found):
            own = sorted((r for r in found if r["link"] == link and r["quality"] == quality), key=lambda r: r["tokens"])
            entry: dict[str, Any] = {"quality": quality, "link": link}
            for way in others:
                lead = [(r["tokens"], r[way] - r["foretold"]) for r in own]
                entry[way] = None
                for n in range(len(lead) - 1, -1, -1):
                    if lead[n][1] <= 0:
                        break
                    entry[way] = lead[n][0]
                    if n and lead[n - 1][1] <= 0:
                        (a, low), (b, high) = lead[n - 1], lead[n]
                        entry[way] = round(a + (b - a) * -low / (high - low))
            result.append(entry)
    return result


def plot(found: list[dict[str, Any]], title: str, path: str) -> None:
    """Seconds to the first token over length, a panel a link."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    links, quality = list(dict.fromkeys(r["link"] for r in found)), found[0]["quality"]
    figure, axes = plt.subplots(1, len(links), figsize=(3.4 * len(links), 3.6), sharey=True, squeeze=False)
    for axis, link in zip(axes[0], links, strict=True):
        own = [r for r in found if r["link"] == link and r["quality"] == quality]
        for way in ways_of(found):
            style = {"recompute": "k--", "raw bf16": "C0:", "fp8": "C1:", "kvtc": "C2-.", "foretold": "C3-"}[way]
            axis.plot([r["tokens"] for r in own], [r[way] for r in own], style, label=way, linewidth=2 if way == WAYS[-1] else 1.3)
        axis.set(xscale="log", yscale="log", title=link, xlabel="tokens")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("seconds to the first token")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"{title}, {quality}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
