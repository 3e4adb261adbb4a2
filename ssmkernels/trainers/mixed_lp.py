# SPDX-License-Identifier: BSD-3-Clause
"""Deep semi-supervised metric learning with mixed label propagation (Zhuang and Moulin, CVPR 2023), sections 3.3 and
4.2.

A network gives unit features v and unit embeddings z; a few images of each training class have a label. For some epochs
the proxy loss (26)-(29) is learnt on those alone. Then every epoch starts with a graph of the features of all training
images, (15), on which labels are propagated, (16)-(24), and goes through all images with the labels and confidences
that come out.

Three comparisons are settings of the same trainer (``pseudo_labels``): "lp", label propagation without dissimilarities;
"dssml", label propagation on the mutual neighbours alone, after DSSML (Zhuang and Moulin, ICASSP 2021); and "none", the
proxy loss on the labelled images in every step, for as many steps.

Where the paper is silent, this follows the public code of Proxy-Anchor (Kim et al., CVPR 2020), whose optimiser, ε and
b the paper has: pooling, initialisation, batch norm, proxies at 100 times the learning rate, a first epoch with
a fixed backbone, halved learning rates and clipped gradients are its settings. As in LP-DeepSSL (Iscen et al., CVPR
2019), confidences are divided by their maximum, and a labelled image keeps its given label, whatever G says, with the
highest confidence of all. An image without a positive score has neither label nor weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ssmkernels import data, graph, models
from ssmkernels.distributed import gather_on_first
from ssmkernels.nn import ProxyLoss
from ssmkernels.trainers import kept
from ssmkernels.trainers.base import Trainer, channels_last
from ssmkernels.trainers.evaluation import retrieval_figures
from ssmkernels.trainers.loop import Fabric, Precision, RunConfig, RunResult, make_fabric
from ssmkernels.trainers.schedules import step_decay
from ssmkernels.trainers.settings import Count, CountOrZero, NonNegative, Positive, Settings

PseudoLabels = Literal["mixed-lp", "lp", "dssml", "none"]

SELECTED_BY = "validation_P@8"  # section 4.2


@dataclass
class CollectionConfig(Settings):
    """Which images, how their classes are split and how many have labels."""

    section: ClassVar[str] = "data."

    name: str = "digits"
    """Collection, as :func:`ssmkernels.data.load_collection` knows it."""
    root: str | None = None
    """Folder or file of the images; none for those that come inside packages."""
    image_size: int | None = None
    """Side of the images that the network sees, in pixels; none for the collection's own."""
    augment: Literal["batched", "pil"] = "batched"
    """Views of photographs in batches: loading processes decode and cut the crops, the device does the rest; or image
    by image by Pillow, as those of small images always are.
    """
    images_per_class: Count | None = None
    """Images taken of each class, its first ones; none for all."""
    labels_per_class: Count = 5
    """Labelled images of each training class."""
    labels_file: str | None = None
    """List of the labelled images in one of the published forms, see :func:`ssmkernels.data.read_labels`, all of
    training classes, instead of a draw by the seed; ``labels_per_class`` then has no effect.
    """
    fractions: tuple[float, float, float] = (0.4, 0.2, 0.4)
    """Of the classes to train, validate and test on; with none to validate on, the last network counts."""
    classes_file: str | None = None
    """List of the classes to train, validate and test on, see :func:`ssmkernels.data.read_classes`, instead of a draw
    by the seed; ``fractions`` then have no effect.
    """


@dataclass
class MixedLPConfig(Settings):
    """Everything that determines a run. Defaults are the paper's, and Proxy-Anchor's where it gives none."""

    data: CollectionConfig = field(default_factory=CollectionConfig)
    model: str = "bn-inception"
    """Network, as :func:`ssmkernels.models.build_embedding_model` knows it."""
    weights: str | None = None
    """Initial weights of its backbone: a file in one of the forms of :func:`ssmkernels.models.load_weights`; "imagenet"
    where the network has a source of them; none for random ones.
    """
    pooling: Literal["avg+max", "avg"] = "avg+max"
    """What makes features of the last maps."""
    freeze_bn: bool = True
    """Keep the statistics of batch norm as they are."""
    learn_bn_affine: bool = True
    """Whether the affine maps of frozen batch norm learn after the warm-up, as in Proxy-Anchor's code."""
    embedding_dim: Count = 64
    """δ, size of the embeddings z."""
    seed: int = 1
    """Seed of the classes' split, the labelled images, the initial head and proxies, the batches and the
    augmentation.
    """

    pseudo_labels: PseudoLabels = "mixed-lp"
    """Where labels of unlabelled images come from; "none" never uses those images."""
    k: Count = 50
    """Neighbours in the graph."""
    gamma: NonNegative = 3.0
    """γ, power of the cosines, equation (15)."""
    mu: Positive = 1 / 99
    """μ, pull of labelled images to their labels, equation (16)."""
    beta: NonNegative = 1.0
    """β, weight of the dissimilarity loss, equation (23)."""
    logit_scale: NonNegative = 4.0
    """λ, equation (20)."""
    normalize_confidence: bool = True
    """Divide confidences by their maximum, as LP-DeepSSL does, from where the paper takes (21). Propagated labels can
    be nearly uniform: undivided, mixed ones have .01 to 1, the others below .001. In the long run AdamW does not feel a
    constant factor of the gradient; but coming from labelled epochs of weight 1, its second moments remember for 1/(1 −
    β₂) = 1000 steps, and steps are shorter until then, by up to that factor.
    """
    epsilon: Positive = 32.0
    """ε of the proxy loss."""
    margin: float = 0.1
    """b of the proxy loss."""

    labeled_epochs: CountOrZero = 5
    """Epochs on the labelled images alone."""
    epochs: CountOrZero = 20
    """Epochs on all training images after them, each with a graph of its own."""
    batch_size: Count = 32
    """Images of a step, all ranks together."""
    learning_rate: NonNegative = 1e-4
    proxy_learning_rate_scale: NonNegative = 100.0
    """Learning rate of the proxies over that of the network."""
    weight_decay: NonNegative = 1e-4
    """Of AdamW, on everything."""
    warm_up_epochs: CountOrZero = 1
    """Epochs at the start in which only head and proxies learn."""
    warm_up_images: Literal["all", "labeled"] = "all"
    """What an epoch of the warm-up is: as many steps as all training images take, Proxy-Anchor's; or an epoch of this
    method, of which the first are of the labelled images.
    """
    decay_every: Count = 10
    """Epochs, labelled ones included, between reductions of the learning rate."""
    decay: Positive = 0.5
    """Factor of a reduction."""
    clip_value: Positive = 10.0
    """Greatest magnitude of an element of the gradient."""
    precision: Precision = "32-true"
    """Arithmetic of the network; loss, graph and propagation are float32 in all of them."""

    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labeled_epochs + self.epochs < 1:
            raise ValueError("labeled_epochs and epochs are 0; at least one of them should be positive")


def build_network(config: MixedLPConfig, images: data.SeenImages) -> models.EmbeddingModel:
    """The network of ``config`` for these images, from random weights."""
    return models.build_embedding_model(
        config.model,
        config.embedding_dim,
        pooling=config.pooling,
        freeze_bn=config.freeze_bn,
        in_channels=images.channels,
        image_size=images.image_size,
    )


class MixedLP(Trainer):
    """Section 3.3, for :func:`ssmkernels.trainers.loop.fit`.

    Args:
        config: the settings.
        images: all images; their classes are split here.
        fabric: the device, its precision and the other ranks.
        model: x [N, C, H, W] -> (unit features v [N, d], unit embeddings z [N, embedding_dim]), with its ``backbone``
            as a member, which sees images by their collection's mean and deviation; built of ``config`` if none is
            given.
    """

    saved = ("labels", "confidence", "propagation")

    def __init__(
        self, config: MixedLPConfig, images: data.ImageCollection, fabric: Fabric, *, model: nn.Module | None = None
    ) -> None:
        config.check_multiple("batch_size", fabric.world_size, f"the {fabric.world_size} ranks")
        super().__init__(config, fabric)
        self.images_per_step = config.batch_size
        if config.data.images_per_class is not None:
            images = data.first_images(images, config.data.images_per_class)
        if config.data.classes_file is None:
            splits = data.split_classes(images.num_classes, fractions=config.data.fractions, seed=config.seed)
        else:
            splits = kept.read_classes(config, images.class_names)
        self.train, self.test = data.class_subset(images, splits[0]), data.class_subset(images, splits[2])
        self.validation = data.class_subset(images, splits[1]) if len(splits[1]) else None
        count, classes = len(self.train), self.train.num_classes
        if config.pseudo_labels != "none" and config.k >= count:
            raise ValueError(f"k is {config.k}; it should be below {count}, the number of training images")
        if config.data.labels_file is not None:
            self.labeled_index = kept.read_labels(config, self.train.images, self.train.class_names)
        else:
            self.labeled_index = data.split_labels(
                self.train.labels, config.data.labels_per_class * classes, seed=config.seed
            )
        self.labeled_epoch_steps = math.ceil(len(self.labeled_index) / config.batch_size)
        self.epoch_steps = math.ceil(count / config.batch_size)
        self.labeled_steps = config.labeled_epochs * self.labeled_epoch_steps
        self.steps = self.labeled_steps + config.epochs * self.epoch_steps

        normalization = "native" if model is not None else models.preprocessing(config.model)
        self.views = data.retrieval_views(
            images, normalization, size=config.data.image_size, batched=config.data.augment == "batched"
        )
        self.seen = data.SeenImages.of(*self.views[1:], size=config.data.image_size or images.image_size)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            model = build_network(config, self.seen) if model is None else model
            self.proxies = ProxyLoss(classes, config.embedding_dim, epsilon=config.epsilon, margin=config.margin)
        self.load_weights(model)
        self.network = channels_last(model)
        backbone = list(model.get_submodule("backbone").parameters())
        if config.learn_bn_affine:
            for parameter in backbone:
                parameter.requires_grad_(True)
        self.backbone_parameters = [parameter for parameter in backbone if parameter.requires_grad]
        self.warm_up_steps = config.warm_up_epochs * self.epoch_steps
        if config.warm_up_images == "labeled":
            labeled = min(config.warm_up_epochs, config.labeled_epochs)
            self.warm_up_steps -= labeled * (self.epoch_steps - self.labeled_epoch_steps)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": trained, "scale": 1.0},
            {"params": [self.proxies.proxies], "scale": config.proxy_learning_rate_scale},
        ]
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, **self.fused)
        self.losses, self.optimizer = fabric.setup(_Losses(self.compiled(self.network), self.proxies), optimizer)

        self.true_labels = torch.tensor(self.train.labels)
        self.given_labels = torch.full((count,), -1)
        self.given_labels[self.labeled_index] = self.true_labels[self.labeled_index]
        self.labels = self.given_labels.to(fabric.device)  # those of the running epoch, with their confidence
        self.confidence = torch.ones(count, device=fabric.device)
        self.propagation: dict[str, float] = {}

    def step(self, batch: data.CollectionBatch, step: int) -> dict[str, Tensor]:
        """One step of either phase; the first of an epoch of the second propagates labels before."""
        config = self.config
        into_epoch = (step - self.labeled_steps) % self.epoch_steps
        if config.pseudo_labels != "none" and step >= self.labeled_steps and into_epoch == 0:
            self.propagate_labels()
        epoch = self._epoch(step)
        self.set_learning_rate(config.learning_rate, step_decay(epoch, config.decay_every, config.decay))
        for parameter in self.backbone_parameters:
            parameter.requires_grad_(step >= self.warm_up_steps)
        self.losses.train()
        self.optimizer.zero_grad()
        loss = self.losses(batch.images, self.labels[batch.positions], self.confidence[batch.positions])
        loss = loss * self.fabric.world_size  # DDP takes the mean over ranks, (26) the sum
        self.fabric.backward(loss)
        self.fabric.clip_gradients(self.losses, self.optimizer, clip_val=config.clip_value)
        self.optimizer.step()
        return {"loss": loss.detach()}

    @torch.no_grad()
    def propagate_labels(self) -> None:
        """Labels and confidences for the coming epoch, from the graph of the features of all training images as they
        are now.
        """
        features = gather_on_first(self.embed(self.network, self.train.images, self.views)[0])

        def propagated() -> tuple[Tensor, Tensor, dict[str, float]]:
            result = self._propagate(graph.knn_graph(features, self.config.k, gamma=self.config.gamma))
            labels, confidence = result.pseudo_labels.cpu(), result.confidence.float().cpu()
            unlabeled = self.given_labels < 0
            correct = (labels == self.true_labels)[unlabeled]  # measured, never learnt from
            figures = {
                "pseudo_label_accuracy": float(correct.float().mean()),
                "pseudo_label_confidence": float(confidence[unlabeled].mean()),
                "undecided": float((labels < 0).float().mean()),
                "cg_iterations": float(result.iterations.max()),
            }
            labels = torch.where(unlabeled, labels, self.given_labels)
            return labels, torch.where(unlabeled, confidence, confidence.max()), figures

        labels, confidence, self.propagation = self.on_first_rank(propagated)
        self.labels, self.confidence = labels.to(self.fabric.device), confidence.to(self.fabric.device)

    def _propagate(self, neighbours: graph.Graph) -> graph.MixedLabelPropagation:
        config = self.config
        if config.pseudo_labels == "dssml":
            neighbours = neighbours.mutual_neighbours()
        plain = None if config.pseudo_labels == "mixed-lp" else torch.zeros_like(neighbours.weight)
        return graph.mixed_label_propagation(
            neighbours,
            self.given_labels.to(neighbours.device),
            num_classes=self.train.num_classes,
            beta=config.beta,
            logit_scale=config.logit_scale,
            mu=config.mu,
            dissimilarity=plain,  # without any, (23) is label propagation
            normalize_confidence=config.normalize_confidence,
        )

    def scalars(self, means: dict[str, float]) -> dict[str, float]:
        """The means, with the figures of the propagation of the running epoch."""
        return {**means, **self.propagation}

    def evaluate(self) -> dict[str, float]:
        """Retrieval and clustering with the embeddings z, among the validation classes, if any, and the test ones."""
        figures: dict[str, float] = {}
        for name, images in (("validation", self.validation), ("test", self.test)):
            if images is None:
                continue
            _, embeddings, labels = self.embed(self.network, images.images, self.views)
            retrieved = retrieval_figures(embeddings, labels, images.queries)
            figures |= {f"{name}_{key}": value for key, value in retrieved.items()}
        return figures

    def batches(self, start_step: int) -> Iterator[data.CollectionBatch]:
        everything = self.labeled_index if self.config.pseudo_labels == "none" else np.arange(len(self.train))
        for index, first, end in (
            (self.labeled_index, 0, self.labeled_steps),
            (everything, self.labeled_steps, self.steps),
        ):
            if start_step < end:
                batches = data.CollectionBatches(
                    self.train.images,
                    index,
                    transform=self.views.training,
                    batch_size=self.config.batch_size,
                    seed=self.config.seed,
                    start_step=max(first, start_step),
                    num_steps=end,
                    mean=self.views.mean,
                    std=self.views.std,
                    **self.ranks,
                )
                yield from self.loader(batches)

    def labels_text(self) -> str:
        return data.labels_text(self.labeled_index, self.train.images, self.train.class_names)

    def parts(self) -> dict[str, Any]:
        return {"model": self.network, "proxies": self.proxies, "optimizer": self.optimizer}

    def _epoch(self, step: int) -> int:
        """The epoch that ``step`` is in, counted from 0 through both phases."""
        if step < self.labeled_steps:
            return step // self.labeled_epoch_steps
        return self.config.labeled_epochs + (step - self.labeled_steps) // self.epoch_steps


class _Losses(nn.Module):
    """Network and proxies as one module, whose gradients DDP sums together."""

    def __init__(self, network: nn.Module, proxies: ProxyLoss) -> None:
        super().__init__()
        self.network, self.proxies = network, proxies

    def forward(self, images: Tensor, labels: Tensor, confidence: Tensor) -> Tensor:
        _, embeddings = self.network(images)
        return self.proxies(embeddings, labels, confidence)


def train_mixed_lp(
    config: MixedLPConfig,
    *,
    resume: bool = False,
    images: data.ImageCollection | None = None,
    model: nn.Module | None = None,
) -> RunResult:
    """Trains as ``config`` says, from its checkpoint if ``resume``; on every rank under ``torchrun``.

    Every epoch after the labelled ones ends with an evaluation; ``result.best("validation_P@8")`` is the one that the
    paper reports, and ``run.out``/best.pt has the weights of its network.

    Args:
        images: all images, such as your own, see :class:`ssmkernels.data.ImageCollection`; ``config.data`` is loaded if
            none are given.
        model: a network of your own, such as a :class:`ssmkernels.models.EmbeddingModel` of your backbone, see
            :class:`MixedLP`; ``config.model`` is built if none is given.
    """
    if images is None:
        images = data.load_collection(config.data.name, config.data.root)
    fabric = make_fabric(
        config.run, precision=config.precision, find_unused_parameters=config.warm_up_epochs > 0
    )  # the backbone takes no part in the warm-up
    trainer = MixedLP(config, images, fabric, model=model)
    return trainer.run(
        resume=resume,
        epoch_ends=range(trainer.labeled_steps + trainer.epoch_steps, trainer.steps + 1, trainer.epoch_steps),
        best=None if trainer.validation is None else SELECTED_BY,
    )
