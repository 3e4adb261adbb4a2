# SPDX-License-Identifier: BSD-3-Clause
"""What ``reproduce --dry-run`` shows: the jobs of a call, how far they are, and what they take."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssmkernels._text import duration, markdown_table
from ssmkernels.experiments.jobs import FILE, Job, Outcome, outcome_of, pieces_of, read_outcome, with_needs
from ssmkernels.experiments.run import Request, plan
from ssmkernels.experiments.spec import Table
from ssmkernels.trainers.ranks import this_rank

HEADER = ("job", "state", "images a step", "steps", "images", "s a step", "time")


def estimate(table: Table, request: Request) -> str:
    """The jobs that ``request`` chooses, with those that they need, and the time of those that are still to run.

    Images of a step are those that the losses are of, in as many pieces as pass through the network one after another,
    with the precision. Seconds a step are the median of finished jobs in the same folder that are alike: of the same
    network, data and batches. A dash is what is not known.
    """
    planned = plan(table, request)
    measured = _seconds_per_step(request.jobs)
    rows, left, times = [], 0, []
    jobs = with_needs(job for job in planned.jobs.values() if job.name in planned.chosen)
    for job in jobs.values():
        outcome, per_step = outcome_of(request.jobs, job), measured.get(job.like or "")
        steps, images = _steps(job, outcome), _images_per_step(job.config)
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
                "-" if per_step is None else f"{per_step:.3g}",
                "-" if seconds is None else duration(seconds),
            ]
        )
    taken = f"{len(times)} of them, whose like have been timed here, take {duration(sum(times))}"
    missing = "".join(f"Left out: {missing}\n" for missing in planned.left_out)
    return (
        f"{missing}{markdown_table(HEADER, rows)}\n{left} of {len(jobs)} jobs are to run;"
        f" {taken if times else 'the like of none of them has been timed here'}."
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


def _seconds_per_step(folder: Path) -> Mapping[str, float]:
    """By what jobs are alike in, from the finished jobs in ``folder``."""
    seconds: dict[str, list[float]] = {}
    for path in folder.glob(f"*/{FILE}"):
        outcome = read_outcome(path.parent)
        if outcome.finished and outcome.like and outcome.value["steps"]:
            seconds.setdefault(outcome.like, []).append(outcome.seconds / outcome.value["steps"])
    return {like: statistics.median(values) for like, values in seconds.items()}
