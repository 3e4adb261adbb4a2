# SPDX-License-Identifier: BSD-3-Clause
"""The loop around a trainer: devices, stopping and resuming, logging, evaluation, checkpoints.

Devices, precision and DDP come from Lightning Fabric rather than from a full trainer framework or our own code: Fabric
wraps the model and the optimiser and leaves the loop to us, so that a trainer's ``step`` can read like its paper's
algorithm.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import threading
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch

from ssmkernels._files import WriteError
from ssmkernels._locks import FolderInUse, folder_lock
from ssmkernels.distributed import all_reduce_sum, sharded_states
from ssmkernels.trainers import sharded
from ssmkernels.trainers.checkpoint import (
    FILE,
    check_same_config,
    latest_checkpoint,
    load_checkpoint,
    one_line,
    save_checkpoint,
)
from ssmkernels.trainers.host_memory import keep_freed_memory
from ssmkernels.trainers.loggers import LoggerName
from ssmkernels.trainers.progress import RunLog
from ssmkernels.trainers.settings import Count, Positive, Settings

if TYPE_CHECKING:
    from ssmkernels.trainers.base import Trainer

try:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import MixedPrecision
    from lightning_fabric.strategies import DDPStrategy
except ImportError:  # the same code inside the one big package
    from lightning.fabric import Fabric  # type: ignore[no-redef]
    from lightning.fabric.strategies import DDPStrategy  # type: ignore[no-redef]


CheckpointForm = Literal["file", "sharded"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
Accelerator = Literal["auto", "cpu", "cuda", "gpu", "mps"]

MAY_DIFFER = ("run", "accumulate", "data.root", "data.unlabeled_root", "data.labels_file")
"""Settings in which a resumed run may differ from its checkpoint, as it may in the number of ranks; the labelled images
are compared by labels.txt.
"""
EPOCH = 1024  # steps, as FixMatch counts them, where a method has no epochs of its own


@dataclass
class RunConfig(Settings):
    """Where a run happens and what it leaves behind. Nothing here changes what is learnt, so all of it may differ on
    resuming.
    """

    section: ClassVar[str] = "run."

    out: str | None = None
    """Folder of checkpoint.pt, labels.txt, classes.txt (where there is a list of them), metrics.jsonl and what the
    logger writes; without one nothing is written.
    """
    log_every: Count = 10
    """Steps between reads of the losses."""
    eval_every: Count | None = None
    """Steps between evaluations; none for the end of every epoch, which is 1024 steps where the method has no
    epochs.
    """
    checkpoint_every: Count | None = None
    """Steps between checkpoints; none for the end of every epoch."""
    checkpoint: CheckpointForm = "file"
    """How checkpoints are kept: checkpoint.pt, which the first rank writes while all wait; or a folder, checkpoint, of
    which every rank writes a share while training goes on. Any number of ranks resumes from either.
    """
    accelerator: Accelerator = "auto"
    """What to train on; auto takes a GPU where there is one."""
    workers: int = 0
    """Processes that load and augment images, per rank."""
    deterministic: bool = False
    """On a GPU: the convolutions that are the same from run to run, so that a resumed run computes the bits of an
    uninterrupted one there too, instead of those that are measured to be fastest. On a CPU they always are.
    """
    compile: bool = False
    """Let torch.compile make the network that learns faster, after minutes at the start."""
    bar: bool = True
    """Show a progress bar."""
    timeout: Positive = 1800.0
    """Seconds that a rank waits for the others; then it ends with an error, and the run can be resumed. While the first
    rank searches or clusters alone, the others hear of it more often than that.
    """
    logger: LoggerName = "tensorboard"
    """Where the scalars of metrics.jsonl go too: TensorBoard's events, a table in csv/metrics.csv, Weights & Biases
    (which is installed apart) or nowhere.
    """


@dataclass
class RunResult:
    """What :func:`fit` did: ``history`` has one record per evaluation, with the training scalars since the one
    before.
    """

    finished: bool
    step: int
    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    """Of the whole run."""
    stopped_by: int | None = None
    """The signal that ended it early, SIGINT for Ctrl-C."""

    def best(self, name: str) -> dict[str, float]:
        """The record with the highest ``name``, the first of several."""
        return max(self.history, key=lambda record: record[name])

    def median(self, name: str, last: int = 20) -> float:
        """The median of ``name`` over the last evaluations, the figure that FixMatch and its successors report."""
        return statistics.median(record[name] for record in self.history[-last:])


def make_fabric(
    run: RunConfig | None = None, *, precision: Precision = "32-true", find_unused_parameters: bool = False
) -> Fabric:
    """A launched Fabric: the ranks that ``torchrun`` started, or one device without it.

    Args:
        run: its accelerator and timeout count.
        precision: ``"32-true"``, ``"bf16-mixed"`` or ``"16-mixed"``.
        find_unused_parameters: for DDP, where some parameters take part in no loss.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}; it should be '32-true', 'bf16-mixed' or '16-mixed'")
    run = run or RunConfig()
    accelerator = run.accelerator
    if accelerator not in get_args(Accelerator):
        choices = ", ".join(get_args(Accelerator))
        raise ValueError(f"--run.accelerator is {accelerator!r}; it should be one of {choices}")
    if accelerator in ("cuda", "gpu") and not torch.cuda.is_available():
        raise ValueError(f"--run.accelerator is {accelerator}, but torch sees no CUDA device; give cpu or auto")
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    strategy: DDPStrategy | str = "auto"
    if world > 1:
        strategy = DDPStrategy(find_unused_parameters=find_unused_parameters, timeout=timedelta(seconds=run.timeout))
    fabric = Fabric(
        accelerator=accelerator, devices=local, num_nodes=world // local, strategy=strategy, precision=precision
    )
    fabric.launch()
    if fabric.device.type == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = run.deterministic, not run.deterministic
    return fabric


def lone_fabric(precision: Precision = "32-true") -> Fabric:
    """A process on the CPU without the others that there may be; half precision is bfloat16."""
    half = None if precision == "32-true" else MixedPrecision("bf16-mixed", "cpu")
    return Fabric(accelerator="cpu", devices=1, plugins=half)


def fit(
    trainer: Trainer,
    *,
    fabric: Fabric,
    steps: int,
    run: RunConfig,
    config: dict[str, Any],
    resume: bool = False,
    epoch_ends: Container[int] | None = None,
    best: str | None = None,
    ended: Callable[[int], bool] = lambda step: False,
) -> RunResult:
    """Runs ``trainer`` to ``steps``, or until Ctrl-C or SIGTERM, which end it after the current step with a checkpoint.

    A resumed run computes the bits of an uninterrupted one, on a GPU with ``run.deterministic``.

    Args:
        config: everything that determines the run, as plain values; a checkpoint made with another one is refused, but
            for the group ``run`` and the places of the data (``data.root``) and of the list of labelled images, whose
            content has to be that of ``run.out``/labels.txt.
        resume: continue from the checkpoint in ``run.out``, if there is one. Without it, a folder with a checkpoint is
            refused.
        epoch_ends: the numbers of steps after which an epoch is over; by default every 1024th.
        best: a figure of the evaluations. Whenever it is higher than ever before, the evaluation and the ``model`` of
            the trainer's state are kept in ``run.out``/best.pt.
        ended: whether the run is over after so many steps, although they are fewer than ``steps``; it is asked after an
            evaluation.

    Raises:
        FloatingPointError: a loss is not finite; it names the step.
        FolderInUse: another process runs in ``run.out``.
        ValueError: ``run.out`` cannot be written, or its checkpoint cannot be gone on from.
        WriteError: the disk is full; the last checkpoint is kept.
    """
    folder = None if run.out is None else Path(run.out)
    with _locked(folder, fabric):
        return _fit(
            trainer,
            fabric=fabric,
            steps=steps,
            run=run,
            config=config,
            folder=folder,
            resume=resume,
            epoch_ends=range(EPOCH, steps + 1, EPOCH) if epoch_ends is None else epoch_ends,
            best=best,
            ended=ended,
        )


def _fit(
    trainer: Trainer,
    *,
    fabric: Fabric,
    steps: int,
    run: RunConfig,
    config: dict[str, Any],
    folder: Path | None,
    resume: bool,
    epoch_ends: Container[int],
    best: str | None,
    ended: Callable[[int], bool],
) -> RunResult:
    """:func:`fit`, with checkpoints in a ``folder`` that no other process uses."""
    done = RunResult(finished=False, step=0, steps=steps)
    window: dict[str, float] = {}
    path = None if folder is None else latest_checkpoint(folder)
    if path is not None:
        if not resume:
            raise ValueError(f"{path} exists; go on from it with --resume, or give another folder with --run.out")
        done, window = _load_run(path, folder, trainer, fabric, steps, config)
        done.finished |= ended(done.step)
    if done.finished:
        return done
    if folder is not None and fabric.is_global_zero:
        trainer.keep_inputs(folder)
    fabric.barrier()
    checkpoints = None if folder is None else _Checkpoints(folder, run, fabric)

    def due(every: int | None) -> bool:
        return done.finished or (done.step in epoch_ends if every is None else done.step % every == 0)

    with (
        StopSignals() as stop,
        RunLog(
            folder,
            steps=steps,
            start=done.step,
            window=window,
            images_per_step=trainer.images_per_step,
            scalars=trainer.scalars,
            shown=trainer.shown,
            writes=fabric.is_global_zero,
            bar=run.bar,
            logger=run.logger,
        ) as log,
    ):
        for batch in trainer.batches(done.step):
            log.add(trainer.step(fabric.to_device(batch), done.step))
            done.step += 1
            done.finished = done.step == steps
            logging = done.finished or done.step % run.log_every == 0
            evaluating = due(run.eval_every)
            # Ranks must agree on when to stop: together at every log interval, alone at once.
            stopping = stop.requested if fabric.world_size == 1 else logging and _any_rank(stop.requested, fabric)
            saving = stopping or due(run.checkpoint_every)
            if logging or evaluating or saving:
                log.flush(learning_rate=trainer.learning_rate)
            if evaluating:
                done.history.append({"step": done.step, **log.evaluation(trainer.evaluate())})
                done.finished |= ended(done.step)
                saving = saving or done.finished
            if evaluating and best is not None and folder is not None and done.best(best) is done.history[-1]:
                weights = {"evaluation": done.history[-1], "model": trainer.state_dict()["model"]}
                if fabric.is_global_zero:
                    save_checkpoint(folder / "best.pt", weights)
            if saving and checkpoints is not None:
                state = {
                    "config": config,
                    "images": asdict(trainer.seen),
                    "step": done.step,
                    "history": done.history,
                    "window": log.window,
                    "trainer": checkpoints.state_of(trainer),
                    "precision": fabric.strategy.precision.state_dict(),
                }
                if fabric.is_global_zero:
                    log.sync()  # a checkpoint never knows of more steps than the log
                checkpoints.save(state, done.step)
            if stopping and not done.finished:
                done.stopped_by = stop.number
            if stopping or done.finished:
                break
        if checkpoints is not None:
            checkpoints.wait()
    return done


class _Checkpoints:
    """The checkpoints of a run, in the form that ``run.checkpoint`` says; one of the other form goes when the first is
    written.
    """

    def __init__(self, folder: Path, run: RunConfig, fabric: Fabric) -> None:
        self.folder, self.fabric = folder, fabric
        is_sharded = run.checkpoint == "sharded"
        self.saver = sharded.Saver(folder / sharded.FOLDER, run.timeout) if is_sharded else None

    def state_of(self, trainer: Trainer) -> dict[str, Any]:
        if self.saver is None:
            return trainer.state_dict()
        with sharded_states():
            return trainer.state_dict()

    def save(self, state: dict[str, Any], step: int) -> None:
        if self.saver is not None:
            self.saver.save(state, step)
        elif self.fabric.is_global_zero:
            save_checkpoint(self.folder / FILE, state)
            shutil.rmtree(self.folder / sharded.FOLDER, ignore_errors=True)

    def wait(self) -> None:
        if self.saver is not None:
            self.saver.wait()
            if self.fabric.is_global_zero and sharded.latest(self.saver.folder) is not None:
                (self.folder / FILE).unlink(missing_ok=True)


def _check_same_labels(path: Path, labels: str | None) -> None:
    if labels is not None and path.exists() and path.read_bytes() != labels.encode():
        raise ValueError(
            f"{path} has other labelled images than this run would have; give it as --data.labels_file, or another"
            " folder with --run.out"
        )


def _load_run(
    path: Path, folder: Path | None, trainer: Trainer, fabric: Fabric, steps: int, config: dict[str, Any]
) -> tuple[RunResult, dict[str, float]]:
    """Puts the trainer where the checkpoint at ``path`` was made, and returns what was done until then and the sums
    since the last evaluation.

    Raises:
        ValueError: it is damaged, no checkpoint of a run, or one of another run.
    """
    state = load_checkpoint(path)
    missing = sorted({"config", "step", "history", "window", "trainer", "precision"} - state.keys())
    if missing:
        raise ValueError(f"{path} is not the checkpoint of a run: it lacks {', '.join(missing)}")
    check_same_config(state["config"], config, ignore=MAY_DIFFER, path=path)
    _check_same_labels(Path(folder or path.parent, "labels.txt"), trainer.labels_text())
    if state["step"] > steps:
        raise ValueError(f"{path} was made after step {state['step']}; it should be of a run of at most {steps} steps")
    try:
        trainer.load_state_dict(state["trainer"])
        fabric.strategy.precision.load_state_dict(state["precision"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit what is trained: {one_line(error)}") from error
    done = RunResult(finished=state["step"] == steps, step=state["step"], history=state["history"], steps=steps)
    return done, state["window"]


@contextmanager
def _locked(folder: Path | None, fabric: Fabric) -> Iterator[None]:
    """:func:`ssmkernels._locks.folder_lock` by the first rank, for all: they raise its error together."""
    with ExitStack() as stack:
        problem: Exception | None = None
        if folder is not None and fabric.is_global_zero:
            try:
                stack.enter_context(folder_lock(folder))
            except FolderInUse as error:
                problem = error
            except WriteError as error:
                problem = ValueError(
                    f"{folder} cannot be written ({error.strerror}); give another folder with --run.out"
                )
        problem = fabric.broadcast(problem)
        if problem is not None:
            raise problem
        yield


class StopSignals:
    """Within it, Ctrl-C and SIGTERM ask for an end after the current step; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            self.previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    @property
    def requested(self) -> bool:
        return self.number is not None


def ignore_stop_signals(worker: int) -> None:
    """For data-loading processes: signals to the whole group reach them too, but the main process decides when they
    end.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _any_rank(flag: bool, fabric: Fabric) -> bool:
    return bool(all_reduce_sum(torch.tensor(flag, dtype=torch.int32, device=fabric.device)))
