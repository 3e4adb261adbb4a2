# SPDX-License-Identifier: BSD-3-Clause
"""Benchmark results as a Markdown table and as plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ssmkernels.bench.case import Result

PEERS = ("eager", "torch.compile", "official")


def _memory(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**20:.1f}"


def _ratio(result: Result, peer: str) -> str:
    return f"{result.ratio(peer):.1f}x" if peer in result.peers else ""


def table(results: Sequence[Result]) -> str:
    """Time, how many times longer each peer takes, share of the floor, and peak extra memory."""
    titles = ["op", "size", "dtype", "ms", *(f"vs {peer}" for peer in PEERS)]
    titles += ["time / matrix products", "share of floor", "extra MiB", "eager's extra MiB"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for r in results:
        size = " ".join(f"{key}={value:,}" for key, value in r.size.items())
        products = f"{r.ours.median / r.products.median:.2f}" if r.products else ""
        cells = [
            f"`{r.op}` {r.phase}",
            size,
            r.dtype,
            f"{1e3 * r.ours.median:.3g}",
            *(_ratio(r, peer) for peer in PEERS),
            products,
            f"{100 * r.share_of_floor():.0f} %",
            _memory(r.extra_bytes.get("ours")),
            _memory(r.extra_bytes.get("eager")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: Sequence[Result], path: Path) -> None:
    """Time and peak extra memory of instance_matching against B·K, ours beside the peers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    chosen = sorted((r for r in results if r.op == "instance_matching"), key=lambda r: r.size["B"] * r.size["K"])
    if not chosen:
        return
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    x = [r.size["B"] * r.size["K"] for r in chosen]
    for name in ("ours", *chosen[0].peers):
        style = {"marker": "o", "linewidth": 2.5 if name == "ours" else 1.2}
        label = "ssmkernels" if name == "ours" else name
        time_axes.plot(x, [1e3 * (r.ours if name == "ours" else r.peers[name]).median for r in chosen], label=label, **style)
        memory = [r.extra_bytes.get(name) for r in chosen]
        if None not in memory:
            memory_axes.plot(x, [max(m, 2**12) / 2**20 for m in memory if m is not None], label=label, **style)
    products = [r.products.median for r in chosen if r.products]
    if len(products) == len(x):
        time_axes.plot(x, [1e3 * p for p in products], "k:", label="its four matrix products (torch.mm)")
    for axes, title in ((time_axes, "ms, forward + backward"), (memory_axes, "peak extra MiB")):
        axes.set(xscale="log", yscale="log", xlabel="rows × slots (B·K)", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle("instance_matching")
    figure.savefig(path, dpi=110)
    plt.close(figure)
