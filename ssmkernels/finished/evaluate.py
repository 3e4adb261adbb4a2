# SPDX-License-Identifier: BSD-3-Clause
"""Evaluates a finished run again: the figures of its last evaluation, exactly, where the images are the same.

``--data`` says where the images of the run are now; by default they are where they were when it was trained.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssmkernels import data
from ssmkernels.finished.arguments import add_run, parser_of, run_command
from ssmkernels.finished.run import FinishedRun, fold_names, load_run, no_checkpoint
from ssmkernels.trainers import MLSN, MixedLP, SimMatch, Slade, SwAV, slade, slade_data, swav
from ssmkernels.trainers.base import Trainer
from ssmkernels.trainers.loop import Accelerator, Fabric, make_fabric
from ssmkernels.trainers.ranks import this_rank


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
    config.run.accelerator = accelerator
    fabric = make_fabric(config.run, precision=config.precision)
    trainer = _trainer(run.method, config, fabric)
    _check_images(run, trainer.seen)
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
    return SwAV(config, *swav.load_images(config), fabric)


def evaluate_folds(
    folder: str | Path, *, root: str | None = None, accelerator: Accelerator = "auto"
) -> dict[str, float]:
    """As :func:`evaluate`, of a run of SLADE with a network for each fold: the figures of them together.

    Raises:
        FileNotFoundError: a fold has no network yet, or the images are not there.
        ValueError: one is damaged, or the images are others than the run was trained on.
    """
    folder = Path(folder)
    first = load_run(folder / "fold0", best=True)
    config = first.config
    if root is not None:
        config.data.root = root
    images, _ = slade_data.load_images(config.data, unlabeled=False)
    _check_images(first, slade_data.SladeImages(config, images).seen(images))
    config.data.fold, config.run.out, config.run.accelerator = None, str(folder), accelerator
    return slade.evaluate_folds(config, images)


def _check_images(run: FinishedRun, seen: data.SeenImages) -> None:
    if not seen.is_like(run.images):
        root = run.config.data.root
        raise ValueError(f"the images of data.root, {root}, are others than those of the run in {run.folder}")


def _record_of_folds(folder: Path) -> dict[str, Any]:
    """What the training left when the last fold had ended."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{no_checkpoint(folder)}, or go on with --resume until all have ended")
    return json.loads(path.read_text().splitlines()[-1])


def main(argv: Sequence[str]) -> int:
    parser = parser_of("evaluate", __doc__)
    add_run(parser)
    parser.add_argument("--data", metavar="DIR", help="folder or file of the run's images, where they have been moved")
    return run_command(parser, argv, _evaluate)


def _evaluate(options: Any) -> None:
    folder, where = Path(options.run), {"root": options.data, "accelerator": options.accelerator}
    if fold_names(folder):
        last = _record_of_folds(folder)
        step, figures = last["step"], evaluate_folds(folder, **where)
    else:
        run = load_run(folder)
        step, last = run.step, run.history[-1] if run.history else {"step": 0}
        figures = evaluate(run, **where)
    if this_rank()[0] > 0:  # torchrun's first rank speaks for all
        return
    print(f"after step {step}:")
    for name, value in figures.items():
        print(f"{name}: {value}")
    if last["step"] != step:
        print(f"the run's own last evaluation was after step {last['step']}", file=sys.stderr)
        return
    for name, value in figures.items():
        if value != last[name]:
            print(f"{name} was {last[name]} in the run, with other images or on another device", file=sys.stderr)
