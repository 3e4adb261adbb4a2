# SPDX-License-Identifier: BSD-3-Clause
"""The one engine of all tables: its cells, the jobs of these and their seeds, entries from what came out, and the
record of it all.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ssmkernels import data
from ssmkernels._files import write_atomically
from ssmkernels._locks import folder_lock
from ssmkernels._names import unknown
from ssmkernels.experiments.jobs import EXPECTED, FOLDER, Job, Outcome, run_jobs, training_job, with_needs
from ssmkernels.experiments.plots import draw
from ssmkernels.experiments.record import Entry, Plot, Record, write_record
from ssmkernels.experiments.report import record_page
from ssmkernels.experiments.sources import EMBEDDED, SWAV_FILE, Source
from ssmkernels.experiments.spec import Arguments, Cell, Table, flat, words
from ssmkernels.info import machine_in_words, versions
from ssmkernels.trainers.cli import parse_config
from ssmkernels.trainers.ranks import alone, this_rank

PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "lightning-fabric", "faiss-cpu")
"""That results may depend on."""
Values = Mapping[tuple[Cell, int], Outcome]


@dataclass(frozen=True)
class Request:
    """What a call of ``reproduce`` asks for.

    Args:
        rows, columns: of which cells are run; all of them if empty.
        seeds: that are run; those of the budget if empty.
        settings: of ``ssmkernels train``, as KEY=VALUE, that come after all others.
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

    @property
    def arguments(self) -> tuple[str, ...]:
        """The settings as ``ssmkernels train`` takes them."""
        return tuple(flat([f"--{setting}".split("=", 1) for setting in self.settings]))

    def command(self, name: str) -> str:
        options = [("--data", self.source.label), ("--budget", self.budget)]
        options += [("--rows", row) for row in self.rows] + [("--columns", column) for column in self.columns]
        options += [("--seeds", ",".join(map(str, self.seeds)))] if self.seeds else []
        options += [("--set", setting) for setting in self.settings]
        return shlex.join(["ssmkernels", "reproduce", name, *itertools.chain(*options)])

    def place(self, name: str) -> Path:
        """The folder of a table's record: settings make another table of it."""
        changed = re.sub(r"[^\w.,=+-]+", "_", "".join(f"-{setting}" for setting in self.settings))
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
    kind, path = request.source.kind, Path(request.source.path or "")
    if kind == "folder" and request.check and not path.is_dir():
        raise FileNotFoundError(f"--data is {str(path)!r}, which is no folder")
    variants = {EMBEDDED: [table.variant("embedded")], "file": [table.variant("classes")], "folder": [table]}[kind]
    if kind == "folder" and table.classes:
        variants.append(table.variant("classes"))
    if kind == EMBEDDED and variants[0].offline and request.budget != "smoke":
        raise ValueError(
            f"--data is missing; the {request.budget} budget needs the folder of the paper's images "
            f"(only smoke runs without, or with --data {EMBEDDED})"
        )
    errors = []
    for variant in variants:
        try:
            return (variant.hook("cells") or training_cells)(variant, request)
        except EXPECTED as error:
            errors.append(error)
    raise type(errors[0])("\n".join(map(str, errors)))


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
        as_in_paper = replace(table, offline="", start="")
        papers, _ = configure(as_in_paper, replace(request, source=Source(None)), column, arguments)
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
    return training_job(table.method, config, f"{title}, seed {seed}", needs, devices=devices)


def numbers(table: Table, request: Request, row: str, column: str, count: int = 1) -> tuple[str, ...]:
    """What the paper has in a cell, where the images are the paper's."""
    texts = table.numbers.get(column, {}).get(row) if request.source.kind == "folder" else None
    return tuple(texts) if texts else ("-",) * count


def configure(table: Table, request: Request, column: str, arguments: Arguments) -> tuple[Any, tuple[Job, ...]]:
    """The configuration of a row in a column with the first seed, and the jobs that it needs.

    Raises:
        FileNotFoundError: it starts from SwAV's weights, which are not there.
    """
    source, budget = request.source, table.budget(request.budget)
    start = "" if "{swav" in table.start and source.swav_weights() is None else table.start
    place = words(table.offline) if source.path is None else source.arguments
    rest = (*words(start), *words(arguments), *place, *request.arguments, "--seed", "1")
    everything = (*words(table.columns[column]), *budget.arguments, *rest)
    needs: tuple[Job, ...] = (_fine_tuning(table, request, column),) if "{swav}" in " ".join(everything) else ()
    filled = _filled(everything, table, request, column)
    return parse_config(table.method, _config_first(filled))[0], needs


def _fine_tuning(table: Table, request: Request, column: str) -> Job:
    """SwAV on all training images of a column, without their labels."""
    smoke = words(table.swav_smoke) if request.budget == "smoke" else ()
    arguments = (*words(table.swav[column]), *request.source.arguments, *smoke, "--seed", "1")
    config, _ = parse_config("swav", _filled(arguments, table, request, column))
    return training_job("swav", config, f"{table.title}: fine-tuning by SwAV, {column}")


def _filled(arguments: Iterable[str], table: Table, request: Request, column: str) -> list[str]:
    """Arguments with what stands for the names in braces."""
    source = request.source

    def meaning(name: re.Match[str]) -> str:
        if name[1] == "data":
            return source.path or "none"
        if name[1] == "swav":
            return str(request.jobs / _fine_tuning(table, request, column).name / "backbone.pt")
        if name[1] == "steps":
            return str(configure(table, request, column, "--student mining")[0].steps)
        if name[1] == "all":
            images = configure(table, request, column, "")[0].data
            return str(len(data.load_dataset(images.name, images.root).train) if request.check else images.labels)
        if source.swav_weights() is None:
            raise FileNotFoundError(f"no {SWAV_FILE} in --data")
        return str(source.swav_weights())

    return [re.sub(r"\{(data|swav|steps|all|swav_file)\}", meaning, argument) for argument in arguments]


def _config_first(arguments: Sequence[str]) -> list[str]:
    """The last --config before everything else, which it would replace."""
    pairs = list(zip(arguments[::2], arguments[1::2], strict=True))
    configs = [pair for pair in pairs if pair[0] == "--config"]
    return flat([*configs[-1:], *(pair for pair in pairs if pair[0] != "--config")])


def run_table(table: Table, request: Request) -> bool:
    """Runs what ``request`` chooses, from what earlier calls left, leaves record.json and report.md in its place, and
    returns whether all that was chosen came to an end.

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
        return complete
    out = request.place(table.name)
    with alone(), folder_lock(out, wait=True):
        after = planned.table.hook("after")
        result = after(planned.table, request, planned.cells, values) if after else Result()
        entries: list[Entry] = []
        for cell in planned.cells:
            entries += entries_of(cell, {seed: values[cell, seed] for seed in planned.seeds})
        plots = draw(planned.table, out, entries, _histories(planned, values))
        entries += result.entries
        record = _record(planned, request, outcomes, entries, (*plots, *result.plots))
        write_record(out, record)
        write_atomically(out / "report.md", record_page(record))
    return complete


def _record(
    planned: Plan, request: Request, outcomes: Mapping[str, Outcome], entries: Sequence[Entry], plots: tuple[Plot, ...]
) -> Record:
    table = planned.table
    return Record(
        name=table.name,
        title=table.title,
        paper=table.paper,
        budget=request.budget,
        data=_data_in_words(request, [cell for cell in planned.cells if _has_run(planned, cell, outcomes)]),
        seeds=planned.seeds,
        command=request.command(table.name),
        entries=(*entries, *quoted_entries(table, request, entries)),
        plots=plots,
        deviations=(*_deviations(planned, request), *(f"Left out: {missing}" for missing in planned.left_out)),
        notes=table.notes,
        seconds=sum(outcome.seconds for outcome in outcomes.values()),
        machine=machine_in_words(),
        versions=versions(PACKAGES),
        claims=table.read_claims(),
    )


def _has_run(planned: Plan, cell: Cell, outcomes: Mapping[str, Outcome]) -> bool:
    """Whether a seed of the cell was asked for now or finished earlier."""
    names = [planned.jobs[cell, seed].name for seed in planned.seeds]
    return any(name in planned.chosen or outcomes[name].finished for name in names)


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


def quoted_entries(table: Table, request: Request, entries: Sequence[Entry]) -> list[Entry]:
    """The paper's rows that are not run, in the columns of ``entries``, where the images are the paper's."""
    quoted = []
    for column in dict.fromkeys(entry.column for entry in entries) if request.source.kind == "folder" else ():
        figures = dict.fromkeys((entry.figure, entry.unit) for entry in entries if entry.column == column)
        for row, texts in table.quoted.get(column, {}).items():
            for (figure, unit), text in zip(figures, texts, strict=True):
                quoted.append(Entry(row, column, figure, unit, text, (), run=False))
    return quoted


def _histories(planned: Plan, values: Values) -> dict[str, list[Any]]:
    """The evaluations of finished trainings, by the line of a plot that they make."""
    histories: dict[str, list[Any]] = {}
    for (cell, _), outcome in values.items():
        if isinstance(outcome.value, Mapping) and "history" in outcome.value:
            histories.setdefault(f"{cell.row}, {cell.column}", []).append(outcome.value["history"])
    return histories


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
    arguments = (*table.budget(request.budget).arguments, *offline, *request.arguments)
    if arguments:
        purpose = "; this shows that it runs, not what it reaches" if request.budget == "smoke" else ""
        pairs = dict(zip(arguments[::2], arguments[1::2], strict=True))
        settings = " ".join(f"{setting} {value}" for setting, value in pairs.items())
        yield f"Budget {request.budget}: {len(planned.seeds)} seed(s), {settings}{purpose}."
    yield from flat(table.deviations)
