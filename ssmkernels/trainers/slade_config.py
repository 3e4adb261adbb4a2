# SPDX-License-Identifier: BSD-3-Clause
"""The settings of SLADE."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ssmkernels.trainers.loop import Precision, RunConfig
from ssmkernels.trainers.settings import (
    AtLeastTwo,
    Count,
    CountOrZero,
    NonNegative,
    PartialShare,
    Positive,
    Settings,
    ShareBelowOne,
)


@dataclass
class SladeDataConfig(Settings):
    """Which images, labelled and unlabelled, and how their classes are split."""

    section: ClassVar[str] = "data."

    name: str = "digits"
    """Labelled collection, as :func:`ssmkernels.data.load_collection` knows it."""
    root: str | None = None
    """Folder or file of its images; none for those that come inside packages."""
    unlabeled_name: str | None = None
    """Collection of the unlabelled images, all of it. With none, some images of the labelled one are taken."""
    unlabeled_root: str | None = None
    """Folder or file of its images."""
    unlabeled_classes: Literal["training", "test"] = "training"
    """Where there is no unlabelled collection: "training" takes the labels off some of the training classes; "test" has
    half of the images of the test classes, drawn by the seed and not tested on, as images without labels. The latter is
    the situation of CUB-200 and NABirds, which has the species that are tested on.
    """
    labeled_fraction: PartialShare = 0.5
    """Of the training classes, drawn by the seed, to keep their labels where some lose them."""
    image_size: int | None = None
    """Side of the images that the network sees, in pixels; none for the labelled collection's own."""
    augment: Literal["batched", "pil"] = "batched"
    """Views of photographs in batches: loading processes decode and cut the crops, the device does the rest; or image
    by image by Pillow, as those of small images always are.
    """
    test_fraction: PartialShare = 0.5
    """Of the classes, the last ones, to test on."""
    classes_file: str | None = None
    """List of the classes, see :func:`ssmkernels.data.read_classes`: ``test_fraction`` then has no effect, nor have the
    folds where the list has classes to validate on.
    """
    folds: AtLeastTwo = 4
    """Class-disjoint folds of the other classes."""
    fold: int | None = 0
    """The one to validate on, from 0, with the others to train on. None trains a network for each fold and tests their
    embeddings side by side.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fold is not None and not 0 <= self.fold < self.folds:
            raise ValueError(
                f"data.fold is {self.fold}; it should be in [0, {self.folds}), one of data.folds, or null for all"
            )
        if self.unlabeled_name is None and self.unlabeled_root is not None:
            raise ValueError(
                f"data.unlabeled_root is {self.unlabeled_root!r} without data.unlabeled_name; it should have one"
            )


@dataclass
class SladeConfig(Settings):
    """Everything that determines a run. Defaults are the paper's as far as they are known, and Musgrave's for
    CUB-200.
    """

    data: SladeDataConfig = field(default_factory=SladeDataConfig)
    model: str = "resnet50"
    """Network, as :func:`ssmkernels.models.build_embedding_model` knows it."""
    weights: str | None = None
    """Initial weights of its backbone: a file in one of the forms of :func:`ssmkernels.models.load_weights`; "imagenet"
    where the network has a source of them; none for random ones.
    """
    pooling: Literal["avg+max", "avg"] = "avg"
    """What makes features of the last maps."""
    freeze_bn: bool = True
    """Keep the statistics and the affine maps of batch norm as they are."""
    embedding_dim: Count = 128
    """Size of the embeddings f of one fold."""
    seed: int = 1
    """Seed of the labelled classes, the initial head and basis, the batches, the augmentation and k-means."""

    student: Literal["none", "pseudo-labels", "basis", "mining"] = "mining"
    """What a student learns from."""
    rounds: Count = 1
    """Students, each with the one before as its teacher."""
    k: AtLeastTwo = 400
    """Clusters of the unlabelled images."""
    lambda_1: NonNegative = 1.0
    """λ1, weight of L_rank on pseudo-labelled images."""
    lambda_2: NonNegative = 0.25
    """λ2, weight of L_Basis."""

    ranking_loss: Literal["contrastive", "multi-similarity"] = "contrastive"
    """L_rank, of teacher and students."""
    positive_margin: NonNegative = 0.0
    """m_pos of the contrastive loss, a distance: positives that are closer are let be."""
    negative_margin: NonNegative = 0.3841
    """m_neg of the contrastive loss, a distance: negatives that are farther are let be."""
    ms_alpha: Positive = 0.01
    """α of the multi-similarity loss, scale of the positives' cosines."""
    ms_beta: Positive = 50.6
    """β of the multi-similarity loss, scale of the negatives' cosines."""
    ms_base: float = 0.56
    """λ of the multi-similarity loss, the cosine between positives and negatives."""

    similarity_loss: Literal["sd", "local-ce", "global-ce"] = "sd"
    """The loss of the similarities of pseudo-labelled pairs: of their distributions, or a cross-entropy, see
    :mod:`ssmkernels.nn`.
    """
    sd_margin: NonNegative = 0.5
    """m of L_SD, by which μ⁺ should exceed μ⁻; not published."""
    sd_variance_weight: NonNegative = 1.0
    """λ_v of L_SD, weight of the variances; not published."""
    moment_momentum: ShareBelowOne = 0.99
    """β of the running moments."""
    moment_gradient: Literal["batch", "momentum"] = "batch"
    """What flows back from L_SD, see :class:`ssmkernels.nn.SimilarityDistributionLoss`."""

    teacher_steps: Count = 4000
    """Steps of the first teacher, on labelled images."""
    warm_up_steps: CountOrZero = 100
    """First steps of a round, in which W_a learns alone, where there is one."""
    student_steps: Count = 4000
    """Steps of a student after them."""
    patience: CountOrZero | None = 900
    """Steps that a network goes on after its best evaluation on the validation classes, by MAP@R: once more have
    passed, it ends, and a teacher is what it was at its best. Musgrave's for CUB-200, 9 epochs of 100; none for all
    steps, whose last network is the teacher.
    """
    batch_size: int = 32
    """Labelled images of a step, and as many pseudo-labelled ones, all ranks together."""
    per_class: AtLeastTwo = 4
    """Images of each class in a batch."""
    optimizer: Literal["rmsprop", "adamw"] = "rmsprop"
    """RMSprop with momentum .9 and L2, or AdamW; at a constant rate."""
    learning_rate: NonNegative = 1e-6
    """Of the network."""
    basis_learning_rate: NonNegative = 1e-3
    """Of W_a, which starts at random; not published."""
    weight_decay: NonNegative = 1e-4
    precision: Precision = "32-true"
    """Arithmetic of the network; losses are float32 in all of them."""

    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 2 * self.per_class or self.batch_size % self.per_class:
            raise ValueError(
                f"batch_size is {self.batch_size}; it should be a multiple of per_class, {self.per_class}, of two or"
                " more classes"
            )

    @property
    def uses_unlabeled(self) -> bool:
        return self.student != "none"

    @property
    def uses_basis(self) -> bool:
        return self.student in ("basis", "mining")

    @property
    def round_steps(self) -> int:
        """Steps of a student, its warm-up included."""
        return self.student_steps + (self.warm_up_steps if self.uses_basis else 0)

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return self.teacher_steps + (self.rounds * self.round_steps if self.uses_unlabeled else 0)
