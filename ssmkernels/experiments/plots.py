# SPDX-License-Identifier: BSD-3-Clause
"""PNG plots, drawn without a display."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssmkernels._plots import SPREAD_ALPHA, colour, label_axes, marker, new_figure, save, shared_legend
from ssmkernels.experiments.record import Plot
from ssmkernels.experiments.spec import Cell, Table
from ssmkernels.experiments.statistics import half_width

History = Sequence[Mapping[str, float]]
Points = Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]]
"""Panels of lines of x -> values."""


def draw(table: Table, out: Path, cells: Sequence[Cell], values: Mapping[tuple[Cell, int], Any]) -> tuple[Plot, ...]:
    """The plot that ``table`` asks for, of the finished jobs ``values``: "curves" over steps; "rows" over the number in
    their label, a panel for each symbol; or "figures" over the number in their title, a panel for each column.
    """
    plot = table.plot
    results = {cell: [value for (other, _), value in values.items() if other is cell] for cell in cells}
    results = {cell: finished for cell, finished in results.items() if finished}
    if not plot or not results:
        return ()
    file = plot.get("file", "curves.png")
    if plot["kind"] == "curves":
        histories = {
            f"{cell.row}, {cell.column}": [value["history"] for value in finished] for cell, finished in results.items()
        }
        alt = plot_curves(out / file, plot["panels"], histories, title=plot["title"])
        return (Plot(plot["title"], file, plot["paper"], alt),)
    panels: dict[str, dict[str, dict[float, list[float]]]] = {}
    for cell, finished in results.items():
        for figure in cell.figures:
            numbers = [number for number in map(figure.of, finished) if number is not None]
            if plot["kind"] == "rows":
                panel, _, x = cell.row.partition(" = ")
                line = table.paper
            else:
                panel, line, x = cell.column, cell.row, figure.title.partition("@")[2]
            panels.setdefault(panel, {}).setdefault(line, {})[float(x)] = numbers
    alt = plot_points(out / file, panels, xlabel=plot.get("xlabel"), ylabel=plot["ylabel"])
    return (Plot(plot["title"], file, plot["paper"], alt),)


def curve(histories: Sequence[History], name: str) -> tuple[list[float], list[list[float]]]:
    """Steps and the values of ``name`` of all runs at each; a step at which no run has it is left out."""
    at: dict[float, list[float]] = {}
    for history in histories:
        for record in history:
            if name in record:
                at.setdefault(record["step"], []).append(record[name])
    steps = sorted(at)
    return steps, [at[step] for step in steps]


def plot_curves(
    path: Path, panels: Mapping[str, str], runs: Mapping[str, Sequence[History]], *, title: str = ""
) -> str:
    """One panel per entry of ``panels`` (title -> name in the histories), one line per entry of ``runs``: the mean over
    its histories with the range that they span. Returns what is seen, in words.
    """
    figure, axes_of = new_figure(len(panels), title=title)
    sentences = []
    for axes, (panel, name) in zip(axes_of, panels.items(), strict=True):
        ends = []
        for number, (label, histories) in enumerate(runs.items()):  # a method has one colour in every panel
            steps, values = curve(histories, name)
            if not steps:
                continue
            means = [statistics.fmean(at_step) for at_step in values]
            axes.plot(steps, means, color=colour(number), label=label, linewidth=1.5)
            axes.fill_between(
                steps,
                list(map(min, values)),
                list(map(max, values)),
                color=colour(number),
                alpha=SPREAD_ALPHA,
                linewidth=0,
            )
            ends.append(f"{label} from {means[0]:.3g} to {means[-1]:.3g} at step {steps[-1]:g}")
        label_axes(axes, title=panel, xlabel="training step", ylabel=name.replace("_", " "))
        if ends:
            sentences.append(f"{panel}: {'; '.join(ends)}.")
    shared_legend(figure)
    save(figure, path)
    return " ".join(sentences)


def plot_points(path: Path, panels: Points, *, xlabel: str | None, ylabel: str, log: bool = False) -> str:
    """One panel per entry of ``panels``, one line per entry of those: x -> values, drawn as their mean with its 95 %
    interval. Without an ``xlabel`` x is what the panel's title says. Returns what is seen, in words.
    """
    figure, axes_of = new_figure(len(panels))
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    sentences = []
    for axes, (title, lines) in zip(axes_of, panels.items(), strict=True):
        seen = []
        for label, points in lines.items():
            finished = {x: values for x, values in sorted(points.items()) if values}
            if not finished:
                continue
            means = {x: statistics.fmean(values) for x, values in finished.items()}
            number = labels.index(label)  # a method has one colour in every panel
            axes.errorbar(
                list(means),
                list(means.values()),
                yerr=[half_width(values) for values in finished.values()],
                label=label,
                color=colour(number),
                marker=marker(number),
                capsize=2,
                linewidth=1.2,
            )
            best = max(means, key=lambda x: means[x])
            seen.append(
                f"{label} is highest, {means[best]:.3g}, at {best:g}, and {means[min(means)]:.3g} at {min(means):g}"
            )
        label_axes(axes, title=title, xlabel=xlabel or title, ylabel=ylabel, xscale="log" if log else "linear")
        if seen:
            sentences.append(f"{title}: {'; '.join(seen)}.")
    shared_legend(figure)
    save(figure, path)
    return " ".join(sentences)
