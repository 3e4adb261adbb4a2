# SPDX-License-Identifier: BSD-3-Clause
"""SimMatch: Semi-supervised Learning with Similarity Matching (Zheng et al., CVPR 2022), Algorithm 1.

Two baselines of the paper are settings of the same trainer: FixMatch is ``alpha=1, lambda_in=0, alignment_queue=0,
hard_pseudo_labels=True`` and never touches the memory; supervised-only is ``lambda_u=0, lambda_in=0`` and never loads
unlabelled images.

Where the text of the paper is silent, this follows its public code: q_agg aggregates the uncalibrated q^w, while p̂ and
the unfolding use the calibrated p^w; p̂ is soft and the gate is max p̂ ≥ τ; L_in takes every unlabelled row; the memory
is read before it is written; in the first epoch L_in is left out and p̂ = p^w. In "temporal" mode (CIFAR) the weak
branch is the student, detached; in "teacher" mode (ImageNet) it is an EMA teacher.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ssmkernels import data, models
from ssmkernels.distributed import broadcast_buffers
from ssmkernels.nn import DistributionAlignment, EMATeacher, LabeledMemory
from ssmkernels.trainers.evaluation import top_k_accuracy
from ssmkernels.trainers.loop import Fabric, Precision, RunConfig, RunResult, fit, ignore_stop_signals, make_fabric
from ssmkernels.trainers.schedules import cosine_7_16, warm_up_half_cosine


@dataclass
class DataConfig:
    """Which images, how many of them with labels, and how they are augmented."""

    name: str = "digits"
    """Data set, as :func:`ssmkernels.data.load_dataset` knows it."""
    root: str | None = None
    """Folder or file of the images; none for those that come inside packages."""
    labels: int = 40
    """Number of labelled images, equally many of each class."""
    proportional: bool = False
    """Draw them in proportion to the sizes of the classes instead."""
    labels_in_unlabeled: bool = True
    """Whether the labelled images are also among the unlabelled ones."""


@dataclass
class SimMatchConfig:
    """Everything that determines a run. Defaults are the paper's for CIFAR-10."""

    data: DataConfig = field(default_factory=DataConfig)
    model: str = "wrn-28-2"
    """Network, as :func:`ssmkernels.models.build_model` knows it."""
    bn_momentum: float | None = None
    """Share of a batch in the running statistics of batch norm; none for the network's own, .001 in wide ResNets."""
    projection_dim: int = 128
    """D, size of the embeddings."""
    seed: int = 1
    """Seed of the labelled split, the initial weights, the batches and the augmentation."""

    batch_size: int = 64
    """B, labelled images of a step, all ranks together."""
    mu: int = 7
    """μ, unlabelled images per labelled one."""
    lambda_u: float = 1.0
    """λ_u, weight of the pseudo-label loss."""
    lambda_in: float = 1.0
    """λ_in, weight of the instance-matching loss."""
    threshold: float = 0.95
    """τ, confidence from which a pseudo-label counts."""
    temperature: float = 0.1
    """t, of weak and strong views."""
    alpha: float = 0.9
    """α, share of p^w in p̂, equation (10)."""
    propagate_to_instances: bool = True
    """Target q̂ of the instance-matching loss; without, q^w, the paper's ablation "w/o q̂"."""
    hard_pseudo_labels: bool = False
    """Learn argmax p̂ instead of p̂, as FixMatch does."""
    alignment_queue: int = 32
    """Batches in the running mean of distribution alignment; 0 turns it off."""
    memory: Literal["temporal", "teacher"] = "temporal"
    """Who makes weak views and memory: the student with a temporal ensemble, or an EMA teacher."""
    memory_momentum: float = 0.7
    """Share of the old embedding in the temporal ensemble."""
    first_epoch_steps: int = 1024
    """Steps at the start with p̂ = p^w and without L_in, while the memory fills."""

    steps: int = 2**20
    """K, optimiser steps of the run."""
    learning_rate: float = 0.03
    momentum: float = 0.9
    """Nesterov momentum of SGD."""
    weight_decay: float = 5e-4
    decay_all: bool = False
    """Decay biases and normalisation too."""
    schedule: Literal["cosine-7/16", "half-cosine"] = "cosine-7/16"
    """Learning rate: cos(7πk/16K), or a linear warm-up and then half a cosine to 0."""
    warm_up_steps: int = 0
    """Steps of the linear warm-up of half-cosine."""
    accumulate: int = 1
    """Pieces in which a batch goes through the network; batch norm and alignment see a piece at a time."""
    ema_decay: float = 0.999
    """Decay of the averaged model, the one that is evaluated and the teacher of memory "teacher"."""
    ema_buffers: Literal["average", "copy", "own"] = "copy"
    """Batch-norm statistics of the averaged model, see :class:`ssmkernels.nn.EMATeacher`."""
    ema_warm_up: bool = False
    """Shorter averages at the start."""
    precision: Precision = "32-true"
    """Arithmetic of the network; losses and statistics are float32 in all of them."""

    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        at_least = {
            "batch_size": 1,
            "mu": 1,
            "steps": 1,
            "accumulate": 1,
            "alignment_queue": 0,
            "first_epoch_steps": 0,
            "warm_up_steps": 0,
        }
        at_least |= {"lambda_u": 0, "lambda_in": 0, "learning_rate": 0, "weight_decay": 0, "projection_dim": 1}
        for name, lowest in at_least.items():
            if not getattr(self, name) >= lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; it should be at least {lowest}")
        for name in ("threshold", "alpha", "memory_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it should be in [0, 1]")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it should be positive")
        if self.ema_buffers == "own" and not (self.memory == "teacher" and self.uses_unlabeled):
            raise ValueError(
                'ema_buffers is "own"; with no teacher that sees images (memory "teacher") it should be "copy" or'
                ' "average"'
            )

    @property
    def uses_unlabeled(self) -> bool:
        return self.lambda_u > 0 or self.lambda_in > 0

    @property
    def uses_memory(self) -> bool:
        """Without L_in and with α = 1 nothing depends on the memory."""
        return self.uses_unlabeled and (self.lambda_in > 0 or self.alpha < 1)


class SimMatch:
    """Algorithm 1, for :func:`ssmkernels.trainers.loop.fit`.

    Args:
        config: the settings.
        splits: the images.
        fabric: the device, its precision and the other ranks.
        model: x [N, C, H, W] -> (logits [N, L], unit embeddings [N, projection_dim]); ``config.model`` is built if none
            is given.
    """

    def __init__(
        self, config: SimMatchConfig, splits: data.ImageSplits, fabric: Fabric, *, model: nn.Module | None = None
    ) -> None:
        if config.batch_size % (fabric.world_size * config.accumulate):
            pieces = f"{fabric.world_size} rank(s) times accumulate, {config.accumulate}"
            raise ValueError(f"batch_size is {config.batch_size}; it should be a multiple of {pieces}")
        self.config, self.splits, self.fabric = config, splits, fabric
        self.transforms = data.default_transforms(splits)
        self.labeled_index = data.split_labels(
            splits.train.labels, config.data.labels, seed=config.seed, proportional=config.data.proportional
        )
        classes = splits.num_classes
        if model is None:
            with torch.random.fork_rng():
                torch.manual_seed(config.seed)
                model = models.build_model(
                    config.model,
                    classes,
                    in_channels=splits.channels,
                    projection_dim=config.projection_dim,
                    bn_momentum=config.bn_momentum,
                )
        # Convolutions are faster so, on CPUs and on tensor cores
        self.model = model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(
            model.parameters() if config.decay_all else models.parameter_groups(model, config.weight_decay),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
        self.student, self.optimizer = fabric.setup(model, optimizer)
        self.teacher = EMATeacher(model, config.ema_decay, buffers=config.ema_buffers, warm_up=config.ema_warm_up)
        self.align = DistributionAlignment(classes, config.alignment_queue) if config.alignment_queue else nn.Identity()
        self.memory = None
        if config.uses_memory:
            labels = torch.as_tensor(splits.train.labels)[self.labeled_index]
            self.memory = LabeledMemory(
                len(labels),
                config.projection_dim,
                classes,
                labels=labels,
                mode=config.memory,
                momentum=config.memory_momentum,
            ).to(fabric.device)
        self.align.to(fabric.device)

    def step(self, batch: data.Batch, step: int) -> dict[str, Tensor]:
        """One pass through the body of Algorithm 1's inner loop."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self._learning_rate_factor(step)
        self.student.train()
        self.teacher.train()
        self.optimizer.zero_grad()
        pieces = _split(batch, self.config.accumulate)
        metrics, embeddings = [], []
        for number, piece in enumerate(pieces, start=1):
            with self.fabric.no_backward_sync(self.student, enabled=number < len(pieces)):
                losses, labeled_embeddings = self.losses(piece, first_epoch=step < self.config.first_epoch_steps)
                self.fabric.backward(losses["loss"] / len(pieces))
            metrics.append({name: value.detach() for name, value in losses.items()})
            embeddings.append(labeled_embeddings)
        self.optimizer.step()
        self.teacher.update(self.model)
        if self.memory is not None:
            self.memory.update(batch.slots, torch.cat(embeddings), batch.labels)
        return {name: torch.stack([each[name] for each in metrics]).mean() for name in metrics[0]}

    def losses(self, batch: data.Batch, *, first_epoch: bool) -> tuple[dict[str, Tensor], Tensor]:
        """The losses and metrics of a batch, and the embeddings of its labelled images that go to the memory,
        detached.
        """
        config, rows = self.config, len(batch.labels)
        if not config.uses_unlabeled:
            logits, embeddings = self.student(batch.labeled_weak)
            loss = F.cross_entropy(logits, batch.labels)
            return {"loss": loss, "loss_labeled": loss}, embeddings.detach()

        # One forward pass of the student for all its views, so that batch norm sees them together.
        if config.memory == "teacher":
            with self.fabric.autocast():
                teacher_logits, teacher_embeddings = self.teacher(torch.cat([batch.labeled_weak, batch.unlabeled_weak]))
            logits, embeddings = self.student(torch.cat([batch.labeled_weak, batch.unlabeled_strong]))
            logits_weak, (z_labeled, z_weak) = (
                teacher_logits[rows:],
                teacher_embeddings.split([rows, len(batch.unlabeled_weak)]),
            )
            logits_labeled, logits_strong, z_strong = logits[:rows], logits[rows:], embeddings[rows:]
        else:
            sizes = [rows, len(batch.unlabeled_weak), len(batch.unlabeled_strong)]
            logits, embeddings = self.student(
                torch.cat([batch.labeled_weak, batch.unlabeled_weak, batch.unlabeled_strong])
            )
            logits_labeled, logits_weak, logits_strong = logits.split(sizes)
            z_labeled, z_weak, z_strong = embeddings.split(sizes)

        probs = self.align(logits_weak.detach().float().softmax(dim=1))  # p^w, calibrated
        pseudo_probs, loss_instance = probs, logits.new_zeros(())
        if self.memory is not None:
            # A uniform one leaves q^w
            scale = probs if config.propagate_to_instances else torch.full_like(probs, 1 / probs.shape[1])
            t = config.temperature
            matching = self.memory.instance_matching(
                z_weak.detach(), z_strong, scale, temperature_weak=t, temperature_strong=t, alpha=config.alpha
            )
            loss_instance = matching.loss.mean()
            if not first_epoch:
                pseudo_probs = matching.pseudo_probs + config.alpha * (probs - scale)  # (10)
        confidence, pseudo_labels = pseudo_probs.max(dim=1)
        mask = (confidence >= config.threshold).float()
        target = pseudo_labels if config.hard_pseudo_labels else pseudo_probs

        loss_labeled = F.cross_entropy(logits_labeled, batch.labels)
        loss_unlabeled = (mask * F.cross_entropy(logits_strong, target, reduction="none")).mean()
        lambda_in = 0.0 if first_epoch else config.lambda_in
        correct = (pseudo_labels == batch.unlabeled_labels).float()  # measured, never learnt from
        metrics = {
            "loss": loss_labeled + config.lambda_u * loss_unlabeled + lambda_in * loss_instance,
            "loss_labeled": loss_labeled,
            "loss_unlabeled": loss_unlabeled,
            "loss_instance": loss_instance,
            "mask_rate": mask.mean(),
            "pseudo_label_accuracy": correct.mean(),
            "confident_and_correct": (mask * correct).mean(),
        }
        return metrics, z_labeled.detach()

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    @property
    def images_per_step(self) -> int:
        return self.config.batch_size * (1 + (2 * self.config.mu if self.config.uses_unlabeled else 0))

    @property
    def shown(self) -> tuple[str, ...]:
        return (
            "loss",
            "loss_labeled",
            *(("loss_unlabeled", "loss_instance", "mask_rate") if self.config.uses_unlabeled else ()),
        )

    def scalars(self, means: dict[str, float]) -> dict[str, float]:
        """The means, with the accuracy of the confident pseudo-labels where there are any."""
        scalars = dict(means)
        confident_and_correct = scalars.pop("confident_and_correct", 0.0)
        if scalars.get("mask_rate", 0.0) > 0:
            scalars["confident_accuracy"] = confident_and_correct / scalars["mask_rate"]
        return scalars

    def evaluate(self) -> dict[str, float]:
        """Test accuracy of the student and of its exponential moving average, top-1 and, with more than five
        classes, top-5.
        """
        splits, fabric = self.splits, self.fabric
        ks = (1, 5) if splits.num_classes > 5 else (1,)
        accuracies: dict[str, float] = {}
        for name, model in (("student", self.model), ("ema", self.teacher)):
            broadcast_buffers(model)
            batches = data.evaluation_batches(
                splits.test,
                256,
                mean=splits.mean,
                std=splits.std,
                transform=self.transforms.evaluation,
                rank=fabric.global_rank,
                world_size=fabric.world_size,
                workers=self.config.run.workers,
                worker_init_fn=ignore_stop_signals,
            )
            values = top_k_accuracy(model, batches, device=fabric.device, ks=ks)
            accuracies |= {
                f"{name}_accuracy" if k == 1 else f"{name}_top{k}": value for k, value in zip(ks, values, strict=True)
            }
        return accuracies

    def batches(self, start_step: int) -> Iterable[data.Batch]:
        config, splits = self.config, self.splits
        batches = data.TrainBatches(
            splits.train,
            self.labeled_index,
            splits.train,
            weak=self.transforms.weak,
            strong=self.transforms.strong,
            batch_size=config.batch_size,
            mu=config.mu if config.uses_unlabeled else 0,
            seed=config.seed,
            start_step=start_step,
            num_steps=config.steps,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
            mean=splits.mean,
            std=splits.std,
            exclude_labeled=not config.data.labels_in_unlabeled,
        )
        cuda = self.fabric.device.type == "cuda"
        return DataLoader(
            batches,
            batch_size=None,
            num_workers=config.run.workers,
            worker_init_fn=ignore_stop_signals,
            pin_memory=cuda,
        )

    def state_dict(self) -> dict[str, Any]:
        for module in (self.model, self.teacher):
            broadcast_buffers(module)
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "teacher": self.teacher, "alignment": self.align, "optimizer": self.optimizer}
        return parts if self.memory is None else {**parts, "memory": self.memory}

    def _learning_rate_factor(self, step: int) -> float:
        if self.config.schedule == "cosine-7/16":
            return cosine_7_16(step, self.config.steps)
        return warm_up_half_cosine(step, self.config.steps, self.config.warm_up_steps)


def train_simmatch(
    config: SimMatchConfig, *, resume: bool = False, splits: data.ImageSplits | None = None
) -> RunResult:
    """Trains as ``config`` says, from its checkpoint if ``resume``; on every rank under ``torchrun``.

    Args:
        splits: the images; ``config.data`` is loaded if none are given.
    """
    if splits is None:
        splits = data.load_dataset(config.data.name, config.data.root)
    # Without L_in nothing uses the projection head
    fabric = make_fabric(
        precision=config.precision, accelerator=config.run.accelerator, find_unused_parameters=config.lambda_in == 0
    )
    trainer = SimMatch(config, splits, fabric)
    return fit(trainer, fabric=fabric, steps=config.steps, run=config.run, config=asdict(config), resume=resume)


def _split(batch: data.Batch, pieces: int) -> list[data.Batch]:
    """A batch in ``pieces`` of as many rows each."""
    return (
        [batch]
        if pieces == 1
        else [type(batch)(*columns) for columns in zip(*(each.chunk(pieces) for each in batch), strict=True)]
    )
