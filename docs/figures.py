# SPDX-License-Identifier: BSD-3-Clause
"""Draws the pictures of docs/results anew from what is committed there, without training anything.

python docs/figures.py

From each record in docs/results/runs the plot of points that its table asks for; from the tables of simmatch_cifar10.md
and of Figures 4 and 5 of mixed label propagation, whose records were not kept, their curves. Clouds of points and
histograms (MLSN's Figures 2 and 3, SLADE's similarities) need the networks: the command on their page trains them
within a few minutes and draws them; where its --out has the runs already it only draws.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ssmkernels.experiments.plots import Point, draw, plot_points
from ssmkernels.experiments.record import write_record
from ssmkernels.experiments.report import find_records
from ssmkernels.experiments.spec import load_tables

RESULTS = Path(__file__).resolve().parent / "results"


def table_rows(text: str, column: str) -> Iterator[dict[str, str]]:
    """The rows of the Markdown table in ``text`` that has such a column, as column -> cell."""
    header: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if not header:
            header = cells if column in cells else []
        elif not line.startswith("|"):
            return
        elif set(line) - set("|-: "):
            yield dict(zip(header, cells, strict=True))


def draw_records() -> None:
    tables = load_tables()
    for folder, record in find_records(RESULTS / "runs"):
        table = tables[record.name]
        if table.plot.get("kind") == "points":
            drawn = draw(table, folder, record.entries, {})
            write_record(folder, replace(record, plots=drawn))
            print(*(folder / plot.file for plot in drawn))


def number(text: str) -> float:
    return float(text.replace(",", ""))


def draw_simmatch() -> None:
    """Accuracy over steps, a panel for each number of labels; of one seed, so without a spread."""
    page = RESULTS / "simmatch_cifar10.md"
    panels: dict[str, dict[str, dict[float | None, Point]]] = {}
    for row in table_rows(page.read_text(encoding="utf-8"), "step 250"):
        lines = panels.setdefault(f"{row.pop('labels')} labels", {})
        points = lines.setdefault(row.pop("method"), {})
        for column, accuracy in row.items():
            points[number(column.removeprefix("step "))] = Point(float(accuracy), 0.0)
    ylabel = "test accuracy of the averaged weights (%)"
    plot_points(page.with_suffix(".png"), panels, xlabel="training step", ylabel=ylabel)
    print(page.with_suffix(".png"))


def point_of(cell: str) -> Point:
    """Of "0.898 ± 0.021"."""
    mean, _, half_width = cell.partition(" ± ")
    return Point(float(mean), float(half_width))


def draw_oracle() -> None:
    """Accuracy over the share of the true dissimilar edges, a panel for each set."""
    page = RESULTS / "mixed_lp_figure4.md"
    panels: dict[str, dict[str, dict[float | None, Point]]] = {}
    for row in table_rows(page.read_text(encoding="utf-8"), "20 %"):
        name, method = row.pop("set"), row.pop("method")
        if "indefinite" not in method:
            shares = {0.0 if share == "none" else number(share.rstrip(" %")): cell for share, cell in row.items()}
            line = {share: point_of(cell) for share, cell in shares.items()}
            panels.setdefault(name, {})[method] = line
    xlabel = "share of the true dissimilar edges (%)"
    plot_points(page.with_suffix(".png"), panels, xlabel=xlabel, ylabel="accuracy (mean, 95 % interval)")
    print(page.with_suffix(".png"))


def draw_sensitivity() -> None:
    """Accuracy over β and over λ, a panel each."""
    page = RESULTS / "mixed_lp_figure5.md"
    text = page.read_text(encoding="utf-8")
    panels: dict[str, dict[str, dict[float | None, Point]]] = {}
    for symbol in ("β", "λ"):
        for row in table_rows(text, symbol):
            name = row.pop(symbol)
            panels.setdefault(symbol, {})[name] = {number(value): point_of(cell) for value, cell in row.items()}
    ylabel = "accuracy (mean, 95 % interval)"
    plot_points(page.with_suffix(".png"), panels, xlabel=None, ylabel=ylabel, log=True)
    print(page.with_suffix(".png"))


def main() -> int:
    draw_records()
    draw_simmatch()
    draw_oracle()
    draw_sensitivity()
    return 0


if __name__ == "__main__":
    sys.exit(main())
