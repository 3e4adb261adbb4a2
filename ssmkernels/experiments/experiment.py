# SPDX-License-Identifier: BSD-3-Clause
"""What a named experiment is, and how it is run: trainer runs over cells and seeds, the paper's numbers beside ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ssmkernels.experiments.report import markdown_table, mean_and_std, plot_curves
from ssmkernels.trainers.cli import METHODS, parse_config
from ssmkernels.trainers.loop import RunResult

BUDGETS = ("smoke", "short", "paper")


@dataclass(frozen=True)
class Figure:
    """A number of a run, in percent: ``name`` in its evaluations, the median of the last 20 or the last one; or, if there is ``best``, in
    the evaluation where that one is highest."""

    title: str
    name: str
    median: bool = True
    best: str | None = None

    def of(self, results: Sequence[RunResult]) -> str:
        """Mean and deviation over runs; a dash where the evaluations do not have it."""
        if any(self.name not in result.history[-1] for result in results):
            return "-"
        return mean_and_std([100 * self.value(result) for result in results])

    def value(self, result: RunResult) -> float:
        if self.best is not None:
            return result.best(self.best)[self.name]
        return result.median(self.name) if self.median else result.history[-1][self.name]


@dataclass(frozen=True)
class Cell:
    """One entry of a table: how it is trained, and what the paper says, one text per figure."""

    row: str
    column: str
    arguments: tuple[str, ...]
    paper: tuple[str, ...]


@dataclass(frozen=True)
class Budget:
    """How much of the paper's training is done. ``arguments`` come after those of the cell."""

    seeds: int
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """A table or figure of a paper.

    Args:
        method: of ``ssmkernels train``.
        offline: arguments that replace the data where none are given, for the smoke budget.
        curves: panels of a plot, title -> name in the evaluations.
        deviations: what differs from the paper at any budget.
    """

    title: str
    method: str
    cells: tuple[Cell, ...]
    figures: tuple[Figure, ...]
    budgets: Mapping[str, Budget]
    offline: tuple[str, ...]
    deviations: tuple[str, ...]
    curves: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A table or figure that is no table of training runs: ``run(budget=, data=, out=)`` returns its report."""

    title: str
    run: Callable[..., str]


def run_experiment(experiment: Experiment, *, budget: str, data: str | None, out: Path) -> str:
    """Runs every cell and seed, going on where an earlier call stopped, and returns the report, which is also left in ``out``.

    Raises:
        KeyboardInterrupt: a run was stopped; its checkpoint is kept.
    """
    if data is None and budget != "smoke":
        raise ValueError(f"--data is missing; the {budget} budget needs the folder of the paper's images (only smoke runs without)")
    extent = experiment.budgets[budget]
    place = experiment.offline if data is None else ("--data.root", data)
    results: dict[Cell, list[RunResult]] = {}
    for cell in experiment.cells:
        results[cell] = []
        for seed in range(1, extent.seeds + 1):
            name = re.sub(r"[^\w-]+", "_", f"{cell.row}-{cell.column}-seed{seed}", flags=re.ASCII)
            print(f"{name} ({experiment.title})", flush=True)
            arguments = [*cell.arguments, *extent.arguments, *place, "--seed", str(seed), "--run.out", str(out / name)]
            config, _ = parse_config(experiment.method, arguments)
            result = METHODS[experiment.method].train(config, resume=True)
            if not result.finished:
                raise KeyboardInterrupt
            results[cell].append(result)
    report = _report(experiment, budget, extent, results, offline=data is None)
    out.mkdir(parents=True, exist_ok=True)
    if experiment.curves:
        runs = {f"{cell.row}, {cell.column}": [result.history for result in each] for cell, each in results.items()}
        plot_curves(out / "curves.png", experiment.curves, runs, title=experiment.title)
        report += "\n![curves](curves.png)\n"
    (out / "report.md").write_text(report)
    return report


def _report(experiment: Experiment, budget: str, extent: Budget, results: Mapping[Cell, Sequence[RunResult]], *, offline: bool) -> str:
    rows = []
    for cell, runs in results.items():
        for figure, paper in zip(experiment.figures, cell.paper, strict=True):
            rows.append([cell.column, cell.row, figure.title, paper, figure.of(runs)])
    said = list(experiment.deviations)
    if extent.arguments:
        purpose = "; this shows that it runs, not what it reaches" if budget == "smoke" else ""
        said.insert(0, f"Budget {budget}: {extent.seeds} seed(s), {' '.join(extent.arguments)}{purpose}.")
    if offline:
        said.insert(0, f"No --data was given: every cell ran on images that come inside a package ({' '.join(experiment.offline)}).")
    deviations = "\n".join(f"- {each}" for each in said)
    table = markdown_table(["setting", "method", "figure, %", "paper", f"ours, {budget}"], rows)
    return f"# {experiment.title}\n\n{table}\n\nDeviations from the paper:\n\n{deviations}\n"
