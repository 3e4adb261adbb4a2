# SPDX-License-Identifier: BSD-3-Clause
"""Jobs: cells of experiments with one seed, that is one method on one data set with its labels, each in a folder of its own.

``job.json`` in the folder says how the job ended. Finished jobs are not run again; stopped and failed ones are gone on with. Under
``torchrun`` whole jobs are dealt out to the ranks, each of which runs its own ones alone, on a device of its own.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ssmkernels.experiments.record import write_atomically
from ssmkernels.trainers import RunResult
from ssmkernels.trainers.loop import StopSignals

FILE = "job.json"
FOLDER = "jobs"
EXPECTED = (ValueError, FileNotFoundError, ImportError, FloatingPointError)
"""Errors whose message says all."""
POLL = 0.2  # seconds between looks at what other ranks have finished
_OF_TORCHRUN = re.compile("RANK|WORLD_SIZE|LOCAL_.*|GROUP_.*|ROLE_.*|MASTER_.*|TORCHELASTIC_.*")


class Job(NamedTuple):
    """A unit of work: ``run(folder)`` returns plain values, and raises ``KeyboardInterrupt`` when it is stopped."""

    name: str
    """Of the folder."""
    title: str
    run: Callable[[Path], Any]


@dataclass(frozen=True)
class Outcome:
    """How a job ended: with a ``value`` or with the message of an ``error``."""

    name: str
    value: Any
    error: str | None = None
    seconds: float = 0.0
    """Wall time, over all calls."""

    @property
    def result(self) -> RunResult:
        """The value of a :func:`training_job`.

        Raises:
            RuntimeError: the job failed.
        """
        if self.error is not None:
            raise RuntimeError(self.error)
        return RunResult(**self.value)


def results_of(outcomes: Sequence[Outcome]) -> list[RunResult]:
    """Of the training jobs that finished."""
    return [each.result for each in outcomes if each.error is None]


def failures_of(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """The messages of the jobs that failed."""
    return tuple(each.error for each in outcomes if each.error is not None)


def seconds_of(outcomes: Mapping[Any, Sequence[Outcome]]) -> float:
    """Wall time of all jobs of some rows, each counted once."""
    return sum({each.name: each.seconds for row in outcomes.values() for each in row}.values())


def pairs_of(first: Sequence[Outcome], second: Sequence[Outcome]) -> list[tuple[RunResult, RunResult]]:
    """The results of two rows, seed by seed, where both finished."""
    return [(a.result, b.result) for a, b in zip(first, second, strict=True) if a.error is None and b.error is None]


def run_jobs(folder: Path, jobs: Sequence[Job]) -> dict[str, Outcome]:
    """Runs what is not finished of ``jobs``, each in ``folder/name``, and returns how they ended, by name and in their order.

    Rank r of W runs the jobs r, r + W, …, and waits for the others. An exception in a job does not stop the others.

    Raises:
        KeyboardInterrupt: a job, or the waiting for one, was stopped. What is finished is kept.
    """
    rank, ranks = this_rank()
    distinct = list({job.name: job for job in jobs}.values())
    for number, job in enumerate(distinct):
        if number % ranks == rank and not _is_over(_read(folder / job.name)):
            print(f"[{number + 1}/{len(distinct)}] {job.title}", flush=True)
            _run(job, folder / job.name)
    for number, job in enumerate(distinct):
        if number % ranks != rank:
            _await(job, folder / job.name, number % ranks)
    found = {job.name: _read(folder / job.name) for job in distinct}
    return {name: Outcome(name, each.get("value"), each.get("error"), each["seconds"]) for name, each in found.items()}


def run_rows(out: Path | None, jobs: Mapping[tuple[str, int], Job]) -> dict[str, list[Outcome]]:
    """The outcomes of ``jobs``, a job by row and seed, as lists by row.

    Args:
        out: the folder of an experiment, beside which jobs are kept that experiments share; nothing is kept without.
    """
    if out is None:
        with tempfile.TemporaryDirectory() as scratch:
            return run_rows(Path(scratch) / "experiment", jobs)
    outcomes = run_jobs(out.parent / FOLDER, list(jobs.values()))
    rows: dict[str, list[Outcome]] = {row: [] for row, _ in jobs}
    for (row, _), job in jobs.items():
        rows[row].append(outcomes[job.name])
    return rows


def training_job(method: str, config: Any, train: Callable[..., RunResult], title: str) -> Job:
    """The job that trains as ``config`` says.

    What determines the run is in its name, so that experiments share their jobs.

    Args:
        method: of ``ssmkernels train``.
        train: called as ``train(config, resume=True)``, ``config.run.out`` being the folder of the job.
    """

    def run(folder: Path) -> dict[str, Any]:
        config.run.out = str(folder)
        result = train(config, resume=True)
        if not result.finished:
            raise KeyboardInterrupt
        return asdict(result)

    return Job(training_name(method, config), title, run)


def training_name(method: str, config: Any) -> str:
    """The name of the job that trains as ``config`` says: method, data, labels and seed, to be read, and a digest of all settings."""
    settings = asdict(config)
    settings["run"] = {"eval_every": settings["run"]["eval_every"]}  # the rest changes nothing that is learnt or measured
    for place in ("root", "unlabeled_root"):
        settings["data"].pop(place, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    labels = f"-{config.data.labels}" if hasattr(config.data, "labels") else ""
    return f"{method}-{config.data.name}{labels}-seed{config.seed}-{digest}"


def this_rank() -> tuple[int, int]:
    """The rank of this process and the number of ranks, as ``torchrun`` says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def alone() -> Iterator[None]:
    """Within it a trainer takes this process for the only one, with the device ``LOCAL_RANK`` for its own."""
    if this_rank()[1] == 1:
        yield
        return
    before = dict(os.environ)
    local = int(os.environ.get("LOCAL_RANK", 0))
    visible = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    visible = visible or [str(each) for each in range(torch.cuda.device_count())]
    if visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[local % len(visible)]
    for name in before:
        if _OF_TORCHRUN.fullmatch(name):
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(job: Job, folder: Path) -> None:
    """Runs a job and leaves how it ended."""
    earlier = (_read(folder) or {"seconds": 0.0})["seconds"]
    begin = time.perf_counter()

    def leave(status: str, **rest: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        seconds = earlier + time.perf_counter() - begin
        state = {"title": job.title, "status": status, "seconds": seconds, "launch": _launch(), **rest}
        write_atomically(folder / FILE, json.dumps(state, indent=1) + "\n")

    try:
        with alone():
            value = job.run(folder)
    except Exception as error:
        if not isinstance(error, EXPECTED):
            traceback.print_exc()
        print(f"{job.title} failed: {error}", file=sys.stderr, flush=True)
        leave("failed", error=f"{type(error).__name__}: {error}")
    except BaseException:
        leave("stopped")
        raise
    else:
        leave("finished", value=value)


def _await(job: Job, folder: Path, rank: int) -> None:
    """Waits until another rank is through with a job."""
    said = False
    with StopSignals() as stop:
        while not _is_over(state := _read(folder)):
            if stop.requested or (state is not None and state["status"] == "stopped" and state["launch"] == _launch()):
                print(f"rank {rank} did not finish {job.title!r}: it was stopped, or it died and left the reason above", file=sys.stderr)
                raise KeyboardInterrupt
            if not said:
                print(f"Waiting for rank {rank}: {job.title}", flush=True)
                said = True
            time.sleep(POLL)


def _is_over(state: Mapping[str, Any] | None) -> bool:
    """Whether a job is finished, or failed in this very launch of ranks; one that failed before is tried again."""
    if state is None or state["status"] == "stopped":
        return False
    return state["status"] == "finished" or (this_rank()[1] > 1 and state["launch"] == _launch())


def _read(folder: Path) -> Any:
    path = folder / FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not readable ({error}); delete it to run the job again") from error


def _launch() -> str | None:
    """What all ranks of a call of ``torchrun``, and no others, have in common; None for a process alone."""
    return _name_of_launch() if this_rank()[1] > 1 else None


@functools.cache
def _name_of_launch() -> str:
    store, rank, _ = next(dist.rendezvous("env://"))  # the store that torchrun keeps; no process group is made
    if rank == 0:
        store.set("ssmkernels/launch", uuid.uuid4().hex)
    return str(store.get("ssmkernels/launch").decode())
