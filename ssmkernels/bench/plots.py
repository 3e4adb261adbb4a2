# SPDX-License-Identifier: BSD-3-Clause
"""Benchmark results as plots: a family's main op beside its peers, growth, and the roofline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmkernels import _plots
from ssmkernels.bench.case import Result
from ssmkernels.bench.measure import Rates, Timing
from ssmkernels.bench.report import by_op, growth_of, units

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_BYTES = 2**12
"""Peaks below a page are drawn as one: a logarithmic axis has no zero."""
LOGARITHMIC = {"xscale": "log", "yscale": "log"}
SPREAD = "bands and bars: lowest to highest call"


def measured_on(document: Mapping[str, Any]) -> str:
    """The device and the versions of results, so that a plot says them by itself."""
    machine, versions = document["machine"], document["versions"]
    if document["device"] == "cuda":
        device = ", ".join(device["name"] for device in machine["torch"]["devices"])
    else:
        device = f"{machine['cpu']['model']}, {machine['torch']['threads']} threads"
    return f"{device}; torch {versions['torch']}, ssmkernels {versions['ssmkernels']}"


def plot(results: Sequence[Result], out: Path, rates: Rates, where: str) -> list[str]:
    """A plot of each family that was measured and a roofline of its cases with flops, beside ``out``, with ``where``
    they were measured above; their names.
    """
    families = [result for result in results if not result.phase.endswith(("growth", "small"))]
    figures = {
        "memory": _memory(families),
        "graph": _graph(families),
        "pairs": _pairs(families),
        "ranking": _ranking(families),
        "growth": _growth(results),
    }
    roofline = _roofline(families, rates)
    drawn = {family: figure for family, figure in figures.items() if figure is not None}
    names = []
    for family, figure in drawn.items():
        path = out.with_suffix(".png") if len(drawn) == 1 else out.with_name(f"{out.stem}-{family}.png")
        names.append(_save(figure, path, where))
    if roofline is not None:
        names.append(_save(roofline, out.with_name(f"{out.stem}-roofline.png"), where))
    return names


def _save(figure: Figure, path: Path, where: str) -> str:
    figure.suptitle(f"{figure.get_suptitle()}\n{where}", fontsize="medium")
    _plots.save(figure, path)
    return path.name


def _line(axes: Axes, number: int, x: Sequence[float], y: Sequence[float], label: str, *, joined: bool = True) -> None:
    axes.plot(
        x,
        y,
        marker=_plots.marker(number),
        color=_plots.colour(number),
        linewidth=2.2 if number == 0 else 1.2,
        linestyle="-" if joined else "none",
        markersize=5,
        label=label,
    )


def _spread(axes: Axes, number: int, x: Sequence[float], timings: Sequence[Timing], scale: Sequence[float]) -> None:
    """The band from the lowest to the highest call, in the units that ``scale`` gives."""
    axes.fill_between(
        x,
        [factor * timing.low for factor, timing in zip(scale, timings, strict=True)],
        [factor * timing.high for factor, timing in zip(scale, timings, strict=True)],
        color=_plots.colour(number),
        alpha=_plots.SPREAD_ALPHA,
        linewidth=0,
    )


def _roofline(results: Sequence[Result], rates: Rates) -> Figure | None:
    """The rate of every case against its arithmetic intensity, below what the copy rate and the rate of matrix products
    allow.

    A case can be above the roof: flops are those of the plain algorithm, of which symmetry and inactive pairs spare
    some.
    """
    chosen = [result for result in results if result.flops and result.bytes]  # moving rows has none
    if not chosen:
        return None
    title = "rate of each case below the roofline (flops of the plain algorithm)"
    figure, (axes,) = _plots.new_figure(1, title=title, width=7.5, height=5.0)
    intensities = [result.flops / result.bytes for result in chosen]
    ends = min(intensities) / 2, max(intensities) * 2
    for number, (dtype, matmul) in enumerate(rates.matmul.items()):
        knee = min(max(matmul / rates.copy, ends[0]), ends[1])
        x = [ends[0], knee, ends[1]]
        y = [min(matmul, intensity * rates.copy) / 1e9 for intensity in x]
        style = ("-", "--", ":", "-.")[number % 4]
        axes.plot(x, y, color="black", linestyle=style, label=f"copy rate, matrix products in {dtype}")
    for number, (op, cases) in enumerate(by_op(chosen).items()):
        x = [result.flops / result.bytes for result in cases]
        _line(axes, number, x, [result.flops / result.ours.median / 1e9 for result in cases], op, joined=False)
    xlabel, ylabel = "arithmetic intensity (flops per byte)", "rate (GFLOP/s)"
    _plots.label_axes(axes, xlabel=xlabel, ylabel=ylabel, **LOGARITHMIC)
    _plots.shared_legend(figure)
    return figure


def _growth(results: Sequence[Result]) -> Figure | None:
    """Time and peak extra memory per unit of work against the number of units, of every op."""
    chosen = growth_of(results)
    if not chosen:
        return None
    figure, (time_axes, memory_axes) = _plots.new_figure(2, width=5.2, title=f"each op as its size grows ({SPREAD})")
    for number, (op, cases) in enumerate(by_op(chosen).items()):
        counts = [units(result)[1] for result in cases]
        scale = [1e9 / count for count in counts]
        costs = [factor * result.ours.median for factor, result in zip(scale, cases, strict=True)]
        _line(time_axes, number, counts, costs, op)
        _spread(time_axes, number, counts, [result.ours for result in cases], scale)
        _draw_memory(memory_axes, number, counts, cases, "ours", op)
    xlabel = "units: pairs, entries, rows × slots, rows"
    _plots.label_axes(time_axes, title="time per unit", xlabel=xlabel, ylabel="time (ns)", **LOGARITHMIC)
    _plots.label_axes(memory_axes, title="peak extra memory", xlabel=xlabel, ylabel="peak (MiB)", **LOGARITHMIC)
    _plots.shared_legend(figure)
    return figure


def _draw_memory(axes: Axes, number: int, x: Sequence[float], cases: Sequence[Result], who: str, label: str) -> None:
    """Peak extra memory in MiB of ``who``, "ours" or a peer, where it was measured."""
    measured = [(place, result.extra_bytes.get(who)) for place, result in zip(x, cases, strict=True)]
    points = [(place, max(peak, LEAST_BYTES) / 2**20) for place, peak in measured if peak is not None]
    if points:
        _line(axes, number, [place for place, _ in points], [peak for _, peak in points], label)


def _memory(results: Sequence[Result]) -> Figure | None:
    """Time and peak extra memory of instance_matching against B·K, ours beside the peers."""
    chosen = [result for result in results if result.op == "instance_matching"]
    title = "instance_matching, forward + backward"
    products = "its four matrix products (torch.mm)"
    return _against(chosen, lambda result: result.size["B"] * result.size["K"], title, "rows × slots (B·K)", products)


def _pairs(results: Sequence[Result]) -> Figure | None:
    """Time and peak extra memory of pair_focal_loss on all pairs, with "concat" and h = 128, against n·m."""
    chosen = [
        result
        for result in results
        if result.op == "pair_focal_loss"
        and result.phase.endswith("concat")
        and "p" not in result.size
        and result.size["h"] == 128
    ]
    title = "pair_focal_loss, concat, h = 128, forward + backward"
    return _against(chosen, lambda result: result.size["n"] * result.size["m"], title, "pairs (n·m)")


def _ranking(results: Sequence[Result]) -> Figure | None:
    """Time and peak extra memory of pair_ranking_loss with d = 128 against n, beside the three n×n×d products that it
    could be made of.
    """
    chosen = [
        result
        for result in results
        if result.op == "pair_ranking_loss" and result.phase == "forward + backward" and result.size["d"] == 128
    ]
    title = "pair_ranking_loss, d = 128, forward + backward"
    products = "three n²d matrix products (torch.mm)"
    return _against(chosen, lambda result: result.size["n"], title, "rows (n)", products)


def _against(
    chosen: Sequence[Result], size: Callable[[Result], int], title: str, xlabel: str, products: str = ""
) -> Figure | None:
    """Time and peak extra memory of ours and of the peers, which may lack the largest sizes; and the time of the op's
    matrix products, where ``products`` names them.
    """
    if not chosen:
        return None
    figure, (time_axes, memory_axes) = _plots.new_figure(2, width=5.2, title=f"{title} ({SPREAD})")
    for number, name in _numbered(chosen):
        cases = sorted((result for result in chosen if name == "ours" or name in result.peers), key=size)
        timings = [result.ours if name == "ours" else result.peers[name] for result in cases]
        x = [size(result) for result in cases]
        label = "ssmkernels" if name == "ours" else name
        _line(time_axes, number, x, [1e3 * timing.median for timing in timings], label)
        _spread(time_axes, number, x, timings, [1e3] * len(x))
        _draw_memory(memory_axes, number, x, cases, name, label)
    points = sorted((size(result), 1e3 * result.products.median) for result in chosen if products and result.products)
    if points:
        time_axes.plot([x for x, _ in points], [y for _, y in points], "k:", label=products)
    _plots.label_axes(time_axes, title="time", xlabel=xlabel, ylabel="time (ms)", **LOGARITHMIC)
    _plots.label_axes(memory_axes, title="peak extra memory", xlabel=xlabel, ylabel="peak (MiB)", **LOGARITHMIC)
    _plots.shared_legend(figure)
    return figure


def _numbered(results: Sequence[Result]) -> list[tuple[int, str]]:
    """Ours and the peers with their number in the palette: the same in the plots of all families for those that every
    family has.
    """
    common = ["ours", "eager", "torch.compile"]
    peers = list(dict.fromkeys(peer for result in results for peer in result.peers))
    names = [*common, *(peer for peer in peers if peer not in common)]
    return [(number, name) for number, name in enumerate(names) if name == "ours" or name in peers]


def _graph(results: Sequence[Result]) -> Figure | None:
    """Time per entry of the graph, of both ops, against its entries; and how many times longer each peer takes."""
    ops = ("leave_one_edge_out", "laplacian_solve")
    chosen = [result for result in results if result.op in ops and "backward" not in result.phase]
    if not chosen:
        return None
    figure, (cost_axes, ratio_axes) = _plots.new_figure(2, width=5.2, title=f"ops on graphs ({SPREAD})")
    for number, op in ((0, ops[0]), (7, ops[1])):  # peers have those between
        cases = [result for result in chosen if result.op == op and result.size["C"] == 10]
        label = f"{op}, C = 10{', per iteration' if op == 'laplacian_solve' else ''}"
        for result in sorted(cases, key=lambda result: result.size["E"]):
            scale = 1e9 / (result.size["E"] * _iterations(result))
            timing = result.ours
            spread = [[scale * (timing.median - timing.low)], [scale * (timing.high - timing.median)]]
            cost_axes.errorbar(
                result.size["E"],
                scale * timing.median,
                yerr=spread,
                fmt=_plots.marker(number),
                color=_plots.colour(number),
                capsize=2,
                label=label,
            )
    for number, peer in _numbered(chosen)[1:]:
        cases = [result for result in chosen if peer in result.peers]
        x = [result.size["E"] * result.size["C"] for result in cases]
        _line(ratio_axes, number, x, [result.ratio(peer) for result in cases], f"{peer} (right)", joined=False)
    limits = {"xscale": "log", "ylim": (0, None)}
    _plots.label_axes(
        cost_axes, title="time per entry", xlabel="entries of the graph (E)", ylabel="time (ns)", **limits
    )
    title, ylabel = "peers beside ours, both ops", "times longer than ours"
    _plots.label_axes(ratio_axes, title=title, xlabel="entries × classes (E·C)", ylabel=ylabel, **LOGARITHMIC)
    _plots.shared_legend(figure)
    return figure


def _iterations(result: Result) -> int:
    return int(result.phase.split()[0]) if result.op == "laplacian_solve" else 1
