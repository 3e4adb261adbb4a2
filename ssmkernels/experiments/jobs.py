# SPDX-License-Identifier: BSD-3-Clause
"""Jobs: one method on one data set with its labels and a seed, or what is made of that, each in a folder of its own.

``job.json`` in the folder says how the job ended. Finished jobs are not run again; stopped and failed ones are gone on
with. Under ``torchrun`` all ranks train together; what is no training is done by the first rank alone.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ssmkernels._files import DamagedFile, set_aside, write_atomically
from ssmkernels._locks import FolderInUse, folder_lock
from ssmkernels.trainers.cli import METHODS
from ssmkernels.trainers.loop import StopSignals
from ssmkernels.trainers.ranks import alone, this_launch, this_rank

FILE = "job.json"
FOLDER = "jobs"
EXPECTED = (ValueError, OSError, ImportError, FloatingPointError)
"""Errors whose message says all."""
POLL = 0.2  # seconds between looks at what the first rank has finished


class Job(NamedTuple):
    """A unit of work: ``run(folder)`` returns plain values, and raises ``KeyboardInterrupt`` when it is stopped."""

    name: str
    """Of the folder."""
    title: str
    run: Callable[[Path], Any]
    needs: tuple[Job, ...] = ()
    """Jobs that are finished before this one is begun."""
    config: Any = None
    """Of a training, which all ranks take part in."""
    devices: int = 1
    """That the paper trains on: where there are fewer, a batch goes through the network in so many pieces in all."""

    @property
    def like(self) -> str | None:
        """What trainings have in common whose steps take as long, on one machine."""
        if self.config is None:
            return None
        settings = asdict(self.config)
        kept = {name: settings.get(name) for name in ("model", "batch_size", "mu", "precision", "hidden_features")}
        return json.dumps([self.name.split("-seed")[0], settings["data"].get("image_size"), kept], sort_keys=True)


@dataclass(frozen=True)
class Outcome:
    """How a job ended, as ``job.json`` has it: with a ``value``, or with the message of an ``error``."""

    title: str = ""
    status: str | None = None
    """finished, failed or stopped; None where it has not been run."""
    seconds: float = 0.0
    """Wall time, over all calls."""
    launch: str | None = None
    """The ranks that ran it, see :func:`ssmkernels.trainers.ranks.this_launch`."""
    like: str | None = None
    """Of the job, see :class:`Job`."""
    value: Any = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def over(self) -> bool:
        """Whether it is finished, or failed in this very launch of ranks; one that failed before is tried again."""
        in_this_launch = this_rank()[1] > 1 and self.launch == this_launch()
        return self.finished or (self.status == "failed" and in_this_launch)


def run_jobs(
    folder: Path, jobs: Iterable[Job], *, chosen: Callable[[Job], bool] = lambda job: True
) -> dict[str, Outcome]:
    """Runs what is not finished of the ``chosen`` ones of ``jobs`` and of what they need, each in ``folder/name``, and
    returns how they ended, by name and in their order. An exception in a job does not stop the others, but those that
    need it.

    Raises:
        KeyboardInterrupt: a job was stopped. What is finished is kept.
    """
    distinct = {job.name: job for job in jobs}
    work = with_needs(job for job in distinct.values() if chosen(job))
    for number, job in enumerate(work.values(), start=1):
        if read_outcome(folder / job.name).over:
            continue
        unfinished = [needed for needed in job.needs if not outcome_of(folder, needed).finished]
        if unfinished:
            print(f"{job.title} is left out: {unfinished[0].title} is not finished", file=sys.stderr, flush=True)
            continue
        if this_rank()[0] == 0:
            print(f"[{number}/{len(work)}] {job.title}", flush=True)
        if job.config is not None or this_rank()[0] == 0:
            _run(job, folder / job.name)
        _await(job, folder / job.name)
    return {name: outcome_of(folder, job) for name, job in {**work, **distinct}.items()}


def with_needs(jobs: Iterable[Job]) -> dict[str, Job]:
    """Jobs by name, each behind those that it needs."""
    ordered: dict[str, Job] = {}
    for job in jobs:
        for name, needed in {**with_needs(job.needs), job.name: job}.items():
            ordered.setdefault(name, needed)
    return ordered


def outcome_of(folder: Path, job: Job) -> Outcome:
    """How a job ended, or the first that it needs and that failed."""
    outcome = read_outcome(folder / job.name)
    if outcome.status in ("finished", "failed"):
        return outcome
    errors = [outcome_of(folder, needed).error for needed in job.needs]
    return Outcome(error=next((error for error in errors if error is not None), None))


def training_job(method: str, config: Any, title: str, needs: tuple[Job, ...] = (), *, devices: int = 1) -> Job:
    """The job that trains by a ``method`` of ``ssmkernels train`` as ``config`` says. What determines the run is in its
    name, so that experiments share their jobs.
    """

    def run(folder: Path) -> dict[str, Any]:
        config.run.out = str(folder)
        if devices > 1:
            config.accumulate = pieces_of(config, devices)
        result = METHODS[method].train(config, resume=True)
        if not result.finished:
            raise KeyboardInterrupt
        return asdict(result)

    return Job(training_name(method, config), title, run, needs, config, devices)


def pieces_of(config: Any, devices: int) -> int:
    """In how many pieces each rank takes its part of a batch that the paper has on ``devices``."""
    return max(getattr(config, "accumulate", 1), devices // this_rank()[1])


LATER: dict[str, dict[str, Any]] = {
    "data": {"labels_file": None, "held_out": 0, "classes_file": None, "augment": "pil", "flip": None, "shift": None},
    "mixed-lp": {"learn_bn_affine": False, "warm_up_images": "labeled"},
    "mlsn": {"weights": None, "self_pairs": True},
    "simmatch": {"weights": None, "split_memory_above": 2**30, "optimizer": "sgd", "strong_views": "randaugment"},
    "slade": {"patience": None},
}
"""Settings of a method, and of its data, that came after the first records, with what they were before: names of jobs
have them only where they differ.
"""


def training_name(method: str, config: Any) -> str:
    """The name of the job that trains as ``config`` says: method, data, labels and seed, to be read, and a digest of
    all settings.
    """
    settings = asdict(config)
    # The rest changes nothing that is learnt or measured
    settings["run"] = {"eval_every": settings["run"]["eval_every"]}
    for place in ("root", "unlabeled_root"):
        settings["data"].pop(place, None)
    for group, later in ((settings, LATER.get(method, {})), (settings["data"], LATER["data"])):
        for name, before in later.items():
            if name in group and group[name] == before:
                del group[name]
    if method in ("mixed-lp", "slade", "swav"):
        settings["backbone"] = settings.pop("model")  # as the first records have it
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    labels = f"-{config.data.labels}" if hasattr(config.data, "labels") else ""
    return f"{method}-{config.data.name}{labels}-seed{config.seed}-{digest}"


def _run(job: Job, folder: Path) -> None:
    """Runs a job and leaves how it ended, on the first rank with the lock on its folder."""
    if this_rank()[0] > 0:
        _run_locked(job, folder)
        return
    try:
        with folder_lock(folder):
            if this_rank()[1] > 1 or not read_outcome(folder).over:  # by another process, in between
                _run_locked(job, folder)
    except FolderInUse as error:
        if this_rank()[1] > 1:
            raise  # the other ranks wait for this one: torchrun ends them
        print(f"{job.title} is left out: {error}", file=sys.stderr, flush=True)


def _run_locked(job: Job, folder: Path) -> None:
    begin = time.perf_counter() - read_outcome(folder).seconds

    def leave(status: str, **rest: Any) -> None:
        if this_rank()[0] == 0:
            outcome = Outcome(job.title, status, time.perf_counter() - begin, this_launch(), job.like, **rest)
            write_atomically(folder / FILE, json.dumps(asdict(outcome), indent=1) + "\n")

    try:
        with nullcontext() if job.config is not None else alone():
            value = _run_or_start_again(job, folder)
    except Exception as error:
        if not isinstance(error, EXPECTED):
            traceback.print_exc()
        if this_rank()[0] == 0:
            print(f"{job.title} failed: {error}", file=sys.stderr, flush=True)
        leave("failed", error=f"{type(error).__name__}: {error}")
        if this_rank()[1] > 1 and not isinstance(error, EXPECTED):
            raise  # the other ranks may be in the middle of a step: torchrun ends them
    except BaseException:
        leave("stopped")
        raise
    else:
        leave("finished", value=value)


def _run_or_start_again(job: Job, folder: Path) -> Any:
    """Runs a job, from its start where what an earlier call left of it is damaged."""
    try:
        return job.run(folder)
    except DamagedFile as error:
        if this_rank()[1] > 1 or not discard_damaged(error, folder.parent):
            raise
        if folder not in error.path.parents:
            raise  # of a job that this one needs, which the next call runs again
        print(f"{job.title}: {error.path} is damaged ({error.problem}); it is run again", file=sys.stderr, flush=True)
        return job.run(folder)


def discard_damaged(error: DamagedFile, jobs: Path) -> bool:
    """Sets a damaged file of a job aside, and removes what says how far that job is, so that it is run again. Returns
    whether it was a file of one of the ``jobs``.
    """
    if jobs not in error.path.parents or not error.path.exists():
        return False
    set_aside(error.path)
    error.path.with_name("checkpoint.pt").unlink(missing_ok=True)
    (jobs / error.path.relative_to(jobs).parts[0] / FILE).unlink(missing_ok=True)
    return True


def _await(job: Job, folder: Path) -> None:
    """Waits until the first rank has left how a job ended."""
    if this_rank()[0] == 0:
        return
    with StopSignals() as stop:
        while not (outcome := read_outcome(folder)).over:
            if stop.requested or (outcome.status, outcome.launch) == ("stopped", this_launch()):
                raise KeyboardInterrupt
            time.sleep(POLL)


def read_outcome(folder: Path) -> Outcome:
    """How the job in ``folder`` ended, by this version or an earlier one. A damaged file is named on stderr."""
    path = folder / FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(state, dict) and {"status", "seconds", "launch"} <= state.keys()):
            raise ValueError("it is not how a job ended")
        return Outcome(**state)
    except FileNotFoundError:
        pass
    except (TypeError, ValueError) as error:
        print(f"{path} is damaged ({error}); the job is run again from its checkpoint", file=sys.stderr, flush=True)
    return Outcome()
