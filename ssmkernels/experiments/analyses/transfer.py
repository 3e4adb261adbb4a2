# SPDX-License-Identifier: BSD-3-Clause
"""SimMatch, Table 3: features learnt on ImageNet with 10 % of the labels, rated by linear classifiers on other data
sets.

Without --data the network learns digits, and is rated on digits and MNIST.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from ssmkernels import data as images
from ssmkernels import models
from ssmkernels.experiments.jobs import EXPECTED, Job, training_job
from ssmkernels.experiments.record import Entry
from ssmkernels.experiments.run import Cells, Request, Result, Values, configure, entries_of, numbers
from ssmkernels.experiments.sources import EMBEDDED, INSIDE_PACKAGES
from ssmkernels.experiments.spec import Cell, Figure, Table
from ssmkernels.trainers import train_simmatch
from ssmkernels.trainers.checkpoint import load_checkpoint
from ssmkernels.trainers.linear_evaluation import PENALTIES, transfer
from ssmkernels.trainers.loop import make_fabric
from ssmkernels.trainers.simmatch import SimMatchConfig
from ssmkernels.trainers.transfer_data import load_transfer_images

Backbone = Callable[[], tuple[nn.Module, images.ImageSplits | None]]
"""A network, and the images that it has learnt from, or None for ImageNet."""

SIMMATCH, SUPERVISED = "SimMatch (10 %)", "Supervised"
PER_CLASS = ("pets", "flowers102")
"""Rated by the mean accuracy per class."""


def cells(table: Table, request: Request) -> Cells:
    """A linear evaluation for each network and each set whose images are there."""
    embedded = request.source.kind == EMBEDDED
    sets = (
        {"digits": "digits", "MNIST-5k": "mnist5k"}
        if embedded
        else {title: str(name) for title, name in table.columns.items()}
    )
    config, _ = configure(replace(table, columns={"": ""}), request, "", table.rows[SIMMATCH])
    if (
        not embedded
        and request.check
        and (problem := request.source.problem("simmatch", config.data.name, config.data))
    ):
        raise problem
    training = training_job("simmatch", config, train_simmatch, f"{table.title}: training")
    checkpoint = request.jobs / training.name / "checkpoint.pt"
    networks: dict[str, tuple[str, Backbone, tuple[Job, ...]]] = {
        SIMMATCH: (training.name, functools.partial(trained_backbone, config, checkpoint), (training,))
    }
    if not embedded:
        networks[SUPERVISED] = ("resnet50-imagenet", supervised_backbone, ())
    problems = (
        {}
        if not request.check
        else {title: problem for title, name in sets.items() if (problem := _problem(name, request))}
    )
    if len(problems) == len(sets):
        raise FileNotFoundError("\n".join(map(str, problems.values())))
    penalties = PENALTIES[::11] if request.budget == "smoke" else PENALTIES
    found = []
    for row, (name, backbone, needs) in networks.items():
        for title in sets.keys() - problems.keys():
            figure = (
                Figure("mean per class", "mean_per_class") if sets[title] in PER_CLASS else Figure("top-1", "accuracy")
            )
            rated = functools.partial(rate, config, backbone, sets[title], request.source.path, penalties)
            job = Job(f"linear-{sets[title]}-{len(penalties)}-{name}", f"{table.title}: {row}, {title}", rated, needs)
            found.append(Cell(row, title, (figure,), numbers(table, request, row, title), functools.partial(_job, job)))
    order = list(sets)
    found.sort(key=lambda cell: order.index(cell.column))
    return Cells(table, tuple(found), tuple(f"{title}: {problem}" for title, problem in problems.items()))


def _job(job: Job, seed: int) -> Job:
    return job


def _problem(name: str, request: Request) -> Exception | None:
    try:
        load_transfer_images(name, request.source.path)
    except EXPECTED as error:
        return error
    return None


def means(table: Table, request: Request, cells: Sequence[Cell], values: Values) -> Result:
    """The mean over the sets, of networks that are rated on all of them."""
    entries = []
    for row in dict.fromkeys(cell.row for cell in cells):
        rated = [entries_of(cell, {1: values[cell, 1]})[0] for cell in cells if cell.row == row and (cell, 1) in values]
        complete = bool(rated) and all(each.values for each in rated)
        mean = (statistics.fmean(each.values[0] for each in rated),) if complete else ()
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
        device=make_fabric(accelerator=config.run.accelerator).device,
        workers=config.run.workers,
        penalties=penalties,
    )._asdict()
