# SPDX-License-Identifier: BSD-3-Clause
"""Markdown tables and PNG plots."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns also line up in a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |" for line in lines)


def mean_and_std(values: Sequence[float], *, digits: int = 2) -> str:
    """``mean ± std`` (of the sample); the value alone where there is one."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def mean_curve(histories: Sequence[Sequence[Mapping[str, float]]], name: str) -> tuple[list[float], list[float]]:
    """Steps and the mean over runs of ``name`` at each; a step at which no run has it is left out."""
    at: dict[float, list[float]] = {}
    for history in histories:
        for record in history:
            if name in record:
                at.setdefault(record["step"], []).append(record[name])
    steps = sorted(at)
    return steps, [statistics.fmean(at[step]) for step in steps]


def plot_curves(
    path: Path, panels: Mapping[str, str], runs: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], *, title: str = ""
) -> None:
    """One panel per entry of ``panels`` (title -> name in the histories), one line per entry of ``runs`` (the mean over its histories)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(panels), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (panel, name) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, (label, histories) in enumerate(runs.items()):
            steps, values = mean_curve(histories, name)
            if steps:
                axes.plot(steps, values, color=f"C{number}", label=label, linewidth=1.5)  # the same colour in every panel
        axes.set(title=panel, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=90)


def mean_and_interval(values: Sequence[float], *, digits: int = 3) -> str:
    """``mean ± half-width`` of the 95 % confidence interval (Student's t); the value alone where there is one."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {half_width(values):.{digits}f}"


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of the mean; 0 for one value."""
    if len(values) == 1:
        return 0.0
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def plot_points(
    path: Path, panels: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]], *, xlabel: str, ylabel: str, log: bool = False
) -> None:
    """One panel per entry of ``panels``, one line per entry of those: x -> values, drawn as their mean with its 95 % interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.8 * len(panels), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, points in lines.items():
            x, means = list(points), [statistics.fmean(values) for values in points.values()]
            axes.errorbar(
                x, means, yerr=[half_width(values) for values in points.values()], label=label, marker="o", capsize=2, linewidth=1.2
            )
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale="log" if log else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=90)
