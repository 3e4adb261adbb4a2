# SPDX-License-Identifier: BSD-3-Clause
"""What ``reproduce --dry-run`` shows: the jobs of a call, how far they are, and what they take."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssmkernels._text import duration, markdown_table
from ssmkernels.experiments.jobs import EXPECTED, FILE, Job, Outcome, outcome_of, pieces_of, read_outcome, with_needs
from ssmkernels.experiments.run import Request, plan
from ssmkernels.experiments.spec import Table
from ssmkernels.trainers.cli import METHODS
from ssmkernels.trainers.ranks import this_rank
from ssmkernels.trainers.step_memory import StepMemory, step_memory

HEADER = ("job", "state", "images a step", "steps", "images", "MiB a step", "s a step", "time")
MEMORY_HEADER = ("MiB of a step, its peak", *StepMemory._fields, "total")
NO_MEMORY = ("seed", "steps", "run", "weights", "learning_rate", "weight_decay")
"""Settings that memory does not depend on, and those of the data below."""
NO_MEMORY_OF_DATA = ("root", "unlabeled_root", "labels_file", "classes_file", "fold")
LABELS = ("labels", "proportional", "labels_in_unlabeled")
"""That memory depends on where labelled embeddings are kept."""


def estimate(table: Table, request: Request) -> str:
    """The jobs that ``request`` chooses, with those that they need, and the time of those that are still to run.

    Images of a step are those that the losses are of, in as many pieces as pass through the network one after another,
    with the precision. Seconds a step are the median of finished jobs in the same folder that are alike: of the same
    network, data and batches. MiB are those of a step on each device, see :mod:`ssmkernels.trainers.step_memory`; a
    second table has their parts, a row for all jobs that take the same. A dash is what is not known.
    """
    planned = plan(table, request)
    measured = _seconds_per_step(request.jobs)
    rows, left, times = [], 0, []
    jobs = with_needs(job for job in planned.jobs.values() if job.name in planned.chosen)
    memory = _memory(jobs.values())
    for job in jobs.values():
        outcome, per_step = outcome_of(request.jobs, job), measured.get(job.like or "")
        steps, images, of_step = _steps(job, outcome), _images_per_step(job.config), memory[job.name]
        seconds = None if steps is None or per_step is None else steps * per_step
        if not outcome.finished:
            left += 1
            times += [] if seconds is None else [seconds]
        rows.append(
            [
                job.title,
                "finished" if outcome.finished else "failed" if outcome.error else "to run",
                _batch(job),
                "-" if steps is None else f"{steps:,}",
                "-" if steps is None or images is None else f"{steps * sum(images):,}",
                "-" if of_step is None else f"{of_step.total / 2**20:,.1f}",
                "-" if per_step is None else f"{per_step:.3g}",
                "-" if seconds is None else duration(seconds),
            ]
        )
    taken = f"{len(times)} of them, whose like have been timed here, take {duration(sum(times))}"
    missing = "".join(f"Left out: {missing}\n" for missing in planned.left_out)
    return (
        f"{missing}{markdown_table(HEADER, rows)}\n{left} of {len(jobs)} jobs are to run;"
        f" {taken if times else 'the like of none of them has been timed here'}.{_memory_table(jobs, memory)}"
    )


def _steps(job: Job, outcome: Outcome) -> int | None:
    """Of a training; those of mixed label propagation are known when it is finished, as they depend on the images."""
    if job.config is None:
        return None
    if outcome.finished:
        return int(outcome.value["steps"])
    folds = job.config.data.folds if getattr(job.config.data, "fold", 0) is None else 1
    return folds * job.config.steps if hasattr(job.config, "steps") else None


def _images_per_step(config: Any) -> tuple[int, int] | None:
    """Labelled and unlabelled ones, of all ranks together."""
    if config is None:
        return None
    unlabeled = getattr(config, "mu", 1) if getattr(config, "uses_unlabeled", False) else 0
    return config.batch_size, unlabeled * config.batch_size


def _batch(job: Job) -> str:
    images = _images_per_step(job.config)
    if images is None:
        return "-"
    pieces = pieces_of(job.config, job.devices) * this_rank()[1]
    labeled, unlabeled = (count // pieces for count in images)
    return f"{pieces} x ({labeled} + {unlabeled}), {job.config.precision}"


def _memory(jobs: Iterable[Job]) -> dict[str, StepMemory | None]:
    """Of a step of each job, by its name; None of those that train nothing, where images of unknown size or a package
    are missing, and where values decide how much it is, as of the pairs that SLADE's multi-similarity loss is given.
    """
    known: dict[str, StepMemory | None] = {}
    of_jobs: dict[str, StepMemory | None] = {}
    for job in jobs:
        if job.config is None:
            of_jobs[job.name] = None
            continue
        settings = {name: value for name, value in asdict(job.config).items() if name not in NO_MEMORY}
        left_out = NO_MEMORY_OF_DATA if getattr(job.config, "uses_memory", False) else NO_MEMORY_OF_DATA + LABELS
        settings["data"] = {name: value for name, value in settings["data"].items() if name not in left_out}
        key = json.dumps([type(job.config).__name__, settings, job.devices])
        if key not in known:
            known[key] = _memory_of(job)
        of_jobs[job.name] = known[key]
    return of_jobs


def _memory_of(job: Job) -> StepMemory | None:
    ranks = this_rank()[1]
    (method,) = (name for name, method in METHODS.items() if type(job.config) is method.config)
    try:
        return step_memory(method, job.config, pieces=pieces_of(job.config, job.devices), ranks=ranks)
    except (*EXPECTED, RuntimeError):  # the latter from an op that has no shapes alone
        return None


def _memory_table(jobs: Mapping[str, Job], memory: Mapping[str, StepMemory | None]) -> str:
    """Nothing where nothing is known."""
    alike: dict[StepMemory, list[str]] = {}
    for job in jobs.values():
        of_job = memory[job.name]
        if of_job is not None:
            alike.setdefault(of_job, []).append(job.title)
    rows = [
        [titles[0] + (f" and {len(titles) - 1} more" if len(titles) > 1 else "")]
        + [f"{part / 2**20:,.1f}" for part in (*of_jobs, of_jobs.total)]
        for of_jobs, titles in alike.items()
    ]
    return f"\n\n{markdown_table(MEMORY_HEADER, rows)}" if rows else ""


def _seconds_per_step(folder: Path) -> Mapping[str, float]:
    """By what jobs are alike in, from the finished jobs in ``folder``."""
    seconds: dict[str, list[float]] = {}
    for path in folder.glob(f"*/{FILE}"):
        outcome = read_outcome(path.parent)
        if outcome.finished and outcome.like and outcome.value["steps"]:
            seconds.setdefault(outcome.like, []).append(outcome.seconds / outcome.value["steps"])
    return {like: statistics.median(values) for like, values in seconds.items()}
