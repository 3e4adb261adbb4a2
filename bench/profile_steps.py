# SPDX-License-Identifier: BSD-3-Clause
"""Whole training steps of the four methods: what they take with the ops and with the same formulas in eager PyTorch,
and where it goes.

    python bench/profile_steps.py [--steps 20] [--out bench/results/cpu-steps.md]
    python bench/profile_steps.py --before-after [--out bench/results/cpu-steps-before-after.md]

Each method trains on images from packages with its shipped small configuration, alternating between the two; medians of
the steps after the first ones. The share of the ops is that of the library's operators, forward and backward, in
torch.profiler; "waiting" is what the loop spends in getting its next batch; "reads" counts the values that the host
reads from tensors in a step. A second table has the parts of a step: waiting for data (images that are augmented on the
device are made then), the forward pass with the losses, backward, the library's operators in both, optimiser; and the
first evaluation, which loads its images, and a later one.

``--before-after`` has those parts with views by Pillow, image by image, and evaluations that load their images anew,
as they all did, and as they are by default. Both load in the process itself; the milliseconds are of processor time, of
all threads, the two in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from ssmkernels import info, ops, reference
from ssmkernels._files import write_atomically
from ssmkernels._text import markdown_table
from ssmkernels.bench.graph import torch_sparse_cg
from ssmkernels.bench.memory import vectorised_update
from ssmkernels.bench.training import eager_matching
from ssmkernels.trainers import base, evaluation, loop
from ssmkernels.trainers.cli import METHODS, parse_config

WARM_UP = 5
# The heavy sizes of each method on images small enough for a CPU: the larger bank, batch or graph, not the larger
# network.
RUNS: dict[str, list[str]] = {
    "simmatch": ["--config", "mnist5k", "--data.labels", "4000", "--batch_size", "64", "--first_epoch_steps", "1"],
    "mlsn": ["--config", "mnist5k", "--batch_size", "100"],
    "mixed-lp": ["--config", "digits", "--labeled_epochs", "1", "--epochs", "12"],
    "slade": ["--config", "mnist5k", "--batch_size", "240", "--teacher_steps", "2", "--warm_up_steps", "2"],
}
# Of the methods whose views of small images are made in batches.
BEFORE_AFTER = {
    "simmatch": RUNS["simmatch"],
    "mlsn": RUNS["mlsn"],
    "swav": ["--data.name", "mnist5k", "--model", "convnet-small", "--batch_size", "64", "--epochs", "1"],
}


def eager_solve(crow: Any, col: Any, weight: Any, dissimilarity: Any, diagonal: Any, rhs: Any, **options: Any) -> Any:
    """Conjugate gradients in torch on a sparse matrix: D + D_dis on the diagonal, W − W_dis beside it."""
    if dissimilarity is not None:
        rows = torch.repeat_interleave(torch.arange(len(diagonal)), crow.diff())
        diagonal = diagonal + 2 * torch.zeros_like(diagonal).index_add(0, rows, dissimilarity)
        weight = weight - dissimilarity
    solution = torch_sparse_cg(crow, col, weight, diagonal, rhs, rtol=options.get("rtol", 1e-6))
    counts, residual = torch.zeros(rhs.shape[1], dtype=torch.int64), torch.zeros(rhs.shape[1], dtype=rhs.dtype)
    return ops.LaplacianSolution(solution, counts, residual)


def in_one_process(formula: Callable[..., Any]) -> Callable[..., Any]:
    """The formula of an op that may be over the ranks of a group, of which there is one here."""
    return lambda *args, group=None, **options: formula(*args, **options)


EAGER = {
    "instance_matching": eager_matching,
    "memory_update_": lambda *args, **options: vectorised_update(*args),
    "pair_logits": reference.pair_logits,
    "pair_focal_loss": reference.pair_focal_loss,
    "leave_one_edge_out": reference.leave_one_edge_out,
    "laplacian_solve": eager_solve,
    "pair_ranking_loss": in_one_process(reference.pair_ranking_loss),
    "mined_pair_ranking_loss": in_one_process(reference.mined_pair_ranking_loss),
    "similarity_moments": in_one_process(reference.similarity_moments),
}


Clock = Callable[[], float]


class Watch:
    """Wraps a trainer: seconds of each step and of each wait for a batch."""

    def __init__(self, trainer: Any, clock: Clock) -> None:
        self.trainer, self.clock = trainer, clock
        self.step_seconds: list[float] = []
        self.wait_seconds: list[float] = []
        self.backward_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []
        self.evaluation_seconds: list[float] = []
        trainer.fabric.backward = timed(trainer.fabric.backward, self.backward_seconds, clock)
        trainer.optimizer.step = timed(trainer.optimizer.step, self.optimizer_seconds, clock)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trainer, name)

    def batches(self, start: int) -> Iterator[Any]:
        source = iter(self.trainer.batches(start))
        while True:
            begin = self.clock()
            try:
                batch = next(source)
            except StopIteration:
                return
            self.wait_seconds.append(self.clock() - begin)
            yield batch

    def step(self, batch: Any, step: int) -> Any:
        begin = self.clock()
        metrics = self.trainer.step(batch, step)
        self.step_seconds.append(self.clock() - begin)
        return metrics

    def evaluate(self) -> dict[str, float]:
        if not self.evaluation_seconds:  # the first loads the images
            for _ in range(2):
                timed(self.trainer.evaluate, self.evaluation_seconds, self.clock)()
        return dict.fromkeys(("test_MAP@R", "validation_MAP@R", "validation_P@8", "final_MAP@R"), 0.0)


def timed(function: Callable[..., Any], seconds: list[float], clock: Clock) -> Callable[..., Any]:
    """The function, which appends how long it took."""

    def call(*args: Any, **options: Any) -> Any:
        begin = clock()
        result = function(*args, **options)
        seconds.append(clock() - begin)
        return result

    return call


def train(
    method: str, steps: int, *, eager: bool = False, profiled: bool = False, before: bool | None = None
) -> tuple[Watch, Any]:
    """The last stage of a short run. Where ``before`` says which of the two that --before-after compares, in processor
    time.
    """
    arguments = RUNS[method] if before is None else BEFORE_AFTER[method]
    watches: list[Watch] = []

    def fit(trainer: Any, **options: Any) -> Any:
        watches.append(Watch(trainer, time.perf_counter if before is None else time.process_time))
        return loop.fit(watches[-1], **options)

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.object(base, "fit", fit))
        for name, formula in EAGER.items() if eager else ():
            stack.enter_context(mock.patch.object(ops, name, formula))
        limit = {"slade": "--student_steps", "mixed-lp": None, "swav": None}.get(method, "--steps")
        more = [limit, str(steps)] if limit else []
        quiet = ["--run.bar", "false", "--run.eval_every", "100000", "--run.workers"]
        quiet.append("0" if method in ("mixed-lp", "slade") or before is not None else "1")
        if before:
            stack.enter_context(mock.patch.object(evaluation, "KEPT_BYTES", -1))
            more += ["--data.augment", "pil"]
        config, _ = parse_config(method, [*arguments, *more, *quiet, "--run.out", folder])
        profiler = stack.enter_context(profile(activities=[ProfilerActivity.CPU])) if profiled else None
        METHODS[method].train(config)
    return watches[-1], profiler


def own_seconds(profiler: Any) -> tuple[float, int]:
    """Seconds in the library's operators, and how many values the host read."""
    events = profiler.key_averages()
    seconds = sum(event.cpu_time_total for event in events if event.key.startswith("ssmkernels::")) / 1e6
    return seconds, sum(event.count for event in events if event.key == "aten::_local_scalar_dense")


PARTS = (
    "method",
    "data, ms",
    "forward and losses, ms",
    "backward, ms",
    "ops in both, ms",
    "optimiser, ms",
    "first evaluation, ms",
    "later ones, ms",
)


def parts_of(watch: Watch, in_ops: float | None = None) -> list[str]:
    """Where the time of a step went, medians, and two evaluations; with the seconds of a step ``in_ops``, where they
    are known.
    """
    step, data, backward, optimizer = (
        statistics.median(seconds[WARM_UP:])
        for seconds in (watch.step_seconds, watch.wait_seconds, watch.backward_seconds, watch.optimizer_seconds)
    )
    forward = step - backward - optimizer
    known = [] if in_ops is None else [in_ops]
    return [f"{1e3 * part:.1f}" for part in (data, forward, backward, *known, optimizer, *watch.evaluation_seconds)]


def before_and_after(methods: list[str], steps: int, rounds: int) -> str:
    """The parts of a step of each method, before and after, medians of all rounds."""
    rows = []
    for method in methods:
        watches: dict[bool, list[Watch]] = {True: [], False: []}
        for _ in range(rounds):
            for before, of_way in watches.items():
                of_way.append(train(method, steps, before=before)[0])
        for before, of_way in watches.items():
            parts = [[float(part) for part in parts_of(watch)] for watch in of_way]
            medians = [statistics.median(part) for part in zip(*parts, strict=True)]
            step = sum(medians[:4])
            row = [f"{method}, {'before' if before else 'after'}", *(f"{part:.1f}" for part in medians)]
            rows.append([*row, f"{1e3 * of_way[0].images_per_step / step:.0f}"])
            print(rows[-1], flush=True)
    return markdown_table([*(title for title in PARTS if "ops" not in title), "images a second"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", help="only this one")
    parser.add_argument("--before-after", action="store_true", help="the parts of steps by Pillow, and as they are")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    methods = list(BEFORE_AFTER if args.before_after else RUNS)
    if args.method not in (None, *methods):
        parser.error(f"--method is {args.method!r}; it should be one of {', '.join(methods)}")
    methods = [args.method] if args.method else methods
    machine = info.collect()
    cpu = f"{torch.get_num_threads()} threads of an {machine['cpu']['model']}, torch {torch.__version__}"
    command = f"python bench/profile_steps.py --steps {args.steps} --rounds {args.rounds}"
    if args.before_after:
        table = before_and_after(methods, args.steps, args.rounds)
        finish(f"{cpu}; `{command} --before-after`\n\n{table}\n", args.out)
        return
    rows, parts = [], []
    for method in methods:
        samples: dict[bool, list[float]] = {False: [], True: []}
        waits: list[float] = []
        for _ in range(args.rounds):
            for eager in (False, True):
                watch, _ = train(method, args.steps, eager=eager)
                samples[eager] += watch.step_seconds[WARM_UP:]
                if not eager:
                    waits += watch.wait_seconds[WARM_UP:]
                    newest = watch
        watch, profiler = train(method, args.steps, eager=False, profiled=True)
        own, reads = own_seconds(profiler)
        parts.append([method, *parts_of(newest, own / len(watch.step_seconds))])
        ours, eager_step = (statistics.median(samples[is_eager]) for is_eager in (False, True))
        whole = sum(watch.step_seconds)
        share = own / whole
        before = 1 - ours * (1 - share) / eager_step
        rows.append(
            [
                method,
                f"{1e3 * ours:.1f}",
                f"{1e3 * eager_step:.1f}",
                f"{100 * share:.1f} %",
                f"{100 * before:.1f} %",
                f"{100 * statistics.median(waits) / (statistics.median(waits) + ours):.1f} %",
                f"{reads / len(watch.step_seconds):.1f}",
            ]
        )
        print(rows[-1], flush=True)
    titles = [
        "method",
        "ms a step",
        "with eager formulas",
        "the ops' share",
        "its share in eager",
        "waiting for data",
        "reads a step",
    ]
    finish(f"{cpu}; `{command}`\n\n{markdown_table(titles, rows)}\n\n{markdown_table(PARTS, parts)}\n", args.out)


def finish(text: str, out: Path | None) -> None:
    print(text)
    if out:
        write_atomically(out, text)


if __name__ == "__main__":
    main()
