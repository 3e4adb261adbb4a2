# SPDX-License-Identifier: BSD-3-Clause
"""What a named experiment is, and how it is run: trainer runs over cells and seeds, the paper's numbers beside ours."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmkernels import __version__, data, info
from ssmkernels.experiments.jobs import EXPECTED, Outcome, failures_of, results_of, run_rows, seconds_of, this_rank, training_job
from ssmkernels.experiments.record import Entry, Plot, Record, write_record
from ssmkernels.experiments.report import markdown_table, mean_and_std, ours, plot_curves, plot_points
from ssmkernels.trainers import RunResult
from ssmkernels.trainers.cli import METHODS, parse_config
from ssmkernels.trainers.slade_data import load_images

BUDGETS = ("smoke", "short", "paper")
EMBEDDED = "embedded"
"""What ``--data`` says for images inside packages."""


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
        values = self.values(results)
        return mean_and_std(values) if values else "-"

    def values(self, results: Sequence[RunResult]) -> list[float]:
        """One per run, in percent; none where the evaluations do not have it."""
        if any(self.name not in result.history[-1] for result in results):
            return []
        return [100 * self.value(result) for result in results]

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


Results = Mapping[Cell, Sequence[RunResult]]
"""The finished runs of every cell that has some."""
Draw = Callable[[Path, Results], Sequence[Plot]]
"""Draws into a folder."""


@dataclass(frozen=True)
class Experiment:
    """A table or figure of a paper that is made of training runs.

    Args:
        method: of ``ssmkernels train``.
        offline: arguments that replace the data where none are given, for the smoke budget.
        deviations: what differs from the paper at any budget.
        draw: makes the plots.
    """

    title: str
    method: str
    cells: tuple[Cell, ...]
    figures: tuple[Figure, ...]
    budgets: Mapping[str, Budget]
    offline: tuple[str, ...]
    deviations: tuple[str, ...]
    draw: Draw | None = None


@dataclass(frozen=True)
class Findings:
    """What came out of an experiment: ``text`` for who reads, the rest for its record."""

    text: str
    """Markdown, without the title."""
    data: str
    """What the images were, in words."""
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]
    seconds: float
    plots: tuple[Plot, ...] = ()
    deviations: tuple[str, ...] = ()
    notes: str = ""
    """What of ``text`` is in none of the others."""

    @property
    def failed(self) -> bool:
        return any(entry.failed for entry in self.entries)


@dataclass(frozen=True)
class Study:
    """A table or figure that is no table of training runs: ``run(budget=, data=, out=)`` returns its findings."""

    title: str
    run: Callable[..., Findings]


def reproduce(name: str, experiment: Experiment | Study, *, paper: str, budget: str, folder: str | None, out: Path) -> tuple[str, bool]:
    """Runs an experiment from what an earlier call left, leaves report.md and record.json in ``out``, and returns the report and whether
    all of it came to an end.

    Args:
        name: of the experiment.
        paper: it is of.
        folder: of the images; None for those inside packages.

    Raises:
        KeyboardInterrupt: a run was stopped; its checkpoint is kept.
    """
    run = experiment.run if isinstance(experiment, Study) else functools.partial(run_experiment, experiment)
    found: Findings = run(budget=budget, data=folder, out=out)
    report = f"# {experiment.title}\n\n{found.text}"
    if this_rank()[0] == 0:
        write_record(
            out,
            Record(
                name=name,
                title=experiment.title,
                paper=paper,
                budget=budget,
                data=found.data,
                seeds=found.seeds,
                command=f"ssmkernels reproduce {name} --data {_place(folder)} --budget {budget}",
                entries=found.entries,
                plots=found.plots,
                deviations=found.deviations,
                notes=found.notes,
                seconds=found.seconds,
                machine=machine(),
                versions=versions(),
            ),
        )
        (out / "report.md").write_text(report, encoding="utf-8")
    return report, not found.failed


def _place(folder: str | None) -> str:
    """What --data was, without the folders of a machine."""
    if folder is None:
        return EMBEDDED
    return Path(folder).name if in_a_file(folder) else "DIR"


def run_experiment(experiment: Experiment, *, budget: str, data: str | None, out: Path) -> Findings:
    """Runs every cell and seed, going on where an earlier call stopped. The plots are left in ``out``.

    Raises:
        FileNotFoundError, ValueError, ImportError: none of the images can be had, or a setting is wrong; nothing has been run.
        KeyboardInterrupt: a run was stopped; its checkpoint is kept.
    """
    if data is None and budget != "smoke":
        raise ValueError(missing_data(budget))
    extent = experiment.budgets[budget]
    place = experiment.offline if data is None else ("--data.root", data)
    if in_a_file(data):
        place = ("--data.name", "npz", *place)
    method, seeds = METHODS[experiment.method], range(1, extent.seeds + 1)
    configs, jobs = [], {}
    for number, cell in enumerate(experiment.cells):
        for seed in seeds:
            config, _ = parse_config(experiment.method, [*cell.arguments, *extent.arguments, *place, "--seed", str(seed)])
            configs.append(config)
            title = f"{experiment.title}; {cell.row}, {cell.column}, seed {seed}"
            jobs[str(number), seed] = training_job(experiment.method, config, method.train, title)
    check_images(experiment.method, [config.data for config in configs])
    outcomes = dict(zip(experiment.cells, run_rows(out, jobs).values(), strict=True))
    entries = tuple(
        Entry(cell.row, cell.column, figure.title, "%", paper, tuple(figure.values(results_of(each))), failures_of(each))
        for cell, each in outcomes.items()
        for figure, paper in zip(experiment.figures, cell.paper, strict=True)
    )
    plots: tuple[Plot, ...] = ()
    if experiment.draw is not None and this_rank()[0] == 0:
        out.mkdir(parents=True, exist_ok=True)
        plots = tuple(experiment.draw(out, {cell: results_of(each) for cell, each in outcomes.items() if results_of(each)}))
    names = list(dict.fromkeys(config.data.name for config in configs))
    deviations = _deviations(experiment, budget, extent, data)
    return Findings(
        text=_text(budget, extent.seeds, entries, deviations, plots),
        data=Path(data).name
        if data is not None and in_a_file(data)
        else f"{', '.join(names)}{' (inside packages)' if data is None else ''}",
        seeds=tuple(seeds),
        entries=entries,
        seconds=seconds_of(outcomes),
        plots=plots,
        deviations=deviations,
    )


def in_a_file(data: str | None) -> bool:
    """Whether the images are the arrays of a file, see :func:`ssmkernels.data.load_dataset`, whatever set the cells name."""
    return data is not None and data.endswith(".npz")


def missing_data(budget: str) -> str:
    """What to say where a budget cannot do without the paper's images."""
    return (
        f"--data is missing; the {budget} budget needs the folder of the paper's images "
        f"(only smoke runs without, or with --data {EMBEDDED})"
    )


def check_images(method: str, configs: Sequence[Any]) -> None:
    """Raises what the readers say, if none of the images of a method can be had; who has some of them can run those cells."""
    problems: list[Exception] = []
    distinct = {repr((each.name, each.root, getattr(each, "unlabeled_name", None))): each for each in configs}
    for config in distinct.values():
        try:
            _load(method, config)
        except EXPECTED as error:
            problems.append(error)
    if len(problems) == len(distinct):
        raise type(problems[0])("\n".join(dict.fromkeys(map(str, problems))))
    for each in problems:
        print(f"Without some of the images: {each}", flush=True)


def _load(method: str, config: Any) -> Any:
    if method == "slade":
        return load_images(config)
    return data.load_collection(config.name, config.root) if method == "mixed-lp" else data.load_dataset(config.name, config.root)


def curves(title: str, panels: Mapping[str, str], *, paper: str) -> Draw:
    """A plot of evaluations over steps, a panel for each of ``panels``: title -> name in the evaluations."""

    def draw(folder: Path, results: Results) -> list[Plot]:
        runs = {f"{cell.row}, {cell.column}": [result.history for result in each] for cell, each in results.items()}
        plot_curves(folder / "curves.png", panels, runs, title=title)
        return [Plot(title, "curves.png", paper)]

    return draw


def points(
    title: str,
    file: str,
    of: Callable[[Results], Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]]],
    *,
    xlabel: str,
    ylabel: str,
    paper: str,
) -> Draw:
    """A plot of numbers over another: ``of(results)`` gives panels of lines of x -> values."""

    def draw(folder: Path, results: Results) -> list[Plot]:
        panels = of(results)
        if not panels:
            return []
        plot_points(folder / file, panels, xlabel=xlabel, ylabel=ylabel)
        return [Plot(title, file, paper)]

    return draw


def _deviations(experiment: Experiment, budget: str, extent: Budget, data: str | None) -> tuple[str, ...]:
    said = list(experiment.deviations)
    arguments = (*extent.arguments, *(experiment.offline if data is None else ()))
    if arguments:
        purpose = "; this shows that it runs, not what it reaches" if budget == "smoke" else ""
        said.insert(0, f"Budget {budget}: {extent.seeds} seed(s), {in_words(arguments)}{purpose}.")
    if in_a_file(data):
        said.insert(0, "The images are the arrays of a file, for which nothing says that they are those of the published set.")
    if data is None:
        said.insert(
            0,
            "No folder of images was given: every cell ran in miniature, on images that come inside a package, and cells that differ in "
            "their images alone are one run.",
        )
    return tuple(said)


def in_words(arguments: Sequence[str]) -> str:
    """Pairs of settings and values, of a setting given twice the last."""
    return " ".join(f"{setting} {value}" for setting, value in dict(zip(arguments[::2], arguments[1::2], strict=True)).items())


def _text(budget: str, seeds: int, entries: Sequence[Entry], deviations: Sequence[str], plots: Sequence[Plot]) -> str:
    header = ["setting", "method", "figure, %", "paper", f"ours, {budget}"]
    table = markdown_table(header, [[each.column, each.row, each.figure, each.paper, ours(each, seeds)] for each in entries])
    failed = failure_text(entries)
    said = "\n".join(f"- {each}" for each in deviations)
    pictures = "".join(f"\n![{plot.title}]({plot.file})\n" for plot in plots)
    return f"{table}\n\n{failed}Deviations from the paper:\n\n{said}\n{pictures}"


def failure_text(entries: Sequence[Entry]) -> str:
    """What failed, or nothing."""
    messages = dict.fromkeys(f"- {each.row}, {each.column}: {message}" for each in entries for message in each.failed)
    return "Failed; the same command tries again:\n\n" + "\n".join(messages) + "\n\n" if messages else ""


def entries_of(
    outcomes: Mapping[str, Sequence[Outcome]],
    column: str,
    figures: Mapping[str, Callable[[RunResult], float]],
    paper: Mapping[str, Sequence[str]],
) -> tuple[Entry, ...]:
    """The entries of a column: ``figures`` are read from the results, in percent, and ``paper`` has theirs by row."""
    return tuple(
        Entry(row, column, title, "%", text, tuple(figure(result) for result in results_of(each)), failures_of(each))
        for row, each in outcomes.items()
        for (title, figure), text in zip(figures.items(), paper.get(row, ("-",) * len(figures)), strict=True)
    )


@functools.cache
def machine() -> str:
    """The processors and devices here, in words."""
    found = info.collect()
    devices = (found["torch"] or {}).get("devices") or found["cuda"]["devices"]
    names = [device["name"] for device in devices]
    return f"{os.cpu_count()} x {found['cpu']['model']}, " + (
        ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "no GPU"
    )


def versions() -> dict[str, str]:
    """Of the packages that results may depend on."""
    found = {"ssmkernels": __version__}
    for name in ("torch", "torchvision", "numpy", "scikit-learn", "lightning-fabric", "faiss-cpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
