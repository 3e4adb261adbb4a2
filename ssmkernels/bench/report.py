# SPDX-License-Identifier: BSD-3-Clause
"""Benchmark results as a Markdown table and as plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssmkernels.bench.case import Result
from ssmkernels.bench.measure import Rates


def _memory(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**20:.1f}"


def _ratio(result: Result, peer: str) -> str:
    return f"{result.ratio(peer):.1f}x" if peer in result.peers else ""


def table(results: Sequence[Result]) -> str:
    """Time, how many times longer each peer takes, share of the floor, and peak extra memory."""
    peers = list(dict.fromkeys(peer for r in results for peer in r.peers))
    titles = ["op", "size", "dtype", "ms", *(f"vs {peer}" for peer in peers)]
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
            *(_ratio(r, peer) for peer in peers),
            products,
            f"{100 * r.share_of_floor():.0f} %" if r.floor else "",
            _memory(r.extra_bytes.get("ours")),
            _memory(r.extra_bytes.get("eager")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def growth_table(results: Sequence[Result]) -> str:
    """What each op takes per unit of its work at growing sizes, and its peak extra memory."""
    lines = ["| op | unit | ns per unit, from the smallest size on | units | extra MiB |", "|---|---|---|---|---|"]
    for op, chosen in _by_op(_growth(results)).items():
        costs = " → ".join(f"{1e9 * r.ours.median / _units(r)[1]:.3g}" for r in chosen)
        counts = " → ".join(f"{_units(r)[1]:.2g}" for r in chosen)
        memory = " → ".join(_memory(r.extra_bytes.get("ours")) for r in chosen)
        lines.append(
            f"| `{op}` {chosen[0].phase.removesuffix(', growth')} | {_units(chosen[0])[0]} | {costs} | {counts} |"
            f" {memory} |"
        )
    return "\n".join(lines)


def _growth(results: Sequence[Result]) -> list[Result]:
    return [r for r in results if r.phase.endswith("growth")]


def _by_op(results: Sequence[Result]) -> dict[str, list[Result]]:
    return {op: [r for r in results if r.op == op] for op in dict.fromkeys(r.op for r in results)}


def _units(result: Result) -> tuple[str, float]:
    """What the work of an op is counted in, and how many of them there are."""
    size = result.size
    if "K" in size:
        return "row × slot", size["B"] * size["K"]
    if result.op == "laplacian_solve":
        return "entry and iteration", result.flops / (2 * size["C"])
    if "E" in size:
        return "entry", size["E"]
    return ("row", size["n"]) if result.op == "similarity_moments" else ("pair", size["n"] * size.get("m", size["n"]))


def compare(results: Sequence[Result], before: Sequence[Result]) -> dict[str, float]:
    """By how much each case that both runs have got slower, by its label: the ratio of its times over the floors of
    their own runs.

    Absolute times of two runs tell more of the machine's other work than of ours; floors are measured beside the op.
    Where there is no floor, it is the last of the peers that stands for it: calls of small batches have torch's own
    there.
    """

    def relative(result: Result) -> float:
        return result.ours.median / (result.floor or list(result.peers.values())[-1].median)

    earlier = {result.label(): relative(result) for result in before}
    return {
        result.label(): relative(result) / earlier[result.label()] for result in results if result.label() in earlier
    }


def comparison_table(changes: Mapping[str, float]) -> str:
    lines = ["| case | time over floor, to what it was |", "|---|---|"]
    return "\n".join(
        lines + [f"| {label} | {change:.2f}x |" for label, change in sorted(changes.items(), key=lambda item: -item[1])]
    )


def plot(results: Sequence[Result], out: Path, rates: Rates) -> list[str]:
    """A plot of each family that was measured and a roofline of all cases, beside ``out``; their names."""
    families = [r for r in results if not r.phase.endswith(("growth", "small"))]
    figures = {
        "memory": _plot_memory(families),
        "graph": _plot_graph(families),
        "pairs": _plot_pairs(families),
        "ranking": _plot_ranking(families),
        "growth": _plot_growth(results),
    }
    drawn = {family: figure for family, figure in figures.items() if figure is not None}
    paths = {
        family: out.with_suffix(".png") if len(drawn) == 1 else out.with_name(f"{out.stem}-{family}.png")
        for family in drawn
    }
    for family, path in paths.items():
        drawn[family].savefig(path, dpi=110)
    roofline = out.with_name(f"{out.stem}-roofline.png")
    _plot_roofline(results, rates).savefig(roofline, dpi=110)
    return [*(path.name for path in paths.values()), roofline.name]


def _plot_roofline(results: Sequence[Result], rates: Rates) -> Any:
    """The rate of every case against its arithmetic intensity, below what the copy rate and the rate of matrix products
    allow.

    A case can be above the roof: flops are those of the plain algorithm, of which symmetry and inactive pairs spare
    some.
    """
    figure, axes = _new_figure("roofline: flops of the plain algorithm", panels=1)
    chosen = [r for r in results if r.flops and r.bytes]  # calls of small batches have none
    intensities = [r.flops / r.bytes for r in chosen] or [1.0]
    ends = min(intensities) / 2, max(intensities) * 2
    for dtype, matmul in rates.matmul.items():
        line = [ends[0], min(max(matmul / rates.copy, ends[0]), ends[1]), ends[1]]
        axes.plot(
            line,
            [min(matmul, x * rates.copy) / 1e9 for x in line],
            "k-",
            label=f"copy rate, matrix products in {dtype}",
        )
    for op in dict.fromkeys(r.op for r in chosen):
        points = [(r.flops / r.bytes, r.flops / r.ours.median / 1e9) for r in chosen if r.op == op]
        axes.plot(*zip(*points, strict=True), "o", label=op)
    axes.set(xscale="log", yscale="log", xlabel="flops per byte", ylabel="GFLOP/s")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def _plot_growth(results: Sequence[Result]) -> Any:
    """Time and peak extra memory per unit of work against the number of units, of every op."""
    chosen = _growth(results)
    if not chosen:
        return None
    figure, (time_axes, memory_axes) = _new_figure("growth: each op from its smallest size to its largest")
    for op, points in _by_op(chosen).items():
        units = [_units(r)[1] for r in points]
        time_axes.plot(
            units, [1e9 * r.ours.median / count for r, count in zip(points, units, strict=True)], "o-", label=op
        )
        memory = [(count, r.extra_bytes.get("ours")) for r, count in zip(points, units, strict=True)]
        memory_axes.plot(
            *zip(*[(count, max(m, 2**12) / 2**20) for count, m in memory if m is not None], strict=True), "o-", label=op
        )
    for axes, what in ((time_axes, "ns per unit"), (memory_axes, "peak extra MiB")):
        axes.set(xscale="log", yscale="log", xlabel="units: pairs, entries, row × slot, rows", title=what)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    return figure


def _new_figure(title: str, panels: int = 2) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure, figure.subplots(1, panels)


def _plot_memory(results: Sequence[Result]) -> Any:
    """Time and peak extra memory of instance_matching against B·K, ours beside the peers."""
    chosen = [r for r in results if r.op == "instance_matching"]
    figure, time_axes = _plot_against(
        chosen, lambda r: r.size["B"] * r.size["K"], "instance_matching", "rows × slots (B·K)"
    )
    if figure is not None:
        points = sorted((r.size["B"] * r.size["K"], 1e3 * r.products.median) for r in chosen if r.products)
        time_axes.plot(*zip(*points, strict=True), "k:", label="its four matrix products (torch.mm)")
        time_axes.legend(fontsize=8)
    return figure


def _plot_pairs(results: Sequence[Result]) -> Any:
    """Time and peak extra memory of pair_focal_loss on all pairs, with "concat" and h = 128, against n·m."""
    chosen = [
        r
        for r in results
        if r.op == "pair_focal_loss" and r.phase.endswith("concat") and "p" not in r.size and r.size["h"] == 128
    ]
    return _plot_against(
        chosen, lambda r: r.size["n"] * r.size["m"], "pair_focal_loss, concat, h = 128", "pairs (n·m)"
    )[0]


def _plot_ranking(results: Sequence[Result]) -> Any:
    """Time and peak extra memory of pair_ranking_loss with d = 128 against n, beside the three n×n×d products that
    it could be made of.
    """
    chosen = [
        r for r in results if r.op == "pair_ranking_loss" and r.phase == "forward + backward" and r.size["d"] == 128
    ]
    figure, time_axes = _plot_against(chosen, lambda r: r.size["n"], "pair_ranking_loss, d = 128", "rows (n)")
    if figure is not None:
        points = sorted((r.size["n"], 1e3 * r.products.median) for r in chosen if r.products)
        time_axes.plot(*zip(*points, strict=True), "k:", label="three n²d matrix products (torch.mm)")
        time_axes.legend(fontsize=8)
    return figure


def _plot_against(chosen: Sequence[Result], size: Callable[[Result], int], title: str, label: str) -> tuple[Any, Any]:
    """Time and peak extra memory of ours and of the peers, which may lack the largest sizes; the figure and its axes
    of time.
    """
    if not chosen:
        return None, None
    figure, (time_axes, memory_axes) = _new_figure(title)
    for name in ("ours", *dict.fromkeys(peer for r in chosen for peer in r.peers)):
        style = {
            "marker": "o",
            "linewidth": 2.5 if name == "ours" else 1.2,
            "label": "ssmkernels" if name == "ours" else name,
        }
        there = sorted((r for r in chosen if name == "ours" or name in r.peers), key=size)
        x = [size(r) for r in there]
        time_axes.plot(x, [1e3 * (r.ours if name == "ours" else r.peers[name]).median for r in there], **style)
        memory = [r.extra_bytes.get(name) for r in there]
        if None not in memory:
            memory_axes.plot(x, [max(m, 2**12) / 2**20 for m in memory if m is not None], **style)
    for axes, what in ((time_axes, "ms, forward + backward"), (memory_axes, "peak extra MiB")):
        axes.set(xscale="log", yscale="log", xlabel=label, title=what)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure, time_axes


def _plot_graph(results: Sequence[Result]) -> Any:
    """Time per entry of the graph, of both ops, against its entries; and how many times longer each peer takes."""
    chosen = [r for r in results if r.op in ("leave_one_edge_out", "laplacian_solve") and "backward" not in r.phase]
    if not chosen:
        return None
    figure, (growth, ratios) = _new_figure("graph")
    for op in ("leave_one_edge_out", "laplacian_solve"):
        points = sorted(
            (r.size["E"], 1e9 * r.ours.median / (r.size["E"] * _iterations(r)))
            for r in chosen
            if r.op == op and r.size["C"] == 10
        )
        growth.plot(
            *zip(*points, strict=True), "o", label=f"{op}, C = 10{', per iteration' if op == 'laplacian_solve' else ''}"
        )
    growth.set(xscale="log", ylim=(0, None), xlabel="entries E", title="ns per entry")
    for peer in dict.fromkeys(peer for r in chosen for peer in r.peers):
        points = sorted((r.size["E"] * r.size["C"], r.ratio(peer)) for r in chosen if peer in r.peers)
        ratios.plot(*zip(*points, strict=True), "o", label=peer)
    ratios.set(xscale="log", yscale="log", xlabel="entries × classes", title="times longer than ours")
    for axes in (growth, ratios):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _iterations(result: Result) -> int:
    return int(result.phase.split()[0]) if result.op == "laplacian_solve" else 1
