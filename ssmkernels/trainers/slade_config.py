# SPDX-License-Identifier: BSD-3-Clause
"""The settings of SLADE."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from ssmkernels.trainers.loop import Precision, RunConfig
from ssmkernels.trainers.slade_data import SladeDataConfig

Student = Literal["none", "pseudo-labels", "basis", "mining"]
RankingLoss = Literal["contrastive", "multi-similarity"]
SimilarityLoss = Literal["sd", "local-ce", "global-ce"]
MomentGradient = Literal["batch", "momentum"]
Optimizer = Literal["rmsprop", "adamw"]
_CHOICES = {
    "student": Student,
    "ranking_loss": RankingLoss,
    "similarity_loss": SimilarityLoss,
    "moment_gradient": MomentGradient,
    "optimizer": Optimizer,
}


@dataclass
class SladeConfig:
    """Everything that determines a run. Defaults are the paper's as far as they are known, and Musgrave's for
    CUB-200.
    """

    data: SladeDataConfig = field(default_factory=SladeDataConfig)
    backbone: str = "resnet50"
    """Network, as :func:`ssmkernels.models.build_embedding_model` knows it."""
    weights: str | None = None
    """Its initial weights: a file (SwAV's, say), "imagenet" where the backbone has a source of them, none for random
    ones.
    """
    pooling: Literal["avg+max", "avg"] = "avg"
    """What makes features of the last maps."""
    freeze_bn: bool = True
    """Keep the statistics and the affine maps of batch norm as they are."""
    embedding_dim: int = 128
    """Size of the embeddings f of one fold."""
    seed: int = 1
    """Seed of the labelled classes, the initial head and basis, the batches, the augmentation and k-means."""

    student: Student = "mining"
    """What a student learns from."""
    rounds: int = 1
    """Students, each with the one before as its teacher."""
    k: int = 400
    """Clusters of the unlabelled images."""
    lambda_1: float = 1.0
    """λ1, weight of L_rank on pseudo-labelled images."""
    lambda_2: float = 0.25
    """λ2, weight of L_Basis."""

    ranking_loss: RankingLoss = "contrastive"
    """L_rank, of teacher and students."""
    positive_margin: float = 0.0
    """m_pos of the contrastive loss, a distance: positives that are closer are let be."""
    negative_margin: float = 0.3841
    """m_neg of the contrastive loss, a distance: negatives that are farther are let be."""
    ms_alpha: float = 0.01
    """α of the multi-similarity loss, scale of the positives' cosines."""
    ms_beta: float = 50.6
    """β of the multi-similarity loss, scale of the negatives' cosines."""
    ms_base: float = 0.56
    """λ of the multi-similarity loss, the cosine between positives and negatives."""

    similarity_loss: SimilarityLoss = "sd"
    """The loss of the similarities of pseudo-labelled pairs: of their distributions, or a cross-entropy, see
    :mod:`ssmkernels.nn`.
    """
    sd_margin: float = 0.5
    """m of L_SD, by which μ⁺ should exceed μ⁻; not published."""
    sd_variance_weight: float = 1.0
    """λ_v of L_SD, weight of the variances; not published."""
    moment_momentum: float = 0.99
    """β of the running moments."""
    moment_gradient: MomentGradient = "batch"
    """What flows back from L_SD, see :class:`ssmkernels.nn.SimilarityDistributionLoss`."""

    teacher_steps: int = 4000
    """Steps of the first teacher, on labelled images."""
    warm_up_steps: int = 100
    """First steps of a round, in which W_a learns alone, where there is one."""
    student_steps: int = 4000
    """Steps of a student after them."""
    batch_size: int = 32
    """Labelled images of a step, and as many pseudo-labelled ones, all ranks together."""
    per_class: int = 4
    """Images of each class in a batch."""
    optimizer: Optimizer = "rmsprop"
    """RMSprop with momentum .9 and L2, or AdamW; at a constant rate."""
    learning_rate: float = 1e-6
    """Of the network."""
    basis_learning_rate: float = 1e-3
    """Of W_a, which starts at random; not published."""
    weight_decay: float = 1e-4
    precision: Precision = "32-true"
    """Arithmetic of the network; losses are float32 in all of them."""

    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        at_least = {
            "embedding_dim": 1,
            "rounds": 1,
            "k": 2,
            "teacher_steps": 1,
            "student_steps": 1,
            "warm_up_steps": 0,
            "per_class": 2,
        }
        at_least |= {
            "lambda_1": 0,
            "lambda_2": 0,
            "positive_margin": 0,
            "negative_margin": 0,
            "sd_margin": 0,
            "sd_variance_weight": 0,
        }
        at_least |= {"learning_rate": 0, "basis_learning_rate": 0, "weight_decay": 0}
        for name, lowest in at_least.items():
            if not getattr(self, name) >= lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; it should be at least {lowest}")
        for name in ("ms_alpha", "ms_beta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it should be positive")
        if not 0 <= self.moment_momentum < 1:
            raise ValueError(f"moment_momentum is {self.moment_momentum}; it should be in [0, 1)")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it should be one of {', '.join(get_args(choices))}"
                )
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
