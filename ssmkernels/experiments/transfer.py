# SPDX-License-Identifier: BSD-3-Clause
"""SimMatch, Table 3: features learnt on ImageNet with 10 % of the labels, rated by linear classifiers on other data sets.

Without --data the network learns digits, and is rated on digits and MNIST.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ssmkernels import data as images
from ssmkernels import models
from ssmkernels.experiments.experiment import Budget, Findings, check_images, failure_text, in_words, missing_data
from ssmkernels.experiments.jobs import EXPECTED, FOLDER, Job, Outcome, run_jobs, training_job
from ssmkernels.experiments.record import Entry
from ssmkernels.experiments.report import markdown_table, ours
from ssmkernels.trainers import train_simmatch
from ssmkernels.trainers.checkpoint import load_checkpoint
from ssmkernels.trainers.cli import parse_config
from ssmkernels.trainers.linear_evaluation import PENALTIES, transfer
from ssmkernels.trainers.loop import make_fabric
from ssmkernels.trainers.simmatch import SimMatchConfig
from ssmkernels.trainers.transfer_data import load_transfer_images

Backbone = Callable[[], tuple[nn.Module, images.ImageSplits | None]]
"""A network, and the images that it has learnt from, or None for ImageNet."""

SIMMATCH, SUPERVISED = "SimMatch (10 %)", "Supervised"
SETS = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "food101": "Food-101",
    "cars196": "Cars",
    "dtd": "DTD",
    "pets": "Pets",
    "flowers102": "Flowers",
}
PER_CLASS = ("pets", "flowers102")
"""Rated by the mean accuracy per class."""
PAPER = {
    SUPERVISED: {**dict(zip(SETS, ("93.6", "78.3", "72.3", "66.7", "74.9", "91.5", "94.7"), strict=True)), "mean": "81.7"},
    SIMMATCH: {**dict(zip(SETS, ("93.6", "78.4", "71.7", "69.7", "75.1", "92.8", "93.2"), strict=True)), "mean": "82.1"},
}
_DEVIATIONS = (
    "The network is that of our Table 2, ImageNet with 10 % of the labels, at the same budget; its student, as it is evaluated there.",
    "Supervised is torchvision's ResNet-50 (IMAGENET1K_V1). The paper's other rows are other methods and are not run.",
    "Multinomial logistic regression with an L2 penalty by L-BFGS on central crops of 224 pixels, the protocol of SimCLR and BYOL that the "
    "paper names. Without an official validation split a fifth of the training images picks the penalty. DTD is its first split.",
)


@dataclass(frozen=True)
class Setting:
    """What is learnt on, and what the features are rated on."""

    arguments: tuple[str, ...]
    budget: Budget
    sets: dict[str, str]
    image_size: int | None
    penalties: Sequence[float] = PENALTIES


def table3(budgets: Mapping[str, Budget], offline: tuple[str, ...], *, budget: str, data: str | None, out: Path) -> Findings:
    """Trains, or takes up what Table 2 has trained with its ``budgets``, and rates the features.

    Args:
        budgets: of Table 2.
        offline: arguments that replace ImageNet where no images are given.
    """
    setting = choose(budgets[budget], budget, offline, data)
    title = "SimMatch, Table 3"
    place = () if data is None else ("--data.root", data)
    config, _ = parse_config("simmatch", [*setting.arguments, *setting.budget.arguments, *place, "--seed", "1"])
    check_images("simmatch", [config.data])
    check_sets(setting.sets, data)
    training = training_job("simmatch", config, train_simmatch, f"{title}: training")
    trained = run_jobs(out.parent / FOLDER, [training])[training.name]
    checkpoint = out.parent / FOLDER / training.name / "checkpoint.pt"
    backbones: dict[str, Backbone] = {SIMMATCH: functools.partial(trained_backbone, config, checkpoint)}
    names = {SIMMATCH: training.name}
    if data is not None:
        backbones[SUPERVISED], names[SUPERVISED] = supervised_backbone, "resnet50-imagenet"
    jobs = {
        (row, name): Job(
            f"linear-{name}-{len(setting.penalties)}-{names[row]}",
            f"{title}: {row}, {label}",
            functools.partial(rate, setting, config, backbone, name, data),
        )
        for row, backbone in backbones.items()
        for name, label in setting.sets.items()
        if row != SIMMATCH or trained.error is None
    }
    done = run_jobs(out.parent / FOLDER, list(jobs.values()))
    outcomes = {where: done[job.name] for where, job in jobs.items()}
    entries = tuple(entry for row in PAPER if row in backbones for entry in _entries(row, setting, outcomes, trained))
    deviations = (*_said(budget, setting, data), *_DEVIATIONS)
    table = markdown_table(
        ["method", "data", "figure, %", "paper", f"ours, {budget}"],
        [[each.row, each.column, each.figure, each.paper, ours(each, 1)] for each in entries],
    )
    said = "\n".join(f"- {each}" for each in deviations)
    return Findings(
        text=f"{table}\n\n{failure_text(entries)}Deviations from the paper:\n\n{said}\n",
        data=", ".join(dict.fromkeys([config.data.name, *setting.sets])) + (" (inside packages)" if data is None else ""),
        seeds=(1,),
        entries=entries,
        seconds=trained.seconds + sum(each.seconds for each in done.values()),
        deviations=deviations,
    )


def choose(extent: Budget, budget: str, offline: tuple[str, ...], data: str | None) -> Setting:
    """ImageNet and the paper's seven sets in the folder ``data``, digits without one."""
    arguments = ("--config", "imagenet-10")
    if data is not None:
        return Setting(arguments, extent, SETS, 224, PENALTIES[::11] if budget == "smoke" else PENALTIES)
    if budget != "smoke":
        raise ValueError(missing_data(budget))
    sets = {"digits": "digits", "mnist5k": "MNIST-5k"}
    return Setting(arguments, Budget(1, (*extent.arguments, *offline)), sets, None, PENALTIES[::11])


def check_sets(names: dict[str, str], root: str | None) -> None:
    """Raises what the readers say, if none of the sets is there."""
    problems = []
    for name in names:
        try:
            load_transfer_images(name, root)
        except EXPECTED as error:
            problems.append(str(error))
    if len(problems) == len(names):
        raise FileNotFoundError("\n".join(problems))


def trained_backbone(config: SimMatchConfig, checkpoint: Path) -> tuple[nn.Module, images.ImageSplits | None]:
    """The backbone of a finished run, and the images that it has seen."""
    splits = images.load_dataset(config.data.name, config.data.root)
    model = models.build_model(config.model, splits.num_classes, in_channels=splits.channels, projection_dim=config.projection_dim)
    model.load_state_dict(load_checkpoint(checkpoint)["trainer"]["model"])
    return model.backbone, splits


def supervised_backbone() -> tuple[nn.Module, images.ImageSplits | None]:
    """torchvision's ResNet-50 with its ImageNet weights, pooled."""
    network = models.build_embedding_model("resnet50", 1, weights="imagenet", pooling="avg")
    return nn.Sequential(network.backbone, nn.AdaptiveAvgPool2d(1), nn.Flatten()), None


def rate(setting: Setting, config: SimMatchConfig, backbone: Backbone, name: str, root: str | None, folder: Path) -> dict[str, float]:
    """The linear evaluation of a backbone on the data set ``name``."""
    network, splits = backbone()
    mean, std = images.NORMALIZATIONS["imagenet"][:2] if splits is None else (splits.mean, splits.std)
    return transfer(
        network,
        load_transfer_images(name, root),
        mean=mean,
        std=std,
        image_size=setting.image_size,
        device=make_fabric(accelerator=config.run.accelerator).device,
        workers=config.run.workers,
        penalties=setting.penalties,
    )._asdict()


def _entries(row: str, setting: Setting, outcomes: dict[tuple[str, str], Outcome], trained: Outcome) -> list[Entry]:
    paper = PAPER[row] if setting.sets is SETS else {}
    entries = []
    for name, label in setting.sets.items():
        outcome = outcomes.get((row, name), trained)
        figure, key = ("mean per class", "mean_per_class") if name in PER_CLASS else ("top-1", "accuracy")
        values = () if outcome.error is not None else (100 * outcome.value[key],)
        entries.append(Entry(row, label, figure, "%", paper.get(name, "-"), values, () if outcome.error is None else (outcome.error,)))
    complete = all(each.values for each in entries)
    mean = (statistics.fmean(each.values[0] for each in entries),) if complete else ()
    return [*entries, Entry(row, "mean", "mean of the sets", "%", paper.get("mean", "-"), mean)]


def _said(budget: str, setting: Setting, data: str | None) -> list[str]:
    said = []
    if data is None:
        said.append(
            "No folder of images was given: the network learnt scikit-learn's digits, and is rated on digits and MNIST-5k inside packages."
        )
    if setting.budget.arguments:
        purpose = "; this shows that it runs, not what it reaches" if budget == "smoke" else ""
        said.append(f"Budget {budget}: {in_words(setting.budget.arguments)}{purpose}.")
    return said
