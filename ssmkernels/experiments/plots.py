# SPDX-License-Identifier: BSD-3-Clause
"""PNG plots, drawn without a display."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmkernels.experiments.record import Plot
from ssmkernels.experiments.spec import Cell, Table
from ssmkernels.experiments.statistics import half_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, float]]
Points = Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]]
"""Panels of lines of x -> values."""
DPI = 200


def draw(table: Table, out: Path, cells: Sequence[Cell], values: Mapping[tuple[Cell, int], Any]) -> tuple[Plot, ...]:
    """The plot that ``table`` asks for, of the finished jobs ``values``: "curves" over steps; "rows" over the number in
    their label, a panel for each symbol; or "figures" over the number in their title, a panel for each column.
    """
    plot = table.plot
    runs = {cell: [value for (other, _), value in values.items() if other is cell] for cell in cells}
    runs = {cell: each for cell, each in runs.items() if each}
    if not plot or not runs:
        return ()
    file = plot.get("file", "curves.png")
    if plot["kind"] == "curves":
        histories = {f"{cell.row}, {cell.column}": [value["history"] for value in each] for cell, each in runs.items()}
        plot_curves(out / file, plot["panels"], histories, title=plot["title"])
        return (Plot(plot["title"], file, plot["paper"]),)
    panels: dict[str, dict[str, dict[float, list[float]]]] = {}
    for cell, each in runs.items():
        for figure in cell.figures:
            found = [value for value in map(figure.of, each) if value is not None]
            if plot["kind"] == "rows":
                panel, _, x = cell.row.partition(" = ")
                panels.setdefault(panel, {}).setdefault(table.paper, {})[float(x)] = found
            else:
                panels.setdefault(cell.column, {}).setdefault(cell.row, {})[float(figure.title.partition("@")[2])] = (
                    found
                )
    plot_points(out / file, panels, xlabel=plot.get("xlabel"), ylabel=plot["ylabel"])
    return (Plot(plot["title"], file, plot["paper"]),)


def panels_of(count: int, *, width: float = 3.8, height: float = 3.2, **rest: Any) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, count, squeeze=False, **rest)[0])


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


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
) -> None:
    """One panel per entry of ``panels`` (title -> name in the histories), one line per entry of ``runs``: the mean over
    its histories with the range that they span.
    """
    figure, axes_of = panels_of(len(panels))
    for axes, (panel, name) in zip(axes_of, panels.items(), strict=True):
        for number, (label, histories) in enumerate(runs.items()):
            steps, values = curve(histories, name)
            if steps:
                colour = f"C{number}"  # the same in every panel
                axes.plot(steps, [statistics.fmean(each) for each in values], color=colour, label=label, linewidth=1.5)
                axes.fill_between(
                    steps, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, linewidth=0
                )
        axes.set(title=panel, xlabel="step", ylabel=name.replace("_", " "))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.suptitle(title)
    save(figure, path)


def plot_points(path: Path, panels: Points, *, xlabel: str | None, ylabel: str, log: bool = False) -> None:
    """One panel per entry of ``panels``, one line per entry of those: x -> values, drawn as their mean with its 95 %
    interval. Without an ``xlabel`` x is what the panel's title says.
    """
    figure, axes_of = panels_of(len(panels))
    for axes, (title, lines) in zip(axes_of, panels.items(), strict=True):
        for label, points in lines.items():
            finished = {x: values for x, values in sorted(points.items()) if values}
            means, halves = map(statistics.fmean, finished.values()), map(half_width, finished.values())
            axes.errorbar(
                list(finished), list(means), yerr=list(halves), label=label, marker="o", capsize=2, linewidth=1.2
            )
        axes.set(title=title, xlabel=xlabel or title, ylabel=ylabel, xscale="log" if log else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    save(figure, path)
