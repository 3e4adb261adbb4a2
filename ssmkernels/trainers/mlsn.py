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
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels import data, models
from ssmkernels.distributed import all_gather_rows
from ssmkernels.nn import ClassCenters, SimilarityNetwork, draw_class_centers, sample_pairs
from ssmkernels.nn.similarity_network import Interaction
from ssmkernels.trainers.classifier import ClassifierTrainer, DataConfig
from ssmkernels.trainers.loop import Fabric, Precision, RunConfig, RunResult, make_fabric
from ssmkernels.trainers.schedules import Schedule, gaussian_ramp_up, linear_ramp_up, schedule_factor
from ssmkernels.trainers.settings import Count, NonNegative, Settings, Share


@dataclass
class RampConfig(Settings):
    """λ(t), the weight of a loss as a function of the step."""

    weight: NonNegative
    """Where it ends; 0 leaves the loss out."""
    ramp: Literal["linear", "gaussian"] = "gaussian"
    """How it gets there: t/T, or exp(−5 (1 − t/T)²)."""
    share: Share = 0.4
    """T as a share of the steps of the run; 0 for the full weight from the start."""

    def at(self, step: int, steps: int) -> float:
        ramp = linear_ramp_up if self.ramp == "linear" else gaussian_ramp_up
        return self.weight * ramp(step, self.share * steps)


@dataclass
class MLSNConfig(Settings):
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
    weights: str | None = None
    """Initial weights of its backbone: a file in one of the forms of :func:`ssmkernels.models.load_weights`; "imagenet"
    where the network has a source of them; none for random ones.
    """
    bn_momentum: float | None = None
    """Share of a batch in the running statistics of batch norm; none for the network's own, .001 in wide ResNets."""
    seed: int = 1
    """Seed of the labelled split, the initial weights, the batches, the augmentation, the pairs and the class
    centers.
    """

    batch_size: Count = 64
    """n, labelled images of a step and as many unlabelled ones, all ranks together."""
    lambda_1: RampConfig = field(default_factory=lambda: RampConfig(75.0, "linear", 1.0))
    """λ1(t), of the consistency loss L_T."""
    lambda_2: RampConfig = field(default_factory=lambda: RampConfig(20.0, "gaussian", 0.4))
    """λ2(t), of the similarity loss L_S."""
    lambda_3: RampConfig = field(default_factory=lambda: RampConfig(0.1, "gaussian", 1.0))
    """λ3(t), of the co-training loss L_SC."""
    teacher: Literal["ema", "student"] = "ema"
    """Who makes the targets: the average of the student's weights (Mean Teacher), or the student itself in a second
    pass (Π model).
    """

    pairs: Count = 512
    """m, pairs of a step out of 2n², all ranks together."""
    self_pairs: bool = True
    """Whether pairs of an image with itself are among them."""
    pair_labels: Literal["pseudo", "weak"] = "pseudo"
    """Of two unlabelled images: whether their ŷ agree, (3); or, with weak labels, whether their true classes do. The
    classes themselves stay unknown.
    """
    pair_threshold: Share = 0.0
    """Confidence of ŷ from which an image takes part in pairs; the paper has none."""
    hidden_features: Count = 512
    """Hidden units of the similarity network."""
    interaction: Interaction = "concat"
    """How it looks at two features, see :class:`ssmkernels.nn.SimilarityNetwork`."""
    focal_alpha: Share | None = 0.5
    """α of the focal loss, the weight of equal pairs; none for no balancing."""
    focal_gamma: NonNegative = 2.0
    """γ of the focal loss."""

    steps: Count = 2**20
    """Optimiser steps of the run."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Adam with weights that shrink by learning_rate·weight_decay a step, all of them; or SGD with Nesterov momentum .9
    and L2 on all but biases and normalisation.
    """
    learning_rate: NonNegative = 0.002
    weight_decay: NonNegative = 0.02
    schedule: Schedule = "constant"
    """Factor of the learning rate, see :mod:`ssmkernels.trainers.schedules`."""
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
        super().__post_init__()
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


def build_network(config: MLSNConfig, splits: data.ImageSplits | data.SeenImages) -> MLSNNetwork:
    """The network of ``config`` for these images, freshly initialised from its seed; the same with and without a
    similarity network.
    """
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        network = models.build_model(
            config.model,
            splits.num_classes,
            in_channels=splits.channels,
            bn_momentum=config.bn_momentum,
            image_size=splits.image_size,
        )
        features = network.classifier.in_features
        similarity = (
            SimilarityNetwork(features, config.hidden_features, config.interaction) if config.uses_similarity else None
        )
    return MLSNNetwork(network.backbone, network.classifier, similarity)


class MLSN(ClassifierTrainer):
    """Algorithm 2.1, for :func:`ssmkernels.trainers.loop.fit`.

    Args:
        config: the settings.
        splits: the images.
        fabric: the device, its precision and the other ranks.
        model: :func:`build_network` if none is given.
    """

    model: MLSNNetwork

    def __init__(
        self, config: MLSNConfig, splits: data.ImageSplits, fabric: Fabric, *, model: MLSNNetwork | None = None
    ) -> None:
        for name in ("batch_size", "pairs"):
            config.check_multiple(name, fabric.world_size, f"the {fabric.world_size} ranks")
        super().__init__(config, splits, fabric, model=model)
        self.images_per_step = config.batch_size * (3 if config.uses_unlabeled else 1)
        consistency = ("loss_consistency",) if config.uses_unlabeled else ()
        similarity = ("loss_similarity", "loss_cotraining") if config.uses_similarity else ()
        self.shown = ("loss", "loss_labeled", *consistency, *similarity)
        model = build_network(config, splits) if model is None else model
        self.set_up(model, momentum=0.9, decay_all=config.optimizer == "adamw")
        self.centers: ClassCenters | None = None

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "teacher": self.teacher, "optimizer": self.optimizer}

    def batches(self, start_step: int) -> Iterable[data.Batch]:
        mu = 1 if self.config.uses_unlabeled else 0
        return self.training_batches(start_step, mu=mu, strong=self.transforms.weak)  # the second view is as weak

    def step(self, batch: data.Batch, step: int) -> dict[str, Tensor]:
        """One pass through the body of Algorithm 2.1's inner loop."""
        config = self.config
        self.set_learning_rate(config.learning_rate, schedule_factor(config.schedule, step, config.steps))
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
        }
        if self.measures_pseudo_labels:  # and never learns from the labels
            metrics["pseudo_label_accuracy"] = (pseudo_labels == batch.unlabeled_labels).float().mean()
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
            metrics |= {"loss_similarity": loss_similarity, "loss_cotraining": loss_cotraining}
            if self.measures_pseudo_labels:
                correct = targets.argmax(dim=1) == batch.unlabeled_labels
                metrics["similarity_label_accuracy"] = correct.float().mean()
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
        pairs = sample_pairs(
            len(labels) // 2,
            config.pairs // fabric.world_size,
            self_pairs=config.self_pairs,
            generator=draw,
            device=labels.device,
        )
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

    def evaluate(self) -> dict[str, float]:
        """Test error, what Tables 1 and 2 have, of the student and of its exponential moving average; and the error on
        images that are held out.
        """
        figures = {f"{name}_error": 1 - accuracy for name, (accuracy,) in self.accuracies(self.splits.test).items()}
        if self.held_out is not None:
            errors = self.accuracies(self.held_out)
            figures |= {f"validation_{name}_error": 1 - accuracy for name, (accuracy,) in errors.items()}
        return figures

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "centers": {} if self.centers is None else self.centers._asdict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.centers = ClassCenters(**self.fabric.to_device(state["centers"])) if state["centers"] else None


def train_mlsn(
    config: MLSNConfig,
    *,
    resume: bool = False,
    splits: data.ImageSplits | None = None,
    model: MLSNNetwork | None = None,
) -> RunResult:
    """Trains as ``config`` says, from its checkpoint if ``resume``; on every rank under ``torchrun``.

    Args:
        splits: the images, such as your own, see :class:`ssmkernels.data.ImageSplits`; ``config.data`` is loaded if
            none are given.
        model: an :class:`MLSNNetwork` of your own backbone, classifier and similarity network; ``config.model`` is
            built if none is given.
    """
    if splits is None:
        splits = data.load_dataset(config.data.name, config.data.root)
    fabric = make_fabric(config.run, precision=config.precision)
    return MLSN(config, splits, fabric, model=model).run(resume=resume)
