# SPDX-License-Identifier: BSD-3-Clause
"""The one engine of all tables: its cells, the jobs of these and their seeds, entries from what came out, and the
record of it all.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import shlex
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    pieces_of,
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
        options = [("--data", self.source.label), ("--budget", self.budget)]
        options += [("--rows", row) for row in self.rows]
        options += [("--columns", column) for column in self.columns]
        options += [("--seeds", ",".join(map(str, self.seeds)))] if self.seeds else []
        options += [("--set", f"{key[2:]}={value}") for key, value in pairs]
        return shlex.join(["ssmkernels", "reproduce", name, *itertools.chain(*options)])

    def place(self, name: str) -> Path:
        """The folder of a table's record: settings make another table of it."""
        pairs = zip(self.settings[::2], self.settings[1::2], strict=True)
        changed = re.sub(r"[^\w.,=+-]+", "_", "".join(f"-{key[2:]}={value}" for key, value in pairs))
        if len(changed) > 100:  # names of folders are limited
            changed = f"-{hashlib.sha256(changed.encode()).hexdigest()[:12]}"
        return self.out / f"{name}-{self.budget}{changed}"


class Cells(NamedTuple):
    """The cells of a table that can have their images, and what is missing of the others."""

    table: Table
    """In the variant that is run."""
    cells: tuple[Cell, ...]
    left_out: tuple[str, ...] = ()


class Result(NamedTuple):
    """What an analysis makes of finished cells."""

    entries: tuple[Entry, ...] = ()
    plots: tuple[Plot, ...] = ()
    notes: str = ""


class Plan(NamedTuple):
    """What a call is about."""

    table: Table
    cells: tuple[Cell, ...]
    left_out: tuple[str, ...]
    seeds: tuple[int, ...]
    jobs: dict[tuple[Cell, int], Job]
    """Of the table: one for each cell and seed."""
    chosen: set[str]
    """The names of those that are asked for."""


def plan(table: Table, request: Request) -> Plan:
    """The cells of ``table``, their jobs, and which of these are asked for: the rows, columns and seeds, and the
    shard; what needs the same job is in the same shard.

    Raises:
        FileNotFoundError, ValueError, ImportError: none of the images can be had, or a setting, row or column is wrong.
    """
    table, cells, left_out = find_cells(table, request)
    seeds = request.seeds or tuple(range(1, table.budget(request.budget).seeds + 1))
    for option, names, attribute in (("--rows", request.rows, "row"), ("--columns", request.columns, "column")):
        in_table = list(dict.fromkeys(getattr(cell, attribute) for cell in cells))
        for name in names:
            if name not in in_table:
                raise ValueError(unknown(f"{option} has {name!r}", name, in_table))
    jobs = {(cell, seed): cell.job(seed) for cell in cells for seed in seeds}
    first_needed = {
        job.name: next(iter(with_needs([job])))
        for (cell, _), job in jobs.items()
        if (not request.rows or cell.row in request.rows) and (not request.columns or cell.column in request.columns)
    }
    number, shards = request.shard
    in_shard = set(list(dict.fromkeys(first_needed.values()))[number::shards])
    chosen = {name for name, needed in first_needed.items() if needed in in_shard}
    return Plan(table, cells, left_out, seeds, jobs, chosen)


def find_cells(table: Table, request: Request) -> Cells:
    """The cells of ``table``, in the variant that its images ask for.

    Raises:
        FileNotFoundError, ValueError, ImportError: none of the images can be had, or a setting is wrong.
    """
    kind = request.source.kind
    if kind == EMBEDDED and table.embedded:
        table = table.variant("embedded")
    elif kind == "file" and table.classes:
        table = table.variant("classes")
    if kind == EMBEDDED and table.offline and request.budget != "smoke":
        raise ValueError(
            f"--data is missing; the {request.budget} budget needs the folder of the paper's images "
            f"(only smoke runs without, or with --data {EMBEDDED})"
        )
    try:
        return _cells_of(table, request)
    except EXPECTED as error:
        if kind != "folder" or not table.classes:
            raise
        try:
            return _cells_of(table.variant("classes"), request)
        except EXPECTED as other:
            raise type(error)(f"{error}\n{other}") from error


def _cells_of(table: Table, request: Request) -> Cells:
    cells: Cells = (table.hook("cells") or training_cells)(table, request)
    return cells


def cells_of_columns(
    table: Table,
    columns: Iterable[str],
    request: Request,
    problem: Callable[[str], Exception | None],
    cells_of: Callable[[str], Iterable[Cell]],
) -> Cells:
    """The cells of the columns without a ``problem``; the problems of the others.

    Raises:
        FileNotFoundError, ValueError, ImportError: every column has one.
    """
    columns = list(columns)
    problems = {column: error for column in columns if request.check and (error := problem(column)) is not None}
    if columns and len(problems) == len(columns):
        raise type(problems[columns[0]])("\n".join(dict.fromkeys(map(str, problems.values()))))
    cells = tuple(cell for column in columns if column not in problems for cell in cells_of(column))
    return Cells(table, cells, tuple(f"{column}: {error}" for column, error in problems.items()))


def training_cells(table: Table, request: Request) -> Cells:
    """The rows and columns of a table as training runs."""
    figures = table.read_figures()
    without_weights: list[str] = []

    def problem(column: str) -> Exception | None:
        """The rows of a column have the same images."""
        arguments = next(iter(table.rows.values()))
        config, _ = configure(table, request, column, arguments)
        if request.source.kind != "file":
            return request.source.problem(table.method, config.data.name, config.data)
        papers, _ = configure(table, replace(request, source=Source(None)), column, arguments, placed=False)
        return request.source.problem(table.method, papers.data.name, config.data)

    def cells_of(column: str) -> Iterator[Cell]:
        for row, arguments in table.rows.items():
            try:
                config, needs = configure(table, request, column, arguments)
            except FileNotFoundError as error:
                without_weights.append(f"{row}, {column}: {error}")
                continue
            paper = numbers(table, request, row, column, len(figures))
            job = functools.partial(_training, table, request, config, needs, f"{table.title}; {row}, {column}")
            yield Cell(row, column, figures, paper, job, config)

    cells = cells_of_columns(table, table.columns, request, problem, cells_of)
    return cells._replace(left_out=(*cells.left_out, *without_weights))


def _training(table: Table, request: Request, config: Any, needs: tuple[Job, ...], title: str, seed: int) -> Job:
    config = copy.deepcopy(config)
    config.seed = seed
    devices = table.budget(request.budget).devices
    return training_job(
        table.method, config, METHODS[table.method].train, f"{title}, seed {seed}", needs, devices=devices
    )


def numbers(table: Table, request: Request, row: str, column: str, count: int = 1) -> tuple[str, ...]:
    """What the paper has in a cell, where the images are the paper's."""
    texts = table.numbers.get(column, {}).get(row) if request.source.kind == "folder" else None
    return tuple(texts) if texts else ("-",) * count


def configure(
    table: Table, request: Request, column: str, arguments: Arguments, *, placed: bool = True
) -> tuple[Any, tuple[Job, ...]]:
    """The configuration of a row in a column with the first seed, and the jobs that it needs.

    Args:
        placed: whether the images are those of ``request``, and not those that the table names.

    Raises:
        FileNotFoundError: it starts from SwAV's weights, which are not there.
    """
    source, budget = request.source, table.budget(request.budget)
    start = "" if placed and "{swav" in table.start and source.swav_weights() is None else table.start
    place = source.arguments if source.path is not None else words(table.offline) if placed else ()
    rest = (*words(start), *words(arguments), *place, *request.settings, "--seed", "1")
    everything = (*words(table.columns[column]), *budget.arguments, *rest)
    needs: tuple[Job, ...] = (_fine_tuning(table, request, column),) if "{swav}" in " ".join(everything) else ()
    fill = {
        **_places(request),
        "swav": lambda: str(request.jobs / needs[0].name / "backbone.pt"),
        "all": lambda: str(_count_images(table, request, column)),
        "steps": lambda: str(configure(table, request, column, "--student mining")[0].steps),
    }
    return parse_config(table.method, _config_first(_filled(everything, fill)))[0], needs


def _fine_tuning(table: Table, request: Request, column: str) -> Job:
    """SwAV on all training images of a column, without their labels."""
    smoke = words(table.swav_smoke) if request.budget == "smoke" else ()
    place = shlex.join(request.source.arguments)
    arguments = (*words(table.swav[column].replace("{place}", place)), *smoke, "--seed", "1")
    config, _ = parse_config("swav", _filled(arguments, _places(request)))
    return training_job("swav", config, train_swav, f"{table.title}: fine-tuning by SwAV, {column}")


def _places(request: Request) -> dict[str, Callable[[], str]]:
    """What ``{data}`` and ``{swav_file}`` in arguments stand for."""

    def swav_file() -> str:
        weights = request.source.swav_weights()
        if weights is None:
            raise FileNotFoundError(f"no {SWAV_FILE} in --data")
        return str(weights)

    return {"data": lambda: request.source.path or "none", "swav_file": swav_file}


def _filled(arguments: Iterable[str], fill: Mapping[str, Callable[[], str]]) -> list[str]:
    def value(match: re.Match[str]) -> str:
        return fill[match[1]]()

    return [re.sub(r"\{(\w+)\}", value, argument) for argument in arguments]


def _config_first(arguments: Sequence[str]) -> list[str]:
    """The last --config before everything else, which it would replace."""
    pairs = list(zip(arguments[::2], arguments[1::2], strict=True))
    configs = [pair for pair in pairs if pair[0] == "--config"][-1:]
    return [text for pair in (*configs, *(pair for pair in pairs if pair[0] != "--config")) for text in pair]


def _count_images(table: Table, request: Request, column: str) -> int:
    config, _ = configure(table, request, column, "")
    return len(data.load_dataset(config.data.name, config.data.root).train) if request.check else config.data.labels


def run_table(table: Table, request: Request) -> tuple[Record, bool]:
    """Runs what ``request`` chooses, from what earlier calls left, leaves record.json and report.md in its place, and
    returns the record and whether all that was chosen came to an end.

    Raises:
        KeyboardInterrupt: a run was stopped; its checkpoint is kept.
    """
    planned = plan(table, request)
    for missing in planned.left_out:
        print(f"Left out: {missing}", flush=True)
    outcomes = run_jobs(request.jobs, planned.jobs.values(), chosen=lambda job: job.name in planned.chosen)
    values = {place: outcomes[job.name] for place, job in planned.jobs.items()}
    complete = all(outcomes[name].finished for name in planned.chosen)
    if this_rank()[0] > 0:  # the first one writes for all
        return _record(planned, request, outcomes, entries_of_cells(planned, values), Result()), complete
    out = request.place(table.name)
    out.mkdir(parents=True, exist_ok=True)
    with alone():
        after = planned.table.hook("after")
        result = after(planned.table, request, planned.cells, values) if after else Result()
        entries = entries_of_cells(planned, values)
        plots = draw(planned.table, out, entries, _histories(planned, values))
    record = _record(planned, request, outcomes, entries, result._replace(plots=(*plots, *result.plots)))
    write_record(out, record)
    write_atomically(out / "report.md", record_page(record))
    return record, complete


def _record(
    planned: Plan, request: Request, outcomes: Mapping[str, Outcome], entries: Sequence[Entry], result: Result
) -> Record:
    table = planned.table
    return Record(
        name=table.name,
        title=table.title,
        paper=table.paper,
        budget=request.budget,
        data=_data_in_words(request, planned.cells),
        seeds=planned.seeds,
        command=request.command(table.name),
        entries=(*entries, *result.entries, *quoted_entries(table, request, planned.cells)),
        plots=result.plots,
        deviations=(*_deviations(planned, request), *(f"Left out: {missing}" for missing in planned.left_out)),
        notes="\n\n".join(text for text in (table.notes, result.notes) if text),
        seconds=sum(outcome.seconds for outcome in outcomes.values()),
        machine=machine(),
        versions=versions(),
        claims=table.read_claims(),
    )


def entries_of_cells(planned: Plan, values: Values) -> list[Entry]:
    return [
        entry
        for cell in planned.cells
        for entry in entries_of(cell, {seed: values[cell, seed] for seed in planned.seeds})
    ]


def entries_of(cell: Cell, outcomes: Mapping[int, Outcome]) -> list[Entry]:
    """An entry for each figure; a figure that a job does not have is a dash."""
    failed = tuple(outcome.error for outcome in outcomes.values() if outcome.error is not None)
    entries = []
    for figure, paper in zip(cell.figures, cell.paper, strict=True):
        by_seed = {seed: figure.of(outcome.value) for seed, outcome in outcomes.items() if outcome.finished}
        values = {seed: value for seed, value in by_seed.items() if value is not None}
        number = tuple(values.values())
        entries.append(Entry(cell.row, cell.column, figure.title, figure.unit, paper, number, failed, tuple(values)))
    return entries


def quoted_entries(table: Table, request: Request, cells: Sequence[Cell]) -> list[Entry]:
    """The paper's rows that are not run, in the columns of ``cells``, where the images are the paper's."""
    entries = []
    for column in dict.fromkeys(cell.column for cell in cells) if request.source.kind == "folder" else ():
        for row, texts in table.quoted.get(column, {}).items():
            for figure, text in zip(table.read_figures(), texts, strict=True):
                entries.append(Entry(row, column, figure.title, figure.unit, text, (), run=False))
    return entries


def _histories(planned: Plan, values: Values) -> dict[str, list[Any]]:
    """The evaluations of finished trainings, by the line of a plot that they make."""
    histories: dict[str, list[Any]] = {}
    for (cell, _), outcome in values.items():
        if isinstance(outcome.value, Mapping) and "history" in outcome.value:
            histories.setdefault(f"{cell.row}, {cell.column}", []).append(outcome.value["history"])
    return histories


class Cost(NamedTuple):
    """Of a job, as far as is known."""

    title: str
    state: str
    batch: str = "-"
    """Images of a step, in how many pieces, and the arithmetic."""
    steps: int | None = None
    images: int | None = None
    """That pass through the network, over all steps."""
    seconds_per_step: float | None = None
    """Of finished jobs of the same network, data and batches in the same folder."""

    @property
    def seconds(self) -> float | None:
        return None if self.steps is None or self.seconds_per_step is None else self.steps * self.seconds_per_step


def costs(table: Table, request: Request) -> list[Cost]:
    """What the jobs that ``request`` chooses, and those that they need, cost."""
    planned = plan(table, request)
    measured = _measured(request.jobs)
    jobs = with_needs(job for job in planned.jobs.values() if job.name in planned.chosen)
    return [_cost(job, request, measured) for job in jobs.values()]


def _cost(job: Job, request: Request, measured: Mapping[str, float]) -> Cost:
    outcome, config = outcome_of(request.jobs, job), job.config
    state = "finished" if outcome.finished else "failed" if outcome.error else "to run"
    if config is None:
        return Cost(job.title, state)
    steps = outcome.value["steps"] if outcome.finished else getattr(config, "steps", None)
    unlabeled = config.batch_size * getattr(config, "mu", 1 if hasattr(config.data, "unlabeled_name") else 0)
    pieces = pieces_of(config, job.devices) * this_rank()[1]
    batch = f"{pieces} x ({config.batch_size // pieces} + {unlabeled // pieces}), {config.precision}"
    images = None if steps is None else steps * (config.batch_size + unlabeled)
    return Cost(job.title, state, batch, steps, images, measured.get(job.like or ""))


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


def _deviations(planned: Plan, request: Request) -> Iterator[str]:
    table, kind = planned.table, request.source.kind
    if kind == EMBEDDED:
        yield (
            "No folder of images was given: the images come inside packages, in miniature, and cells that differ in"
            " their images alone are one run."
        )
    if kind == "file":
        yield "The images are the arrays of a file, for which nothing says that they are those of the published set."
    offline = words(table.offline) if kind == EMBEDDED else ()
    arguments = (*table.budget(request.budget).arguments, *offline, *request.settings)
    if arguments:
        purpose = "; this shows that it runs, not what it reaches" if request.budget == "smoke" else ""
        pairs = dict(zip(arguments[::2], arguments[1::2], strict=True))
        settings = " ".join(f"{setting} {value}" for setting, value in pairs.items())
        yield f"Budget {request.budget}: {len(planned.seeds)} seed(s), {settings}{purpose}."
    yield from flat(table.deviations)


@functools.cache
def machine() -> str:
    """The processors and devices here, in words."""
    here = info.collect()
    devices = (here["torch"] or {}).get("devices") or here["cuda"]["devices"]
    names = [device["name"] for device in devices]
    gpus = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return f"{os.cpu_count()} x {here['cpu']['model']}, {gpus or 'no GPU'}"


def versions() -> dict[str, str]:
    """Of the packages that results may depend on."""
    installed = {"ssmkernels": __version__}
    for name in ("torch", "torchvision", "numpy", "scikit-learn", "lightning-fabric", "faiss-cpu"):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
