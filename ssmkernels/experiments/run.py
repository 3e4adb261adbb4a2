# SPDX-License-Identifier: BSD-3-Clause
"""The one engine of all tables: its cells, the jobs of these and their seeds, entries from what came out, and the
record of it all.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ssmkernels import __version__, data, info
from ssmkernels._files import write_atomically
from ssmkernels._names import unknown
from ssmkernels.experiments.jobs import (
    EXPECTED,
    FILE,
    FOLDER,
    Job,
    Outcome,
    alone,
    outcome_of,
    run_jobs,
    this_rank,
    training_job,
    with_needs,
)
from ssmkernels.experiments.plots import draw
from ssmkernels.experiments.record import Entry, Plot, Record, write_record
from ssmkernels.experiments.report import record_page
from ssmkernels.experiments.sources import EMBEDDED, SWAV_FILE, Source
from ssmkernels.experiments.spec import Arguments, Cell, Table, flat, words
from ssmkernels.trainers import train_swav
from ssmkernels.trainers.cli import METHODS, parse_config

Values = Mapping[tuple[Cell, int], Outcome]


@dataclass(frozen=True)
class Request:
    """What a call of ``reproduce`` asks for.

    Args:
        rows, columns: of which cells are run; all of them if empty.
        seeds: that are run; those of the budget if empty.
        settings: arguments of ``ssmkernels train`` that come after all others.
        shard: (i, n): every n-th job from the i-th on is run, i from 0.
        check: whether cells without their images are left out.
    """

    budget: str
    source: Source
    out: Path
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    settings: tuple[str, ...] = ()
    shard: tuple[int, int] = (0, 1)
    check: bool = True

    @property
    def jobs(self) -> Path:
        """The folder of the jobs, which tables share."""
        return self.out / FOLDER

    def command(self, name: str) -> str:
        pairs = zip(self.settings[::2], self.settings[1::2], strict=True)
        options = [
            *(each for row in self.rows for each in ("--rows", row)),
            *(each for column in self.columns for each in ("--columns", column)),
            *(("--seeds", ",".join(map(str, self.seeds))) if self.seeds else ()),
            *(each for key, value in pairs for each in ("--set", f"{key[2:]}={value}")),
        ]
        return shlex.join(
            ["ssmkernels", "reproduce", name, "--data", self.source.label, "--budget", self.budget, *options]
        )

    def place(self, name: str) -> Path:
        """The folder of a table's record: settings make another table of it."""
        pairs = zip(self.settings[::2], self.settings[1::2], strict=True)
        changed = re.sub(r"[^\w.,=+-]+", "_", "".join(f"-{key[2:]}={value}" for key, value in pairs))
        if len(changed) > 100:  # names of folders are limited
            changed = f"-{hashlib.sha256(changed.encode()).hexdigest()[:12]}"
        return self.out / f"{name}-{self.budget}{changed}"


class Cells(NamedTuple):
    """The cells of a table that can have their images, and what is said of the others."""

    table: Table
    """In the variant that is run."""
    cells: tuple[Cell, ...]
    left_out: tuple[str, ...] = ()


class Result(NamedTuple):
    """What an analysis makes of finished cells."""

    entries: tuple[Entry, ...] = ()
    plots: tuple[Plot, ...] = ()
    notes: str = ""


def find_cells(table: Table, request: Request) -> Cells:
    """The cells of ``table`` with their jobs.

    Raises:
        FileNotFoundError, ValueError, ImportError: none of the images can be had, or a setting is wrong.
    """
    source = request.source
    if source.kind == EMBEDDED and table.embedded:
        table = table.variant("embedded")
    elif source.kind == "file" and table.classes:
        table = table.variant("classes")
    if source.kind == EMBEDDED and table.offline and request.budget != "smoke":
        raise ValueError(
            f"--data is missing; the {request.budget} budget needs the folder of the paper's images "
            f"(only smoke runs without, or with --data {EMBEDDED})"
        )
    try:
        return _cells_of(table, request)
    except EXPECTED as error:
        if source.kind != "folder" or not table.classes:
            raise
        try:
            return _cells_of(table.variant("classes"), request)
        except EXPECTED as other:
            raise type(error)(f"{error}\n{other}") from error


def _cells_of(table: Table, request: Request) -> Cells:
    found: Cells = (table.hook("cells") or training_cells)(table, request)
    return found


def training_cells(table: Table, request: Request) -> Cells:
    """The rows and columns of a table as training runs."""
    problems: dict[str, Exception] = {}
    cells, left_out = [], []
    figures = table.read_figures()
    for column in table.columns:
        for row, arguments in table.rows.items():
            try:
                config, needs = configure(table, request, column, arguments)
            except FileNotFoundError as error:
                left_out.append(f"{row}, {column}: {error}")
                continue
            if (
                request.check
                and column not in problems
                and (problem := _problem(table, request, column, arguments, config))
            ):
                problems[column] = problem
            if column not in problems:
                job = functools.partial(_training, table, config, needs, f"{table.title}; {row}, {column}")
                cells.append(
                    Cell(row, column, figures, numbers(table, request, row, column, len(figures)), job, config)
                )
    if not cells:
        raise next(iter(problems.values()), FileNotFoundError("\n".join(left_out)))
    return Cells(table, tuple(cells), (*(f"{column}: {problem}" for column, problem in problems.items()), *left_out))


def _training(table: Table, config: Any, needs: tuple[Job, ...], title: str, seed: int) -> Job:
    config = copy.deepcopy(config)
    config.seed = seed
    return training_job(table.method, config, METHODS[table.method].train, f"{title}, seed {seed}", needs)


def _problem(table: Table, request: Request, column: str, arguments: Arguments, config: Any) -> Exception | None:
    """Why a row in a column cannot have its images."""
    source = request.source
    if source.kind == EMBEDDED:
        return None
    if source.kind == "folder":
        return source.problem(table.method, config.data.name, config.data)
    own, _ = configure(table, replace(request, source=Source(None)), column, arguments, placed=False)
    return source.problem(table.method, own.data.name, config.data)


def numbers(table: Table, request: Request, row: str, column: str, count: int = 1) -> tuple[str, ...]:
    """What the paper has in a cell, where the images are the paper's."""
    found = table.numbers.get(column, {}).get(row) if request.source.kind == "folder" else None
    return tuple(found) if found else ("-",) * count


def configure(
    table: Table, request: Request, column: str, arguments: Arguments, *, placed: bool = True
) -> tuple[Any, tuple[Job, ...]]:
    """The configuration of a row in a column with the first seed, and the jobs that it needs.

    Raises:
        FileNotFoundError: it starts from SwAV's weights, which are not there.
    """
    source, budget = request.source, table.budget(request.budget)
    start = "" if placed and "{swav" in table.start and source.swav_weights() is None else table.start
    place = source.arguments if source.path is not None else words(table.offline) if placed else ()
    everything = [
        *words(table.columns[column]),
        *budget.arguments,
        *words(start),
        *words(arguments),
        *place,
        *request.settings,
        "--seed",
        "1",
    ]
    needs: tuple[Job, ...] = ()
    if any("{swav}" in each for each in everything):
        needs = (_fine_tuning(table, request, column),)
    fill = {
        "data": lambda: source.path or "none",
        "swav": lambda: str(request.jobs / needs[0].name / "backbone.pt"),
        "swav_file": lambda: _swav_file(request),
        "all": lambda: str(_count_images(table, request, column)),
        "steps": lambda: str(configure(table, request, column, "--student mining")[0].steps),
    }
    return parse_config(table.method, _config_first([_filled(each, fill) for each in everything]))[0], needs


def _filled(argument: str, fill: Mapping[str, Callable[[], str]]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: fill[found[1]](), argument)


def _config_first(arguments: Sequence[str]) -> list[str]:
    """The last --config before everything else, which it would replace."""
    pairs = list(zip(arguments[::2], arguments[1::2], strict=True))
    configs = [pair for pair in pairs if pair[0] == "--config"][-1:]
    return [each for pair in (*configs, *(pair for pair in pairs if pair[0] != "--config")) for each in pair]


def _swav_file(request: Request) -> str:
    weights = request.source.swav_weights()
    if weights is None:
        raise FileNotFoundError(f"no {SWAV_FILE} in --data")
    return str(weights)


def _fine_tuning(table: Table, request: Request, column: str) -> Job:
    """SwAV on all training images of a column, without their labels."""
    arguments = [
        *words(table.swav[column]),
        *(words(table.swav_smoke) if request.budget == "smoke" else ()),
        "--seed",
        "1",
    ]
    place = [position for position, each in enumerate(arguments) if each == "{place}"]
    for position in place:
        arguments[position : position + 1] = request.source.arguments
    fill = {"data": lambda: str(request.source.path), "swav_file": lambda: _swav_file(request)}
    config, _ = parse_config("swav", [_filled(each, fill) for each in arguments])
    return training_job("swav", config, train_swav, f"{table.title}: fine-tuning by SwAV, {column}")


def _count_images(table: Table, request: Request, column: str) -> int:
    config, _ = configure(table, request, column, "")
    return len(data.load_dataset(config.data.name, config.data.root).train) if request.check else config.data.labels


def run_table(table: Table, request: Request) -> tuple[Record, bool]:
    """Runs what ``request`` chooses, from what earlier calls left, leaves record.json and report.md in its place, and
    returns the record and whether all that was chosen came to an end.

    Raises:
        KeyboardInterrupt: a run was stopped; its checkpoint is kept.
    """
    found = find_cells(table, request)
    for each in found.left_out:
        print(f"Left out: {each}", flush=True)
    table, cells, seeds = found.table, found.cells, seeds_of(found.table, request)
    jobs = {(cell, seed): cell.job(seed) for cell in cells for seed in seeds}
    chosen = set(choose(jobs, request))
    outcomes = run_jobs(request.jobs, jobs.values(), chosen=lambda job: job.name in chosen)
    values = {place: outcomes[job.name] for place, job in jobs.items()}
    out = request.place(table.name)
    result = Result()
    if this_rank()[0] == 0:
        out.mkdir(parents=True, exist_ok=True)
        with alone():
            hook = table.hook("after")
            result = hook(table, request, cells, values) if hook else Result()
            plots = draw(
                table, out, cells, {place: outcome.value for place, outcome in values.items() if outcome.finished}
            )
    else:
        plots = ()
    entries = (
        *(entry for cell in cells for entry in entries_of(cell, {seed: values[cell, seed] for seed in seeds})),
        *result.entries,
        *quoted_entries(table, request, cells),
    )
    record = Record(
        name=table.name,
        title=table.title,
        paper=table.paper,
        budget=request.budget,
        data=_data_in_words(request, cells),
        seeds=tuple(seeds),
        command=request.command(table.name),
        entries=entries,
        plots=(*plots, *result.plots),
        deviations=(*_deviations(table, request), *(f"Left out: {each}" for each in found.left_out)),
        notes="\n\n".join(each for each in (table.notes, result.notes) if each),
        seconds=sum(each.seconds for each in outcomes.values()),
        machine=machine(),
        versions=versions(),
        claims=table.read_claims() if table.claims else (),
    )
    if this_rank()[0] == 0:
        write_record(out, record)
        write_atomically(out / "report.md", record_page(record))
    return record, all(outcomes[name].finished for name in chosen)


def quoted_entries(table: Table, request: Request, cells: Sequence[Cell]) -> list[Entry]:
    """The paper's rows that are not run, in the columns of ``cells``, where the images are the paper's."""
    entries = []
    for column in dict.fromkeys(cell.column for cell in cells) if request.source.kind == "folder" else ():
        for row, texts in table.quoted.get(column, {}).items():
            for figure, text in zip(table.read_figures(), texts, strict=True):
                entries.append(Entry(row, column, figure.title, figure.unit, text, (), run=False))
    return entries


def seeds_of(table: Table, request: Request) -> tuple[int, ...]:
    return request.seeds or tuple(range(1, table.budget(request.budget).seeds + 1))


def choose(jobs: Mapping[tuple[Cell, int], Job], request: Request) -> list[str]:
    """The names of the jobs of the rows, columns and the shard that are asked for. What needs the same job is in the
    same shard.

    Raises:
        ValueError: there is no such row or column.
    """
    for option, names, attribute in (("--rows", request.rows, "row"), ("--columns", request.columns, "column")):
        there = list(dict.fromkeys(getattr(cell, attribute) for cell, _ in jobs))
        for name in names:
            if name not in there:
                raise ValueError(unknown(f"{option} has {name!r}", name, there))
    wanted = {
        job.name: next(iter(with_needs([job])))
        for (cell, _), job in jobs.items()
        if (not request.rows or cell.row in request.rows) and (not request.columns or cell.column in request.columns)
    }
    first, count = request.shard
    mine = list(dict.fromkeys(wanted.values()))[first::count]
    return [name for name, root in wanted.items() if root in mine]


def entries_of(cell: Cell, outcomes: Mapping[int, Outcome]) -> list[Entry]:
    """An entry for each figure; a figure that a job does not have is a dash."""
    failed = tuple(each.error for each in outcomes.values() if each.error is not None)
    entries = []
    for figure, paper in zip(cell.figures, cell.paper, strict=True):
        found = {seed: figure.of(each.value) for seed, each in outcomes.items() if each.finished}
        values = {seed: value for seed, value in found.items() if value is not None}
        entries.append(
            Entry(
                cell.row, cell.column, figure.title, figure.unit, paper, tuple(values.values()), failed, tuple(values)
            )
        )
    return entries


class Cost(NamedTuple):
    """Of a job, as far as is known."""

    title: str
    state: str
    steps: int | None
    images: int | None
    """That pass through the network, over all steps."""
    seconds_per_step: float | None
    """Of finished jobs of the same network, data and batches in the same folder."""

    @property
    def seconds(self) -> float | None:
        return None if self.steps is None or self.seconds_per_step is None else self.steps * self.seconds_per_step


def costs(table: Table, request: Request) -> list[Cost]:
    """What the jobs that ``request`` chooses, and those that they need, cost."""
    found = find_cells(table, request)
    jobs = {(cell, seed): cell.job(seed) for cell in found.cells for seed in seeds_of(found.table, request)}
    chosen = set(choose(jobs, request))
    measured = _measured(request.jobs)
    return [
        _cost(job, request, measured) for job in with_needs(job for job in jobs.values() if job.name in chosen).values()
    ]


def _cost(job: Job, request: Request, measured: Mapping[str, float]) -> Cost:
    outcome = outcome_of(request.jobs, job.name, job)
    state = "finished" if outcome.finished else "failed" if outcome.error else "to run"
    if job.config is None:
        return Cost(job.title, state, None, None, None)
    steps = outcome.value["steps"] if outcome.finished else getattr(job.config, "steps", None)
    per_step = job.config.batch_size * (
        1 + getattr(job.config, "mu", 1 if hasattr(job.config.data, "unlabeled_name") else 0)
    )
    return Cost(job.title, state, steps, None if steps is None else steps * per_step, measured.get(job.like or ""))


def _measured(folder: Path) -> dict[str, float]:
    """Seconds a step by what jobs are alike in, from the finished jobs in ``folder``."""
    seconds: dict[str, list[float]] = {}
    for path in folder.glob(f"*/{FILE}"):
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["status"] == "finished" and state.get("like") and state["value"]["steps"]:
            seconds.setdefault(state["like"], []).append(state["seconds"] / state["value"]["steps"])
    return {like: statistics.median(values) for like, values in seconds.items()}


def _data_in_words(request: Request, cells: Sequence[Cell]) -> str:
    if request.source.kind == "file":
        return request.source.label
    names = dict.fromkeys(cell.config.data.name if cell.config is not None else cell.column for cell in cells)
    return f"{', '.join(names)}{' (inside packages)' if request.source.kind == EMBEDDED else ''}"


def _deviations(table: Table, request: Request) -> tuple[str, ...]:
    budget, embedded = table.budget(request.budget), request.source.kind == EMBEDDED
    arguments = (*budget.arguments, *(words(table.offline) if embedded else ()), *request.settings)
    said = []
    if embedded:
        said.append(
            "No folder of images was given: the images come inside packages, in miniature, and cells that differ in"
            " their images alone are one run."
        )
    if request.source.kind == "file":
        said.append(
            "The images are the arrays of a file, for which nothing says that they are those of the published set."
        )
    if arguments:
        purpose = "; this shows that it runs, not what it reaches" if request.budget == "smoke" else ""
        pairs = dict(zip(arguments[::2], arguments[1::2], strict=True))
        words_ = " ".join(f"{setting} {value}" for setting, value in pairs.items())
        said.append(f"Budget {request.budget}: {len(seeds_of(table, request))} seed(s), {words_}{purpose}.")
    return (*said, *flat(table.deviations))


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
