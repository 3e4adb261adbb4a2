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

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels import data, models
from ssmkernels.nn import DistributionAlignment, LabeledMemory
from ssmkernels.trainers.classifier import ClassifierTrainer, DataConfig
from ssmkernels.trainers.loop import Fabric, Precision, RunConfig, RunResult, make_fabric
from ssmkernels.trainers.schedules import Schedule, schedule_factor
from ssmkernels.trainers.settings import Count, CountOrZero, NonNegative, Positive, Settings, Share


@dataclass
class SimMatchConfig(Settings):
    """Everything that determines a run. Defaults are the paper's for CIFAR-10."""

    data: DataConfig = field(default_factory=DataConfig)
    model: str = "wrn-28-2"
    """Network, as :func:`ssmkernels.models.build_model` knows it."""
    weights: str | None = None
    """Initial weights of its backbone: a file in one of the forms of :func:`ssmkernels.models.load_weights`; "imagenet"
    where the network has a source of them; none for random ones.
    """
    bn_momentum: float | None = None
    """Share of a batch in the running statistics of batch norm; none for the network's own, .001 in wide ResNets."""
    projection_dim: Count = 128
    """D, size of the embeddings."""
    seed: int = 1
    """Seed of the labelled split, the initial weights, the batches and the augmentation."""

    batch_size: Count = 64
    """B, labelled images of a step, all ranks together."""
    mu: Count = 7
    """μ, unlabelled images per labelled one."""
    lambda_u: NonNegative = 1.0
    """λ_u, weight of the pseudo-label loss."""
    lambda_in: NonNegative = 1.0
    """λ_in, weight of the instance-matching loss."""
    threshold: Share = 0.95
    """τ, confidence from which a pseudo-label counts."""
    temperature: Positive = 0.1
    """t, of weak and strong views."""
    alpha: Share = 0.9
    """α, share of p^w in p̂, equation (10)."""
    propagate_to_instances: bool = True
    """Target q̂ of the instance-matching loss; without, q^w, the paper's ablation "w/o q̂"."""
    hard_pseudo_labels: bool = False
    """Learn argmax p̂ instead of p̂, as FixMatch does."""
    strong_views: Literal["randaugment", "weak"] = "randaugment"
    """Views that learn the pseudo-labels of weak ones; other weak ones are those of pseudo-labelling without FixMatch.
    """
    alignment_queue: CountOrZero = 32
    """Batches in the running mean of distribution alignment; 0 turns it off."""
    memory: Literal["temporal", "teacher"] = "temporal"
    """Who makes weak views and memory: the student with a temporal ensemble, or an EMA teacher."""
    memory_momentum: Share = 0.7
    """Share of the old embedding in the temporal ensemble."""
    split_memory_above: CountOrZero = 2**30
    """Bytes of embeddings up to which each rank has the whole memory; a larger one is split between the ranks."""
    first_epoch_steps: CountOrZero = 1024
    """Steps at the start with p̂ = p^w and without L_in, while the memory fills."""

    steps: Count = 2**20
    """K, optimiser steps of the run."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: NonNegative = 0.03
    """At its highest."""
    momentum: float = 0.9
    """Nesterov momentum of SGD."""
    weight_decay: NonNegative = 5e-4
    decay_all: bool = False
    """Decay biases and normalisation too."""
    schedule: Schedule = "cosine-7/16"
    """Factor of the learning rate, see :mod:`ssmkernels.trainers.schedules`."""
    warm_up_steps: CountOrZero = 0
    """Steps of the linear warm-up of half-cosine."""
    accumulate: Count = 1
    """Pieces in which a batch goes through the network, where it does not fit. Batch norm sees a piece at a time, and
    so does the alignment of memory "temporal"; losses and memory are of the whole batch."""
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
        super().__post_init__()
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


class TeacherViews(NamedTuple):
    """What the teacher says of a batch."""

    probs: Tensor
    """p^w [μB, L] of the unlabelled images, calibrated."""
    z_labeled: Tensor
    """[B, D], embeddings of the labelled images."""
    z_weak: Tensor
    """[μB, D], of the unlabelled ones."""


def build_network(config: SimMatchConfig, images: data.ImageSplits | data.SeenImages) -> models.ProjectionModel:
    """The network of ``config`` for these images, freshly initialised from its seed."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return models.build_model(
            config.model,
            images.num_classes,
            in_channels=images.channels,
            projection_dim=config.projection_dim,
            bn_momentum=config.bn_momentum,
            image_size=images.image_size,
        )


class SimMatch(ClassifierTrainer):
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
        ranks = fabric.world_size
        config.check_multiple(
            "batch_size", ranks * config.accumulate, f"{ranks} rank(s) times accumulate, {config.accumulate}"
        )
        super().__init__(config, splits, fabric, model=model)
        classes, unlabeled = splits.num_classes, config.uses_unlabeled
        self.images_per_step = config.batch_size * (1 + (2 * config.mu if unlabeled else 0))
        self.shown = ("loss", "loss_labeled", *(("loss_unlabeled", "loss_instance", "mask_rate") if unlabeled else ()))
        model = build_network(config, splits) if model is None else model
        self.set_up(model, momentum=config.momentum, decay_all=config.decay_all)
        self.align = DistributionAlignment(classes, config.alignment_queue) if config.alignment_queue else nn.Identity()
        self.align.to(fabric.device)
        self.memory = None
        if config.uses_memory:
            labels = torch.as_tensor(splits.train.labels[self.labeled_index])
            size = len(labels) * config.projection_dim * torch.float32.itemsize
            split = ranks > 1 and size > config.split_memory_above
            if ranks > 1:
                where = f"split between the {ranks} ranks" if split else f"whole on each of the {ranks} ranks"
                fabric.print(f"memory: {len(labels)} slots, {size} bytes, {where}", file=sys.stderr)
            self.memory = LabeledMemory(
                len(labels),
                config.projection_dim,
                classes,
                labels=labels,
                mode=config.memory,
                momentum=config.memory_momentum,
                split=split,
            ).to(fabric.device)

    def parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "teacher": self.teacher, "alignment": self.align, "optimizer": self.optimizer}
        return parts if self.memory is None else {**parts, "memory": self.memory}

    def batches(self, start_step: int) -> Iterable[data.Batch]:
        config = self.config
        strong = self.transforms.strong if config.strong_views == "randaugment" else self.transforms.weak
        return self.training_batches(start_step, mu=config.mu if config.uses_unlabeled else 0, strong=strong)

    def step(self, batch: data.Batch, step: int) -> dict[str, Tensor]:
        """One pass through the body of Algorithm 1's inner loop."""
        config = self.config
        self.set_learning_rate(
            config.learning_rate, schedule_factor(config.schedule, step, config.steps, config.warm_up_steps)
        )
        self.student.train()
        self.teacher.train()
        self.optimizer.zero_grad()
        pieces = _split(batch, config.accumulate)
        from_teacher = self.teacher_views(pieces) if config.uses_unlabeled and config.memory == "teacher" else None
        metrics, embeddings = [], []
        for number, piece in enumerate(pieces):
            with self.fabric.no_backward_sync(self.student, enabled=number + 1 < len(pieces)):
                losses, labeled_embeddings = self.losses(
                    piece,
                    first_epoch=step < config.first_epoch_steps,
                    from_teacher=None if from_teacher is None else from_teacher[number],
                )
                self.fabric.backward(losses["loss"] / len(pieces))
            metrics.append({name: value.detach() for name, value in losses.items()})
            embeddings.append(labeled_embeddings)
        self.optimizer.step()
        self.teacher.update(self.model)
        if self.memory is not None:
            self.memory.update(batch.slots, torch.cat(embeddings), batch.labels)
        return {name: torch.stack([of_piece[name] for of_piece in metrics]).mean() for name in metrics[0]}

    def teacher_views(self, pieces: Sequence[data.Batch]) -> list[TeacherViews]:
        """What the teacher says of the weak views, piece by piece; the alignment sees all pieces together."""
        logits: list[Tensor] = []
        z_labeled: list[Tensor] = []
        z_weak: list[Tensor] = []
        for piece in pieces:
            rows = [len(piece.labeled_weak), len(piece.unlabeled_weak)]
            with self.fabric.autocast():
                piece_logits, embeddings = self.teacher(torch.cat([piece.labeled_weak, piece.unlabeled_weak]))
            logits.append(piece_logits[rows[0] :])
            for kept, of_piece in zip((z_labeled, z_weak), embeddings.split(rows), strict=True):
                kept.append(of_piece)
        probs = self.align(torch.cat(logits).detach().float().softmax(dim=1)).chunk(len(pieces))
        return [TeacherViews(*views) for views in zip(probs, z_labeled, z_weak, strict=True)]

    def losses(
        self, batch: data.Batch, *, first_epoch: bool, from_teacher: TeacherViews | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The losses and metrics of a batch, and the embeddings of its labelled images that go to the memory,
        detached.

        Args:
            first_epoch: whether the memory is still filling.
            from_teacher: the batch's :meth:`teacher_views`, in memory "teacher"; made if they are not given.
        """
        config, rows = self.config, len(batch.labels)
        if not config.uses_unlabeled:
            logits, embeddings = self.student(batch.labeled_weak)
            loss = F.cross_entropy(logits, batch.labels)
            return {"loss": loss, "loss_labeled": loss}, embeddings.detach()

        # One forward pass of the student for all its views, so that batch norm sees them together.
        if config.memory == "teacher":
            probs, z_labeled, z_weak = from_teacher or self.teacher_views([batch])[0]
            logits, embeddings = self.student(torch.cat([batch.labeled_weak, batch.unlabeled_strong]))
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
            # A uniform one leaves q^w.
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
        metrics = {
            "loss": loss_labeled + config.lambda_u * loss_unlabeled + lambda_in * loss_instance,
            "loss_labeled": loss_labeled,
            "loss_unlabeled": loss_unlabeled,
            "loss_instance": loss_instance,
            "mask_rate": mask.mean(),
        }
        if self.measures_pseudo_labels:  # and never learns from the labels
            correct = (pseudo_labels == batch.unlabeled_labels).float()
            metrics |= {"pseudo_label_accuracy": correct.mean(), "confident_and_correct": (mask * correct).mean()}
        return metrics, z_labeled.detach()

    def scalars(self, means: dict[str, float]) -> dict[str, float]:
        """The means, with the accuracy of the confident pseudo-labels where there are any."""
        scalars = dict(means)
        confident_and_correct = scalars.pop("confident_and_correct", None)
        if confident_and_correct is not None and scalars["mask_rate"] > 0:
            scalars["confident_accuracy"] = confident_and_correct / scalars["mask_rate"]
        return scalars

    def evaluate(self) -> dict[str, float]:
        """Test accuracy of the student and of its exponential moving average, top-1 and, with more than five classes,
        top-5; and the top-1 accuracy on images that are held out.
        """
        figures: dict[str, float] = {}
        ks = (1, 5) if self.splits.num_classes > 5 else (1,)
        for name, values in self.accuracies(self.splits.test, ks).items():
            figures |= dict(zip((f"{name}_accuracy", f"{name}_top5"), values, strict=False))
        if self.held_out is not None:
            accuracies = self.accuracies(self.held_out)
            figures |= {f"validation_{name}_accuracy": accuracy for name, (accuracy,) in accuracies.items()}
        return figures


def train_simmatch(
    config: SimMatchConfig,
    *,
    resume: bool = False,
    splits: data.ImageSplits | None = None,
    model: nn.Module | None = None,
) -> RunResult:
    """Trains as ``config`` says, from its checkpoint if ``resume``; on every rank under ``torchrun``.

    Args:
        splits: the images, such as your own, see :class:`ssmkernels.data.ImageSplits`; ``config.data`` is loaded if
            none are given.
        model: a network of your own, x [N, C, H, W] -> (logits [N, L], unit embeddings [N, projection_dim]), such as a
            :class:`ssmkernels.models.ProjectionModel` of your backbone; ``config.model`` is built if none is given.
    """
    if splits is None:
        splits = data.load_dataset(config.data.name, config.data.root)
    # Without L_in nothing uses the projection head.
    fabric = make_fabric(config.run, precision=config.precision, find_unused_parameters=config.lambda_in == 0)
    return SimMatch(config, splits, fabric, model=model).run(resume=resume)


def _split(batch: data.Batch, pieces: int) -> list[data.Batch]:
    """A batch in ``pieces`` of as many rows each."""
    if pieces == 1:
        return [batch]
    chunks = [column.chunk(pieces) for column in batch]
    return [data.Batch(*columns) for columns in zip(*chunks, strict=True)]
