# SPDX-License-Identifier: BSD-3-Clause
"""Markdown tables and PNG plots."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from ssmkernels.experiments.record import Entry, Record


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


def ours(entry: Entry, seeds: int) -> str:
    """``mean ± std (n = 3)``, ``n = 3 of 5`` where not all ``seeds`` finished; a dash where none did. Failed ones are counted."""
    count = len(entry.values)
    number = f" (n = {count} of {seeds})" if count < seeds else f" (n = {count})" if count > 1 else ""
    finite = all(map(math.isfinite, entry.values))
    text = (mean_and_std(entry.values, digits=_digits(entry)) if finite else "nan") + number if count else "-"
    return f"{text}, {len(entry.failed)} failed" if entry.failed else text


def difference(entry: Entry) -> str:
    """Our mean minus the paper's, with its sign; a dash where either is no number."""
    paper = _papers_number(entry)
    if not paper or not entry.values or not all(map(math.isfinite, entry.values)):
        return "-"
    digits = _digits(entry)
    return f"{round(statistics.fmean(entry.values) - float(paper), digits) + 0.0:+.{digits}f}"  # + 0.0: no -0.00


def _papers_number(entry: Entry) -> str:
    """The paper's mean, "94.40" of "94.40 ± 1.37"; nothing where its text is no number."""
    found = re.fullmatch(r"([-−+]?(?:\d+\.?\d*|\.\d+))(?: *%)?(?: *± *[\d.]+(?: *%)?)?", entry.paper.strip())
    return found[1].replace("−", "-") if found else ""


def _digits(entry: Entry) -> int:
    """Places after the point: two of a percentage, three of a share, and at least as many as the paper prints."""
    return max(2 if entry.unit == "%" else 3, len(_papers_number(entry).partition(".")[2]))


def failures(record: Record) -> dict[str, tuple[str, ...]]:
    """ "method, setting" -> what its failed seeds said, each message once. A seed fails for all its figures together."""
    said: dict[str, dict[str, None]] = {}
    for entry in record.entries:
        if entry.failed:
            said.setdefault(f"{entry.row}, {entry.column}", {}).update(dict.fromkeys(entry.failed))
    return {cell: tuple(messages) for cell, messages in said.items()}


def progress(record: Record) -> str:
    """Finished cells of all, a cell being a method in a setting with a seed; failed ones are said. A dash for a record without a table."""
    seeds = max(1, len(record.seeds))
    finished: dict[tuple[str, str], int] = {}
    failed: dict[tuple[str, str], int] = {}
    for entry in record.entries:
        cell = entry.row, entry.column
        finished[cell] = max(finished.get(cell, 0), min(len(entry.values), seeds))
        failed[cell] = max(failed.get(cell, 0), len(entry.failed))
    if not finished:
        return "-"
    text = f"{sum(finished.values())}/{seeds * len(finished)}"
    return f"{text}, {sum(failed.values())} failed" if any(failed.values()) else text


def duration(seconds: float) -> str:
    """Such as ``42 s``, ``12 min`` or ``3 h 05 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def by_setting(record: Record) -> dict[str, list[Entry]]:
    """The entries under their column; in one column those of a method stand together. Both in the order in which they first appear."""
    rows = list(dict.fromkeys(entry.row for entry in record.entries))
    columns: dict[str, list[Entry]] = {}
    for entry in sorted(record.entries, key=lambda entry: rows.index(entry.row)):
        columns.setdefault(entry.column, []).append(entry)
    return {column: columns[column] for column in dict.fromkeys(entry.column for entry in record.entries)}


def titled(entry: Entry) -> str:
    """The figure with its unit."""
    return f"{entry.figure}, {entry.unit}" if entry.unit else entry.figure


def facts(record: Record) -> dict[str, str]:
    """What a reader has to know before the numbers."""
    return {
        "Budget": record.budget,
        "Data": record.data,
        "Seeds": ", ".join(map(str, record.seeds)) or "-",
        "Cells finished": progress(record),
        "Run time": f"{duration(record.seconds)} on {record.machine}",
        "Versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()) or "-",
    }
