# SPDX-License-Identifier: BSD-3-Clause
"""What trainers of classifiers with few labels share: the images, a student, its moving average, and their accuracy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from ssmkernels import data, models
from ssmkernels.distributed import broadcast_buffers
from ssmkernels.nn import EMATeacher
from ssmkernels.trainers import kept
from ssmkernels.trainers.base import Trainer, channels_last
from ssmkernels.trainers.evaluation import top_k_accuracies
from ssmkernels.trainers.loop import Fabric
from ssmkernels.trainers.settings import CountOrZero, Settings


@dataclass
class DataConfig(Settings):
    """Which images, how many of them with labels, and how they are augmented."""

    section: ClassVar[str] = "data."

    name: str = "digits"
    """Data set, as :func:`ssmkernels.data.load_dataset` knows it."""
    root: str | None = None
    """Folder or file of the images; none for those that come inside packages."""
    labels: int = 40
    """Number of labelled images, equally many of each class."""
    proportional: bool = False
    """Draw them in proportion to the sizes of the classes instead."""
    labels_file: str | None = None
    """List of the labelled images in one of the published forms, see :func:`ssmkernels.data.read_labels`, instead of
    a draw by the seed; ``labels`` and ``proportional`` then have no effect.
    """
    held_out: CountOrZero = 0
    """Training images of each class, drawn by the seed, that are not learnt from but validated on; MixMatch-pytorch has
    500 of CIFAR-10.
    """
    labels_in_unlabeled: bool = True
    """Whether the labelled images are also among the unlabelled ones."""
    augment: Literal["batched", "pil"] = "batched"
    """Views of whole batches on the device of training, or image by image by Pillow in loading processes. The
    distribution is the same, the draws are not. Small images are all held on the device; of photographs loading
    processes decode and cut the crops.
    """
    flip: bool | None = None
    """Whether images are mirrored; none for what is natural for the data set."""
    shift: CountOrZero | None = None
    """Largest shift of an image in pixels; none for an eighth of its side."""


class EvaluationView(NamedTuple):
    """How test images are seen."""

    evaluation: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]


class ClassifierTrainer(Trainer):
    """A student that learns from labelled and unlabelled images, and an exponential moving average of it.

    Args:
        config: the settings, with ``data``, ``model``, ``steps``, ``batch_size``, ``seed`` and those of the average.
        splits: the images. A network of timm sees those of three channels by the mean and deviation that it was made
            for.
        fabric: the device, its precision and the other ranks.
        model: of the caller's own, if it is not ``config.model``.
    """

    def __init__(
        self, config: Any, splits: data.ImageSplits, fabric: Fabric, *, model: nn.Module | None = None
    ) -> None:
        super().__init__(config, fabric)
        if model is None and config.model.startswith("timm/") and splits.channels == 3:
            mean, std = models.timm_normalization(config.model)
            splits = replace(splits, mean=mean, std=std)
        splits, self.held_out = _hold_out(splits, config.data.held_out, config.seed)
        self.splits, self.steps = splits, config.steps
        self.measures_pseudo_labels = bool((splits.train.labels >= 0).all())
        self.batched = config.data.augment == "batched"
        chosen = {"flip": config.data.flip, "shift": config.data.shift}
        self.transforms: Any = data.default_transforms(splits, **chosen)
        self.evaluation_view = EvaluationView(self.transforms.evaluation, splits.mean, splits.std)
        if self.batched:
            self.transforms = data.batch_transforms(splits, **chosen)
        self.seen = data.SeenImages.of(
            self.evaluation_view.evaluation,
            splits.mean,
            splits.std,
            size=splits.image_size,
            class_names=splits.class_names,
        )
        if config.data.labels_file is not None:
            self.labeled_index = kept.read_labels(config, splits.train, splits.class_names)
        else:
            self.labeled_index = data.split_labels(
                splits.train.labels, config.data.labels, seed=config.seed, proportional=config.data.proportional
            )

    def set_up(self, model: nn.Module, *, momentum: float, decay_all: bool) -> None:
        """Student, optimiser and average.

        Args:
            momentum: Nesterov's, of SGD.
            decay_all: decay biases and normalisation too.
        """
        config = self.config
        groups = model.parameters() if decay_all else models.parameter_groups(model, config.weight_decay)
        rates: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay, **self.fused}
        optimizer: torch.optim.Optimizer
        if config.optimizer == "adamw":
            optimizer = torch.optim.AdamW(groups, **rates)
        else:
            optimizer = torch.optim.SGD(groups, **rates, momentum=momentum, nesterov=momentum > 0)
        self.load_weights(model)
        self.model = channels_last(model)
        self.student, self.optimizer = self.fabric.setup(self.compiled(self.model), optimizer)
        self.teacher = EMATeacher(self.model, config.ema_decay, buffers=config.ema_buffers, warm_up=config.ema_warm_up)

    def training_batches(self, start_step: int, *, mu: int, strong: Any) -> Iterable[data.Batch]:
        """B labelled images of every step, and ``mu`` times as many unlabelled ones in a weak and a ``strong`` view."""
        config, splits = self.config, self.splits
        settings = {
            "weak": self.transforms.weak,
            "strong": strong,
            "batch_size": config.batch_size,
            "mu": mu,
            "seed": config.seed,
            "start_step": start_step,
            "num_steps": config.steps,
            "mean": splits.mean,
            "std": splits.std,
            "exclude_labeled": not config.data.labels_in_unlabeled,
            **self.ranks,
        }
        images = splits.train, self.labeled_index, splits.train
        if self.batched and splits.augmentation != "imagenet":
            batches: Any = data.DeviceTrainBatches(*images, **settings, device=self.fabric.device)
            return batches
        return self.loader(data.TrainBatches(*images, **settings))

    def labels_text(self) -> str:
        return data.labels_text(self.labeled_index, self.splits.train, self.splits.class_names)

    def accuracies(self, images: data.ImageDataset, ks: tuple[int, ...] = (1,)) -> dict[str, list[float]]:
        """Top-k accuracies on some images of the student and of its average, "ema"."""
        networks = {"student": self.model, "ema": self.teacher}
        for network in networks.values():
            broadcast_buffers(network)
        batches = self.evaluation_set(images, self.evaluation_view)
        return top_k_accuracies(networks, batches, device=self.fabric.device, ks=ks, autocast=self.fabric.autocast)


def _hold_out(splits: data.ImageSplits, count: int, seed: int) -> tuple[data.ImageSplits, data.ImageDataset | None]:
    """The splits without ``count`` training images of each class, and those images, if any."""
    if count == 0:
        return splits, None
    labels = splits.train.labels
    held = data.split_labels(labels, count * splits.num_classes, seed=seed)
    kept = np.setdiff1d(np.arange(len(labels)), held)
    train, held_out = (data.ImageSubset(splits.train, part, labels[part], splits.num_classes) for part in (kept, held))
    return replace(splits, train=train), held_out
