# SPDX-License-Identifier: BSD-3-Clause
"""PNG plots, drawn without a display."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ssmkernels._plots import SPREAD_ALPHA, colour, draw_panels, label_axes, marker
from ssmkernels.experiments.record import Entry, Plot
from ssmkernels.experiments.spec import Table
from ssmkernels.experiments.statistics import half_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

History = Sequence[Mapping[str, float]]


class Point(NamedTuple):
    """A mean and half of its 95 % interval."""

    mean: float
    half_width: float


Line = Mapping[float | None, Point]
"""x -> point; a line whose only x is None is a level."""
Points = Mapping[str, Mapping[str, Line]]
"""Panels of lines."""


def draw(
    table: Table, out: Path, entries: Sequence[Entry], histories: Mapping[str, Sequence[History]]
) -> tuple[Plot, ...]:
    """The plot that ``table`` asks for: "curves" of the ``histories`` (line -> runs) over steps, or "points" of the
    ``entries``, where a pattern finds panel, line and x in "row | column | figure".
    """
    plot = table.plot
    if not plot:
        return ()
    file = plot.get("file", "curves.png")
    points = points_of(entries, plot["pattern"]) if plot["kind"] == "points" else {}
    if points:
        labels = {"xlabel": plot.get("xlabel"), "ylabel": plot["ylabel"], "log": plot.get("log", False)}
        alt = plot_points(out / file, points, **labels)
    elif plot["kind"] == "curves" and histories:
        alt = plot_curves(out / file, plot["panels"], histories, title=plot["title"])
    else:
        return ()
    return (Plot(plot["title"], file, plot["paper"], alt),)


def points_of(entries: Sequence[Entry], pattern: str) -> Points:
    """The entries that match ``pattern`` by its groups panel, line and x; one without x is a level."""
    panels: dict[str, dict[str, dict[float | None, Point]]] = {}
    for entry in entries:
        match = re.fullmatch(pattern, f"{entry.row} | {entry.column} | {entry.figure}")
        if match is not None and entry.values:
            x = None if match["x"] is None else float(match["x"])
            point = Point(statistics.fmean(entry.values), half_width(entry.values))
            panels.setdefault(match["panel"], {}).setdefault(match["line"], {})[x] = point
    return panels


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

    def draw_lines(axes: Axes, panel: str, name: str) -> str:
        ends = []
        for number, (label, histories) in enumerate(runs.items()):  # a method has one colour in every panel
            steps, values = curve(histories, name)
            if not steps:
                continue
            means = [statistics.fmean(at_step) for at_step in values]
            lowest, highest = list(map(min, values)), list(map(max, values))
            axes.plot(steps, means, color=colour(number), label=label, linewidth=1.5)
            axes.fill_between(steps, lowest, highest, color=colour(number), alpha=SPREAD_ALPHA, linewidth=0)
            ends.append(f"{label} from {means[0]:.3g} to {means[-1]:.3g} at step {steps[-1]:g}")
        label_axes(axes, title=panel, xlabel="training step", ylabel=name.replace("_", " "))
        return "; ".join(ends)

    return draw_panels(path, panels, draw_lines, title=title)


def beside(xs: Sequence[float], steps: float, log: bool) -> list[float]:
    """``xs`` moved by so many steps of .6 % of their range, so that intervals of several lines do not cover each
    other.
    """
    if log:
        return [math.exp(x) for x in beside([math.log(x) for x in xs], steps, log=False)]
    return [x + 0.006 * steps * (xs[-1] - xs[0]) for x in xs]


def plot_points(path: Path, panels: Points, *, xlabel: str | None, ylabel: str, log: bool = False) -> str:
    """One panel per entry of ``panels``, one line per entry of those, with the intervals; a level lies across the
    panel. Without an ``xlabel`` x is what the panel's title says. Returns what is seen, in words.
    """
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))

    def draw_line(axes: Axes, label: str, points: Line) -> str:
        number = labels.index(label)  # a method has one colour in every panel
        if None in points:
            level = points[None].mean
            axes.axhline(level, label=label, color=colour(number), linestyle="--", linewidth=1.2)
            return f"{label} is {level:.3g}"
        xs = sorted(x for x in points if x is not None)
        means, widths = [points[x].mean for x in xs], [points[x].half_width for x in xs]
        style: dict[str, Any] = {"color": colour(number), "marker": marker(number), "capsize": 2, "linewidth": 1.2}
        places = beside(xs, number - (len(labels) - 1) / 2, log)
        axes.errorbar(places, means, yerr=widths, label=label, **style)
        best = max(means)
        return f"{label} is highest, {best:.3g}, at {xs[means.index(best)]:g}, and {means[0]:.3g} at {xs[0]:g}"

    def draw_lines(axes: Axes, title: str, lines: Mapping[str, Line]) -> str:
        seen = [draw_line(axes, label, points) for label, points in lines.items()]
        label_axes(axes, title=title, xlabel=xlabel or title, ylabel=ylabel, xscale="log" if log else "linear")
        if log:  # few values, chosen by hand: they say more than powers of ten
            ticks = sorted({x for points in lines.values() for x in points if x is not None})
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axes.set_xticks([], minor=True)
        return "; ".join(seen)

    return draw_panels(path, panels, draw_lines)
