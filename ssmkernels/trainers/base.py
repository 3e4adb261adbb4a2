# SPDX-License-Identifier: BSD-3-Clause
"""What every trainer has, and what :func:`ssmkernels.trainers.loop.fit` asks of it."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ssmkernels import data, models
from ssmkernels._files import write_atomically
from ssmkernels.distributed import broadcast_buffers
from ssmkernels.trainers import kept
from ssmkernels.trainers.evaluation import EvaluationSet, embed
from ssmkernels.trainers.first_rank import on_first_rank
from ssmkernels.trainers.loop import Fabric, RunConfig, RunResult, fit, ignore_stop_signals

T = TypeVar("T")


class Views(Protocol):
    """How images are seen when a network is evaluated."""

    @property
    def evaluation(self) -> Any: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...


class Trainer(ABC):
    """A method: its parts, its batches, its step.

    Args:
        config: the settings, with ``run`` among them.
        fabric: the device, its precision and the other ranks.
    """

    optimizer: Any
    steps: int
    """Of the whole run."""
    seen: data.SeenImages
    """How the network sees images when it is evaluated."""
    images_per_step: int
    """All ranks together, each view counted."""
    shown: tuple[str, ...] = ("loss",)
    """The scalars that fit into the progress bar."""
    saved: tuple[str, ...] = ()
    """Attributes, plain values or tensors, that a checkpoint keeps beside the parts."""
    kept_before: Path | None = None
    """The folder of another run whose lists and weights this one begins with, see :mod:`ssmkernels.trainers.kept`."""

    def __init__(self, config: Any, fabric: Fabric) -> None:
        self.config, self.fabric = config, fabric
        self.evaluation_sets: dict[int, EvaluationSet] = {}
        self.ranks = {"rank": fabric.global_rank, "world_size": fabric.world_size}

    @abstractmethod
    def parts(self) -> dict[str, Any]:
        """Networks, statistics and the optimiser, by their names in a checkpoint."""

    @abstractmethod
    def batches(self, start_step: int) -> Iterable[Any]:
        """The batches of every step from ``start_step`` on; the same whether or not the run was interrupted before."""

    @abstractmethod
    def step(self, batch: Any, step: int) -> dict[str, Tensor]:
        """One optimiser step; its metrics as scalars on the device, among them ``loss``."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Figures of the network as it is, the same on every rank."""

    def scalars(self, means: dict[str, float]) -> dict[str, float]:
        """What is reported of the means of the metrics since the last report."""
        return means

    def labels_text(self) -> str | None:
        """The labelled images as ``labels.txt`` has them, see :func:`ssmkernels.data.labels_text`; None for none."""
        return None

    def keep_inputs(self, folder: Path) -> None:
        """Writes the lists of labelled images and of classes into the folder of the run."""
        lists = {kept.LABELS: self.labels_text(), kept.CLASSES: kept.classes_text(self.config, self.kept_before)}
        for name, text in lists.items():
            if text is not None:
                write_atomically(folder / name, text)

    def run(
        self, *, resume: bool = False, epoch_ends: Container[int] | None = None, best: str | None = None
    ) -> RunResult:
        """Runs all steps; arguments as in :func:`ssmkernels.trainers.loop.fit`."""
        return fit(
            self,
            fabric=self.fabric,
            steps=self.steps,
            run=self.config.run,
            config=asdict(self.config),
            resume=resume,
            epoch_ends=epoch_ends,
            best=best,
            ended=self.ended,
        )

    def ended(self, step: int) -> bool:
        """Whether the run is over after ``step`` steps, although there are more."""
        return False

    def on_first_rank(self, work: Callable[[], T]) -> T:
        """What ``work()`` gives on the first rank, see :func:`ssmkernels.trainers.first_rank.on_first_rank`."""
        return on_first_rank(work, self.fabric, self.config.run.timeout)

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def set_learning_rate(self, rate: float, factor: float = 1.0) -> None:
        """``rate`` times ``factor``, in every group of parameters times its ``scale``, where it has one."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0) * factor

    def state_dict(self) -> dict[str, Any]:
        """The same on every rank."""
        parts = self.parts()
        for part in parts.values():
            if isinstance(part, nn.Module):
                broadcast_buffers(part)
        states = {name: part.state_dict() for name, part in parts.items()}
        return {**states, **{name: getattr(self, name) for name in self.saved}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        for name in self.saved:
            setattr(self, name, self.fabric.to_device(state[name]))

    def load_weights(self, model: nn.Module) -> None:
        """Fills the backbone of ``model`` with ``config.weights``, where there are any and no checkpoint has later
        ones, and says what was taken.
        """
        if self.config.weights is not None and not kept.has_begun(self.config):
            self.take_weights(model, self.config.weights)

    def take_weights(self, model: nn.Module, weights: str | Path) -> None:
        self.fabric.print(models.load_weights(model, weights, name=self.config.model), file=sys.stderr)

    def loader(self, batches: Dataset[Any]) -> Iterable[Any]:
        return training_loader(batches, self.fabric, self.config.run)

    def embed(self, network: nn.Module, images: data.ImageDataset, views: Views) -> tuple[Tensor, Tensor, Tensor]:
        """Features, embeddings and labels of this rank's run of images, see
        :func:`ssmkernels.trainers.evaluation.embed`.
        """
        broadcast_buffers(network)
        batches = self.evaluation_set(images, views)
        return embed(network, batches, device=self.fabric.device, autocast=self.fabric.autocast)

    def evaluation_set(self, images: data.ImageDataset, views: Views) -> EvaluationSet:
        """This rank's share of the images, kept from one evaluation to the next."""
        if id(images) not in self.evaluation_sets:
            self.evaluation_sets[id(images)] = evaluation_loader(images, self.fabric, self.config.run, views)
        return self.evaluation_sets[id(images)]

    def compiled(self, network: nn.Module) -> nn.Module:
        """The network as it learns, compiled where ``run.compile`` says so; states are those of the network itself."""
        compiled: Any = torch.compile(network) if self.config.run.compile else network
        return cast(nn.Module, compiled)

    @property
    def fused(self) -> dict[str, Any]:
        """Of an optimiser: on a GPU it is a few kernels for all parameters, but does not take gradients that are
        unscaled before, as they are of 16-mixed.
        """
        scaled = self.config.precision == "16-mixed"
        return {"fused": True} if self.fabric.device.type == "cuda" and not scaled else {}


def training_loader(batches: Any, fabric: Fabric, run: RunConfig) -> Iterable[Any]:
    """Loads batches that a data set makes whole, in ``run.workers`` processes; of crops the views are made on the
    device.
    """
    loader: DataLoader[Any] = DataLoader(
        batches,
        batch_size=None,
        num_workers=run.workers,
        worker_init_fn=ignore_stop_signals,
        pin_memory=fabric.device.type == "cuda",
    )
    return FinishedBatches(loader, batches, fabric) if batches.cropped else loader


class FinishedBatches:
    """Batches of a loader whose crops become views on the device, see :mod:`ssmkernels.data.batched_crops`."""

    def __init__(self, loader: DataLoader[Any], batches: Any, fabric: Fabric) -> None:
        self.loader, self.batches, self.fabric = loader, batches, fabric

    def __iter__(self) -> Iterator[Any]:
        for step, batch in enumerate(self.loader, start=self.batches.start_step):
            yield self.batches.finish(self.fabric.to_device(batch), step)


def evaluation_loader(images: data.ImageDataset, fabric: Fabric, run: RunConfig, views: Views) -> EvaluationSet:
    """This rank's share of the images."""
    return EvaluationSet(
        images,
        fabric.device,
        mean=views.mean,
        std=views.std,
        transform=views.evaluation,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        workers=run.workers,
        worker_init_fn=ignore_stop_signals,
    )


def channels_last(network: nn.Module) -> nn.Module:
    """Convolutions are faster so, on CPUs and on tensor cores."""
    return network.to(memory_format=torch.channels_last)
