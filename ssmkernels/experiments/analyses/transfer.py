# SPDX-License-Identifier: BSD-3-Clause
"""SimMatch, Table 3: features learnt on ImageNet with 10 % of the labels, rated by linear classifiers on other data
sets.

Without --data the network learns digits, and is rated on digits and MNIST.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from ssmkernels import data as images
from ssmkernels import models
from ssmkernels.data import load_transfer_images
from ssmkernels.experiments.jobs import Job, training_job
from ssmkernels.experiments.record import Entry
from ssmkernels.experiments.run import Cells, Request, Result, Values, cells_of_columns, configure, entries_of, numbers
from ssmkernels.experiments.sources import EMBEDDED, INSIDE_PACKAGES, error_of
from ssmkernels.experiments.spec import Cell, Figure, Table
from ssmkernels.trainers.checkpoint import load_checkpoint
from ssmkernels.trainers.linear_evaluation import PENALTIES, transfer
from ssmkernels.trainers.loop import make_fabric
from ssmkernels.trainers.simmatch import SimMatchConfig

Backbone = Callable[[], tuple[nn.Module, images.ImageSplits | None]]
"""A network, and the images that it has learnt from, or None for ImageNet."""

SIMMATCH, SUPERVISED = "SimMatch (10 %)", "Supervised"
PER_CLASS = ("pets", "flowers102")
"""Rated by the mean accuracy per class."""


def cells(table: Table, request: Request) -> Cells:
    """A linear evaluation for each network and each set whose images are there."""
    embedded = request.source.kind == EMBEDDED
    sets = {title: str(name) for title, name in table.columns.items()}
    penalties = PENALTIES[::11] if request.budget == "smoke" else PENALTIES
    networks: dict[str, tuple[str, Backbone, tuple[Job, ...]]] = {}
    if not embedded:
        networks[SUPERVISED] = ("resnet50-imagenet", supervised_backbone, ())
    config, _ = configure(replace(table, columns={"": ""}), request, "", table.rows[SIMMATCH])
    problem = request.source.problem("simmatch", config.data.name, config.data)
    if problem is not None and request.check and not embedded:
        raise problem
    devices = table.budget(request.budget).devices
    training = training_job("simmatch", config, f"{table.title}: training", devices=devices)
    checkpoint = request.jobs / training.name / "checkpoint.pt"
    networks[SIMMATCH] = (training.name, functools.partial(trained_backbone, config, checkpoint), (training,))

    def cells_of(title: str) -> Iterator[Cell]:
        figure = Figure("mean per class", "mean_per_class") if sets[title] in PER_CLASS else Figure("top-1", "accuracy")
        for row, (name, backbone, needs) in networks.items():
            rated = functools.partial(rate, config, backbone, sets[title], request.source.path, penalties)
            job = Job(f"linear-{sets[title]}-{len(penalties)}-{name}", f"{table.title}: {row}, {title}", rated, needs)
            paper = numbers(table, request, row, title)
            yield Cell(row, title, (figure,), paper, functools.partial(_job, job))

    def missing(title: str) -> Exception | None:
        return error_of(load_transfer_images, sets[title], request.source.path)

    return cells_of_columns(table, sets, request, missing, cells_of)


def _job(job: Job, seed: int) -> Job:
    """There is one training and one evaluation, whatever the seed."""
    return job


def means(table: Table, request: Request, cells: Sequence[Cell], values: Values) -> Result:
    """The mean over the sets, of networks that are rated on all of them."""
    entries = []
    outcomes = {cell: outcome for (cell, _), outcome in values.items()}
    for row in dict.fromkeys(cell.row for cell in cells):
        ratings = [entries_of(cell, {1: outcomes[cell]})[0].values for cell in cells if cell.row == row]
        mean = (statistics.fmean(rating[0] for rating in ratings),) if all(ratings) else ()
        (paper,) = numbers(table, request, row, "mean")
        entries.append(Entry(row, "mean", "mean of the sets", "%", paper, mean, (), (1,) if mean else ()))
    return Result(tuple(entries))


def trained_backbone(config: SimMatchConfig, checkpoint: Path) -> tuple[nn.Module, images.ImageSplits | None]:
    """The backbone of a finished run, and the images that it has seen."""
    splits = images.load_dataset(config.data.name, config.data.root)
    model = models.build_model(
        config.model, splits.num_classes, in_channels=splits.channels, projection_dim=config.projection_dim
    )
    model.load_state_dict(load_checkpoint(checkpoint)["trainer"]["model"])
    return model.backbone, splits


def supervised_backbone() -> tuple[nn.Module, images.ImageSplits | None]:
    """torchvision's ResNet-50 with its ImageNet weights, pooled."""
    network = models.build_embedding_model("resnet50", 1, weights="imagenet", pooling="avg")
    return nn.Sequential(network.backbone, nn.AdaptiveAvgPool2d(1), nn.Flatten()), None


def rate(
    config: SimMatchConfig, backbone: Backbone, name: str, root: str | None, penalties: Sequence[float], folder: Path
) -> dict[str, float]:
    """The linear evaluation of a backbone on the data set ``name``."""
    network, splits = backbone()
    mean, std = images.NORMALIZATIONS["imagenet"][:2] if splits is None else (splits.mean, splits.std)
    return transfer(
        network,
        load_transfer_images(name, root),
        mean=mean,
        std=std,
        image_size=None if name in INSIDE_PACKAGES else 224,
        device=make_fabric(config.run).device,
        workers=config.run.workers,
        penalties=penalties,
    )._asdict()
