# SPDX-License-Identifier: BSD-3-Clause
"""Evaluates a finished run again: the figures of its last evaluation, exactly, where the images are the same.

``--data`` says where the images of the run are now; by default they are where they were when it was trained.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from ssmkernels import data
from ssmkernels.finished.arguments import add_run, parser_of, run_command
from ssmkernels.finished.run import FinishedRun, load_run
from ssmkernels.trainers import MLSN, MixedLP, SimMatch, Slade, SwAV, slade_data, swav
from ssmkernels.trainers.base import Trainer
from ssmkernels.trainers.loop import Accelerator, Fabric, make_fabric


def evaluate(run: FinishedRun, *, root: str | None = None, accelerator: Accelerator = "auto") -> dict[str, float]:
    """The figures that the trainer of ``run`` has for the network in its checkpoint.

    Args:
        root: folder or file of the images, if they are no longer at ``run.config.data.root``.
        accelerator: what to evaluate on.

    Raises:
        FileNotFoundError: the images are not there.
        ValueError: they are others than the run was trained on.
    """
    config = run.config
    config.weights = None  # those of the checkpoint are taken
    if root is not None:
        config.data.root = root
    if getattr(config.data, "labels_file", None) is not None:
        config.data.labels_file = str(run.folder / "labels.txt")
    config.run.accelerator = accelerator
    fabric = make_fabric(config.run, precision=config.precision)
    trainer = _trainer(run.method, config, fabric)
    if not trainer.seen.is_like(run.images):
        raise ValueError(
            f"the images of data.root, {config.data.root}, are others than those of the run in {run.folder}"
        )
    trainer.load_state_dict(run.trainer)
    if isinstance(trainer, Slade):
        trainer.done = run.step
        trainer.final = trainer.is_final(trainer.position - 1)
    return trainer.evaluate()


def _trainer(method: str, config: Any, fabric: Fabric) -> Trainer:
    if method in ("mlsn", "simmatch"):
        splits = data.load_dataset(config.data.name, config.data.root)
        return (MLSN if method == "mlsn" else SimMatch)(config, splits, fabric)
    if method == "mixed-lp":
        return MixedLP(config, data.load_collection(config.data.name, config.data.root), fabric)
    if method == "slade":
        images, unlabeled = slade_data.load_images(config.data, unlabeled=config.uses_unlabeled)
        return Slade(config, images, fabric, unlabeled_images=unlabeled)
    return SwAV(config, *swav.load_images(config.data), fabric)


def main(argv: Sequence[str]) -> int:
    parser = parser_of("evaluate", __doc__)
    add_run(parser)
    parser.add_argument("--data", metavar="DIR", help="folder or file of the run's images, where they have been moved")
    return run_command(parser, argv, _evaluate)


def _evaluate(options: Any) -> None:
    run = load_run(options.run)
    figures = evaluate(run, root=options.data, accelerator=options.accelerator)
    if int(os.environ.get("RANK", 0)) > 0:  # torchrun's first rank speaks for all
        return
    print(f"after step {run.step}:")
    for name, value in figures.items():
        print(f"{name}: {value}")
    last = run.history[-1] if run.history else {"step": 0}
    if last["step"] != run.step:
        print(f"the run's own last evaluation was after step {last['step']}", file=sys.stderr)
        return
    for name, value in figures.items():
        if value != last[name]:
            print(f"{name} was {last[name]} in the run, with other images or on another device", file=sys.stderr)
