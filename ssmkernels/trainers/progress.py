# SPDX-License-Identifier: BSD-3-Clause
"""What a run shows and leaves behind: a progress bar, ``metrics.jsonl`` and what a logger of Fabric makes of it."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ssmkernels._files import LineFile, atomic_file, naming_write_errors
from ssmkernels.distributed import all_reduce_mean
from ssmkernels.trainers.loggers import LoggerName, make_logger


class RunLog:
    """Collects the metrics of every step on the device and reads them, once, at each :meth:`flush`.

    Args:
        folder: where ``metrics.jsonl`` and the files of the logger go; None writes nothing.
        steps: steps of the whole run; start: those done before this log.
        window: sums of the metrics since the last evaluation and their number of ``steps``, for a run that is resumed.
        images_per_step: for the rate shown.
        scalars: turns the means of the step metrics into the scalars reported.
        shown: the scalars in the bar's postfix.
        writes: False on every rank but the first.
        logger: see :func:`ssmkernels.trainers.loggers.make_logger`.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        steps: int,
        start: int,
        window: Mapping[str, float],
        images_per_step: int,
        scalars: Callable[[dict[str, float]], dict[str, float]],
        shown: tuple[str, ...],
        writes: bool = True,
        bar: bool = True,
        logger: LoggerName = "tensorboard",
    ) -> None:
        self.step = start
        self.images_per_step = images_per_step
        self.scalars = scalars
        self.shown = shown
        self.pending: list[dict[str, Tensor]] = []
        self.window = dict(window)
        self.read_at = time.perf_counter()
        pause = 0.1 if sys.stderr.isatty() else 10.0  # a log file gets a line now and then
        self.bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=not (bar and writes),
            dynamic_ncols=True,
            leave=False,
            mininterval=pause,
        )
        self.file: LineFile | None = None
        self.logger: Any = None
        if folder is not None and writes:
            path = folder / "metrics.jsonl"
            keep_records_until(path, start)  # the steps after the checkpoint are about to be done again
            self.file = LineFile(path)
            self.place = folder / logger
            with naming_write_errors(self.place):
                self.logger = make_logger(logger, folder, start=start)
            if self.logger is not None:
                self.thread_errors = threading.excepthook
                threading.excepthook = partial(_report_unless_of_event_writer, self.thread_errors)

    def add(self, metrics: dict[str, Tensor]) -> None:
        """The metrics of one step, scalars on the device: no synchronisation."""
        self.pending.append(metrics)
        self.bar.update()

    def flush(self, **extra: float) -> None:
        """Reads the steps since the last flush, raises if a loss is not finite, and reports their means."""
        if not self.pending:
            return
        names = list(self.pending[0])
        values = torch.stack([torch.stack([metrics[name].float() for name in names]) for metrics in self.pending])
        rows = [dict(zip(names, row, strict=True)) for row in all_reduce_mean(values).tolist()]
        self.pending.clear()
        for number, row in enumerate(rows, start=self.step + 1):
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(
                    f"the loss of step {number} is {row['loss']}"
                    f" ({', '.join(f'{k} {v:.4g}' for k, v in row.items() if k != 'loss')}); the run stops, its last"
                    " checkpoint is from before; lower the learning rate or use precision 32-true"
                )
        self.step += len(rows)
        now = time.perf_counter()
        rate = len(rows) * self.images_per_step / max(now - self.read_at, 1e-9)
        self.read_at = now
        for row in rows:
            for name, value in {**row, "steps": 1}.items():
                self.window[name] = self.window.get(name, 0) + value
        scalars = self.scalars(_means(rows))
        shown = {name.removeprefix("loss_"): f"{scalars[name]:.3f}" for name in self.shown}
        self.bar.set_postfix({**shown, "images/s": f"{rate:.0f}"}, refresh=False)
        self._write("train", {**scalars, **extra, "images_per_second": rate})

    def evaluation(self, values: Mapping[str, float]) -> dict[str, float]:
        """Reports an evaluation, together with the means of the training scalars since the last one."""
        steps = self.window.pop("steps")
        record = {**self.scalars({name: total / steps for name, total in self.window.items()}), **values}
        self.window.clear()
        self._write("test", values)
        self.read_at = time.perf_counter()
        return record

    def sync(self) -> None:
        """What was reported so far is on the disk."""
        if self.file is not None:
            self.file.sync()

    def close(self) -> None:
        self.bar.close()
        if self.file is not None:
            self.file.close()
        if self.logger is not None:
            with naming_write_errors(self.place):
                self.logger.finalize("success")
            threading.excepthook = self.thread_errors

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _write(self, group: str, values: Mapping[str, float]) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"step": self.step, "group": group, **values}))
        if self.logger is not None:
            with naming_write_errors(self.place):
                self.logger.log_metrics({f"{group}/{name}": value for name, value in values.items()}, self.step)


def _report_unless_of_event_writer(
    report: Callable[[threading.ExceptHookArgs], Any], error: threading.ExceptHookArgs
) -> None:
    """TensorBoard's thread raises its errors in the next call too, where they are reported in one line."""
    if type(error.thread).__module__.partition(".")[0] != "tensorboard":
        report(error)


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def keep_records_until(path: Path, step: int) -> None:
    """Takes what is after ``step`` out of an earlier log, and its last line if a crash tore that.

    A log that is damaged elsewhere is kept beside it, as ``metrics.jsonl.damaged``, and goes on without the lines in
    question, which are named on stderr.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    kept, damaged = [], []
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None and (number < len(lines) or line.endswith(b"\n")):
            damaged.append(number)
        elif record is not None and record["step"] <= step:
            kept.append(line)
    if damaged:
        aside = path.with_name(path.name + ".damaged")
        with atomic_file(aside) as file:
            file.write(content)
        numbers = f"line{'s' if len(damaged) > 1 else ''} {', '.join(map(str, damaged))}"
        print(f"{path}, {numbers}: no record; the log goes on without, and as it was it is in {aside}", file=sys.stderr)
    if kept != lines:
        with atomic_file(path) as file:
            file.writelines(kept)


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line, None where there is none, or a part of one."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:  # also of UTF-8
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None
