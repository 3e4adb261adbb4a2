# SPDX-License-Identifier: BSD-3-Clause
"""MLSN: Metric Learning by Similarity Network for Deep Semi-Supervised Learning (Wu, Feng and Zhou, 2020), Algorithm
2.1.

The baselines of Tables 1 and 2 are settings of the same trainer. Mean Teacher is λ2 = λ3 = 0; the Π model is that with
``teacher="student"``; supervised-only is all three 0 and never loads unlabelled images. Training with weak labels,
where of two unlabelled images only "same class" or "another class" is known, is ``pair_labels="weak"``.

The text leaves open what follows, and no code is public. Choices: L_T is the mean squared difference of the
probabilities of the unlabelled images, whose two weak views go one to the student and one to the teacher. ŷ is the
teacher's argmax. The m pairs are drawn from the n² labelled–labelled ones, with their labels, and the n²
unlabelled–unlabelled ones, with ŷ: (3). The pairs shape the features: L_S flows into them, while the targets ŷ, y_sc
and the teacher's probabilities are constants. y_sc = (p_1, …, p_K) / Σ p is what the similarity network says of the
student's features of the unlabelled images and of one labelled image per class.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ssmkernels import data, models
from ssmkernels.distributed import all_gather_rows, broadcast_buffers
from ssmkernels.nn import ClassCenters, EMATeacher, SimilarityNetwork, draw_class_centers, sample_pairs
from ssmkernels.nn.similarity_network import Interaction
from ssmkernels.trainers.evaluation import top_k_accuracy
from ssmkernels.trainers.loop import Fabric, Precision, RunConfig, RunResult, fit, ignore_stop_signals, make_fabric
from ssmkernels.trainers.schedules import cosine_7_16, gaussian_ramp_up, linear_ramp_up
from ssmkernels.trainers.simmatch import DataConfig

Ramp = Literal["linear", "gaussian"]
TeacherKind = Literal["ema", "student"]
PairLabels = Literal["pseudo", "weak"]
Optimizer = Literal["adamw", "sgd"]
Schedule = Literal["constant", "cosine-7/16"]
_CHOICES = {
    "teacher": TeacherKind,
    "pair_labels": PairLabels,
    "interaction": Interaction,
    "optimizer": Optimizer,
    "schedule": Schedule,
}


@dataclass
class RampConfig:
    """λ(t), the weight of a loss as a function of the step."""

    weight: float
    """Where it ends; 0 leaves the loss out."""
    ramp: Ramp = "gaussian"
    """How it gets there: t/T, or exp(−5 (1 − t/T)²)."""
    share: float = 0.4
    """T as a share of the steps of the run; 0 for the full weight from the start."""

    def __post_init__(self) -> None:
        if self.ramp not in get_args(Ramp):
            raise ValueError(f"ramp is {self.ramp!r}; it should be linear or gaussian")
        if not self.weight >= 0:
            raise ValueError(f"weight is {self.weight}; it should be at least 0")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; it should be in [0, 1]")

    def at(self, step: int, steps: int) -> float:
        ramp = linear_ramp_up if self.ramp == "linear" else gaussian_ramp_up
        return self.weight * ramp(step, self.share * steps)


@dataclass
class MLSNConfig:
    """Everything that determines a run. Defaults are those of the code base that MLSN most likely used,
    MixMatch-pytorch of August 2019.

    λ2, λ3 and the focal loss of the paper are not known. Ours were picked on 8x8 digits with 20 labels and 400 steps,
    where Mean Teacher has a test error of 15 %, with these settings 13 %, but with λ2 = λ3 = 1 and the α = .25 of
    object detection 30 %: a focal loss is small, and the probabilities it leaves behind are timid, so that y_sc is
    nearly uniform and a full L_SC unlearns the labels.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: str = "wrn-28-2"
    """Network, as :func:`ssmkernels.models.build_model` knows it; its pooled features are h."""
    bn_momentum: float | None = None
    """Share of a batch in the running statistics of batch norm; none for the network's own, .001 in wide ResNets."""
    seed: int = 1
    """Seed of the labelled split, the initial weights, the batches, the augmentation, the pairs and the class
    centers.
    """

    batch_size: int = 64
    """n, labelled images of a step and as many unlabelled ones, all ranks together."""
    lambda_1: RampConfig = field(default_factory=lambda: RampConfig(75.0, "linear", 1.0))
    """λ1(t), of the consistency loss L_T."""
    lambda_2: RampConfig = field(default_factory=lambda: RampConfig(20.0, "gaussian", 0.4))
    """λ2(t), of the similarity loss L_S."""
    lambda_3: RampConfig = field(default_factory=lambda: RampConfig(0.1, "gaussian", 1.0))
    """λ3(t), of the co-training loss L_SC."""
    teacher: TeacherKind = "ema"
    """Who makes the targets: the average of the student's weights (Mean Teacher), or the student itself in a second
    pass (Π model).
    """

    pairs: int = 512
    """m, pairs of a step out of 2n², all ranks together."""
    pair_labels: PairLabels = "pseudo"
    """Of two unlabelled images: whether their ŷ agree, (3); or, with weak labels, whether their true classes do. The
    classes themselves stay unknown.
    """
    pair_threshold: float = 0.0
    """Confidence of ŷ from which an image takes part in pairs; the paper has none."""
    hidden_features: int = 512
    """Hidden units of the similarity network."""
    interaction: Interaction = "concat"
    """How it looks at two features, see :class:`ssmkernels.nn.SimilarityNetwork`."""
    focal_alpha: float | None = 0.5
    """α of the focal loss, the weight of equal pairs; none for no balancing."""
    focal_gamma: float = 2.0
    """γ of the focal loss."""

    steps: int = 2**20
    """Optimiser steps of the run."""
    optimizer: Optimizer = "adamw"
    """Adam with weights that shrink by learning_rate·weight_decay a step, all of them; or SGD with Nesterov momentum .9
    and L2 on all but biases and normalisation.
    """
    learning_rate: float = 0.002
    weight_decay: float = 0.02
    schedule: Schedule = "constant"
    """Learning rate: as it is, or times cos(7πk/16K)."""
    ema_decay: float = 0.999
    """Decay of the averaged model, the teacher and the one that is evaluated."""
    ema_buffers: Literal["average", "copy", "own"] = "copy"
    """Batch-norm statistics of the averaged model, see :class:`ssmkernels.nn.EMATeacher`. Those of "copy" should lag as
    the weights do: bn_momentum near 1 − ema_decay. On digits .1 beside .02 costs Mean Teacher 10 points; "own" has no
    such trap.
    """
    ema_warm_up: bool = False
    """Shorter averages at the start."""
    precision: Precision = "32-true"
    """Arithmetic of the network; losses are float32 in all of them."""

    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        at_least = {
            "batch_size": 1,
            "pairs": 1,
            "hidden_features": 1,
            "steps": 1,
            "focal_gamma": 0,
            "learning_rate": 0,
            "weight_decay": 0,
        }
        for name, lowest in at_least.items():
            if not getattr(self, name) >= lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; it should be at least {lowest}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it should be one of {', '.join(get_args(choices))}"
                )
        if self.focal_alpha is not None and not 0 <= self.focal_alpha <= 1:
            raise ValueError(f"focal_alpha is {self.focal_alpha}; it should be in [0, 1], or null")
        if not 0 <= self.pair_threshold <= 1:
            raise ValueError(f"pair_threshold is {self.pair_threshold}; it should be in [0, 1]")
        if self.lambda_3.weight > 0 and self.lambda_2.weight == 0:
            raise ValueError(
                "lambda_3.weight is positive and lambda_2.weight 0; without L_S the similarity network learns nothing"
            )
        if self.ema_buffers == "own" and not (self.teacher == "ema" and self.uses_unlabeled):
            raise ValueError(
                'ema_buffers is "own"; with no averaged teacher that sees images it should be "copy" or "average"'
            )

    @property
    def uses_unlabeled(self) -> bool:
        return self.lambda_1.weight > 0 or self.uses_similarity

    @property
    def uses_similarity(self) -> bool:
        return self.lambda_2.weight > 0


class MLSNNetwork(nn.Module):
    """Figure 1: features h of a backbone, the classifier C on them, and beside it the similarity network S where there
    is one.

    Shape: images [N, C, H, W] -> logits [N, K], features [N, d].
    """

    def __init__(self, backbone: nn.Module, classifier: nn.Module, similarity: SimilarityNetwork | None) -> None:
        super().__init__()
        self.backbone, self.classifier, self.similarity = backbone, classifier, similarity

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(images)
        return self.classifier(features), features


def build_network(config: MLSNConfig, splits: data.ImageSplits) -> MLSNNetwork:
    """The network of ``config`` for these images, freshly initialised from its seed; the same with and without a
    similarity network.
    """
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        network = models.build_model(
            config.model, splits.num_classes, in_channels=splits.channels, bn_momentum=config.bn_momentum
        )
        features = network.classifier.in_features
        similarity = (
            SimilarityNetwork(features, config.hidden_features, config.interaction) if config.uses_similarity else None
        )
    return MLSNNetwork(network.backbone, network.classifier, similarity)


class MLSN:
    """Algorithm 2.1, for :func:`ssmkernels.trainers.loop.fit`.

    Args:
        config: the settings.
        splits: the images.
        fabric: the device, its precision and the other ranks.
        network: :func:`build_network` if none is given.
    """

    def __init__(
        self, config: MLSNConfig, splits: data.ImageSplits, fabric: Fabric, *, network: MLSNNetwork | None = None
    ) -> None:
        for name in ("batch_size", "pairs"):
            if getattr(config, name) % fabric.world_size:
                raise ValueError(
                    f"{name} is {getattr(config, name)}; it should be a multiple of the {fabric.world_size} ranks"
                )
        self.config, self.splits, self.fabric = config, splits, fabric
        self.transforms = data.default_transforms(splits)
        self.labeled_index = data.split_labels(
            splits.train.labels, config.data.labels, seed=config.seed, proportional=config.data.proportional
        )
        network = build_network(config, splits) if network is None else network
        # Convolutions are faster so, on CPUs and on tensor cores
        self.model = network.to(memory_format=torch.channels_last)
        self.student, self.optimizer = fabric.setup(self.model, _optimizer(self.model, config))
        self.teacher = EMATeacher(self.model, config.ema_decay, buffers=config.ema_buffers, warm_up=config.ema_warm_up)
        self.centers: ClassCenters | None = None

    def step(self, batch: data.Batch, step: int) -> dict[str, Tensor]:
        """One pass through the body of Algorithm 2.1's inner loop."""
        if self.config.schedule == "cosine-7/16":
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.learning_rate * cosine_7_16(step, self.config.steps)
        self.student.train()
        self.teacher.train()
        self.optimizer.zero_grad()
        losses = self.losses(batch, step)
        self.fabric.backward(losses["loss"])
        self.optimizer.step()
        self.teacher.update(self.model)
        return {name: value.detach() for name, value in losses.items()}

    def losses(self, batch: data.Batch, step: int) -> dict[str, Tensor]:
        """Lines 3 to 7: the losses and metrics of a batch. Class centers move on."""
        config, n = self.config, len(batch.labels)
        if not config.uses_unlabeled:
            logits, _ = self.student(batch.labeled_weak)
            loss = F.cross_entropy(logits, batch.labels)
            return {"loss": loss, "loss_labeled": loss}

        # One forward pass of the student for labelled and unlabelled images, so that batch norm sees them together.
        logits, features = self.student(torch.cat([batch.labeled_weak, batch.unlabeled_weak]))
        probs_teacher = self._teacher_probs(batch.unlabeled_strong)  # of the second weak view
        confidence, pseudo_labels = probs_teacher.max(dim=1)  # ŷ

        loss_labeled = F.cross_entropy(logits[:n], batch.labels)  # L_C
        loss_consistency = F.mse_loss(logits[n:].float().softmax(dim=1), probs_teacher)  # L_T
        loss = loss_labeled + config.lambda_1.at(step, config.steps) * loss_consistency
        metrics = {
            "loss_labeled": loss_labeled,
            "loss_consistency": loss_consistency,
            "pseudo_label_accuracy": (pseudo_labels == batch.unlabeled_labels)
            .float()
            .mean(),  # measured, never learnt from
        }
        if self.model.similarity is not None:
            weak = config.pair_labels == "weak"
            sides = batch.unlabeled_labels if weak else pseudo_labels.where(confidence >= config.pair_threshold, -1)
            # L_S
            loss_similarity = self._similarity_loss(
                self.model.similarity, features, torch.cat([batch.labels, sides]), step
            )
            targets = self._similarity_labels(self.model.similarity, features.detach(), batch.labels, step)  # y_sc
            loss_cotraining = F.cross_entropy(logits[n:].float(), targets)  # L_SC
            loss = loss + config.lambda_2.at(step, config.steps) * loss_similarity
            loss = loss + config.lambda_3.at(step, config.steps) * loss_cotraining
            metrics |= {
                "loss_similarity": loss_similarity,
                "loss_cotraining": loss_cotraining,
                "similarity_label_accuracy": (targets.argmax(dim=1) == batch.unlabeled_labels).float().mean(),
            }
        return {"loss": loss, **metrics}

    @torch.no_grad()
    def _teacher_probs(self, images: Tensor) -> Tensor:
        teacher = self.teacher if self.config.teacher == "ema" else self.model
        with self.fabric.autocast():
            logits, _ = teacher(images)
        return logits.float().softmax(dim=1)

    def _similarity_loss(self, network: SimilarityNetwork, features: Tensor, labels: Tensor, step: int) -> Tensor:
        """L_S over m of the pairs of this rank's rows."""
        config, fabric = self.config, self.fabric
        draw = self._generator(step, 1 + fabric.global_rank)
        pairs = sample_pairs(len(labels) // 2, config.pairs // fabric.world_size, generator=draw, device=labels.device)
        return network.focal_loss(
            features, features, labels, labels, pairs=pairs, alpha=config.focal_alpha, gamma=config.focal_gamma
        )

    @torch.no_grad()
    def _similarity_labels(self, network: SimilarityNetwork, features: Tensor, labels: Tensor, step: int) -> Tensor:
        """y_sc [n, K] of the unlabelled rows; the centers come from the labelled rows of all ranks. Classes never
        seen so far get 0.
        """
        n, classes = len(labels), self.splits.num_classes
        labeled = all_gather_rows(features[:n].float()), all_gather_rows(labels)
        self.centers = draw_class_centers(*labeled, classes, self.centers, generator=self._generator(step, 0))
        probs = network.class_probabilities(features[n:].float(), self.centers.features) * self.centers.present
        return probs / probs.sum(dim=1, keepdim=True).clamp_min(torch.finfo(probs.dtype).tiny)

    def _generator(self, step: int, stream: int) -> torch.Generator:
        """Of the draws of a step, so that a resumed run makes the same."""
        (seed,) = np.random.SeedSequence((self.config.seed, step, stream)).generate_state(1, np.uint64).tolist()
        return torch.Generator().manual_seed(seed)

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    @property
    def images_per_step(self) -> int:
        return self.config.batch_size * (3 if self.config.uses_unlabeled else 1)

    @property
    def shown(self) -> tuple[str, ...]:
        consistency = ("loss_consistency",) if self.config.uses_unlabeled else ()
        similarity = ("loss_similarity", "loss_cotraining") if self.config.uses_similarity else ()
        return ("loss", "loss_labeled", *consistency, *similarity)

    def scalars(self, means: dict[str, float]) -> dict[str, float]:
        return means

    def evaluate(self) -> dict[str, float]:
        """Test error, what Tables 1 and 2 have, of the student and of its exponential moving average."""
        errors: dict[str, float] = {}
        for name, model in (("student", self.model), ("ema", self.teacher)):
            broadcast_buffers(model)
            batches = data.evaluation_batches(
                self.splits.test,
                256,
                mean=self.splits.mean,
                std=self.splits.std,
                transform=self.transforms.evaluation,
                rank=self.fabric.global_rank,
                world_size=self.fabric.world_size,
                workers=self.config.run.workers,
                worker_init_fn=ignore_stop_signals,
            )
            (accuracy,) = top_k_accuracy(model, batches, device=self.fabric.device)
            errors[f"{name}_error"] = 1 - accuracy
        return errors

    def batches(self, start_step: int) -> Iterable[data.Batch]:
        config, splits = self.config, self.splits
        batches = data.TrainBatches(
            splits.train,
            self.labeled_index,
            splits.train,
            weak=self.transforms.weak,
            strong=self.transforms.weak,  # the second view is as weak as the first
            batch_size=config.batch_size,
            mu=1 if config.uses_unlabeled else 0,
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
        centers = {} if self.centers is None else self.centers._asdict()
        return {**{name: part.state_dict() for name, part in self._parts().items()}, "centers": centers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        centers = {name: value.to(self.fabric.device) for name, value in state["centers"].items()}
        self.centers = ClassCenters(**centers) if centers else None

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "teacher": self.teacher, "optimizer": self.optimizer}


def train_mlsn(config: MLSNConfig, *, resume: bool = False, images: data.ImageSplits | None = None) -> RunResult:
    """Trains as ``config`` says, from its checkpoint if ``resume``; on every rank under ``torchrun``.

    Args:
        images: the images; ``config.data`` is loaded if none are given.
    """
    if images is None:
        images = data.load_dataset(config.data.name, config.data.root)
    fabric = make_fabric(precision=config.precision, accelerator=config.run.accelerator)
    trainer = MLSN(config, images, fabric)
    return fit(trainer, fabric=fabric, steps=config.steps, run=config.run, config=asdict(config), resume=resume)


def _optimizer(model: nn.Module, config: MLSNConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    groups = models.parameter_groups(model, config.weight_decay)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9, nesterov=True)
