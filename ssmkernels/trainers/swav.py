# SPDX-License-Identifier: BSD-3-Clause
"""SwAV (Caron et al., NeurIPS 2020): a backbone fine-tuned on images without their labels, where SLADE starts from.

Two large crops of each image and several small ones get unit embeddings z and scores z·c_k for prototypes c_k. The
scores of a large crop in the whole batch, balanced over the prototypes by Sinkhorn and Knopp's scaling, are its code q;
all other crops of the image predict it:

    L = 1/2 Σ_{i ∈ large} 1/(V + 1) Σ_{v ≠ i} −Σ_k q_ik log softmax_k(z_v·c / τ),    (2), (6)

with a queue of earlier embeddings beside the batch where it is too small to balance. Prototypes stay fixed for the
first epoch.

Settings are those of the authors' recipe for batches of 256, optimiser included: SGD with LARC (You et al., 2017),
which takes the step of each parameter in proportion to its norm. It needs no rate of its own for every backbone and for
weights as different as ImageNet's and those of a new head. Fine-tuning departs from that recipe in the number of
prototypes, 3000 for the 1.3 million images of ImageNet, and in the rate and the epochs of the configurations that come
with the package; what SLADE used was not published.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ssmkernels import data, models
from ssmkernels.distributed import all_gather_rows, all_reduce_mean
from ssmkernels.nn import PrototypeHead, sinkhorn_codes
from ssmkernels.trainers import kept
from ssmkernels.trainers.base import Trainer, channels_last
from ssmkernels.trainers.checkpoint import save_checkpoint
from ssmkernels.trainers.evaluation import retrieval
from ssmkernels.trainers.loop import Fabric, Precision, RunConfig, RunResult, make_fabric
from ssmkernels.trainers.schedules import warm_up_half_cosine
from ssmkernels.trainers.settings import Count, CountOrZero, NonNegative, PartialShare, Positive, Settings

SMALL_OVER_LARGE = 96 / 224
LARC_TRUST = 0.001


@dataclass
class SwAVDataConfig(Settings):
    """Which images to learn from, and which to measure retrieval on."""

    section: ClassVar[str] = "data."

    name: str = "digits"
    """Collection, as :func:`ssmkernels.data.load_collection` knows it."""
    root: str | None = None
    """Folder or file of its images; none for those that come inside packages."""
    unlabeled_name: str | None = None
    """Collection to add, all of it."""
    unlabeled_root: str | None = None
    """Folder or file of its images."""
    test_fraction: PartialShare = 0.5
    """Of the classes of the first collection, the last ones, to measure retrieval on; they are not learnt from."""
    classes_file: str | None = None
    """List of the classes, see :func:`ssmkernels.data.read_classes`: those to test on are what retrieval is measured
    on, those to train and validate on are learnt from; ``test_fraction`` then has no effect.
    """
    image_size: int | None = None
    """Side of the large crops in pixels; none for the first collection's own."""
    augment: Literal["batched", "pil"] = "batched"
    """Views in batches: loading processes decode and cut the crops, the device does the rest; or image by image by
    Pillow.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unlabeled_name is None and self.unlabeled_root is not None:
            raise ValueError(
                f"data.unlabeled_root is {self.unlabeled_root!r} without data.unlabeled_name; it should have one"
            )


@dataclass
class SwAVConfig(Settings):
    """Everything that determines a run. Defaults are SwAV's for batches of 256 but for ``num_prototypes`` and
    ``epochs``.
    """

    data: SwAVDataConfig = field(default_factory=SwAVDataConfig)
    model: str = "resnet50"
    """Network, as :func:`ssmkernels.models.build_embedding_model` knows it."""
    weights: str | None = None
    """Initial weights of its backbone: a file in one of the forms of :func:`ssmkernels.models.load_weights`; "imagenet"
    where the network has a source of them; none for random ones.
    """
    hidden_dim: Count = 2048
    """Width of the projection head."""
    embedding_dim: Count = 128
    """Size of the embeddings z."""
    num_prototypes: Count = 500
    """K."""
    seed: int = 1
    """Seed of the initial head, the batches and the crops."""

    temperature: Positive = 0.1
    """τ of the predictions."""
    epsilon: Positive = 0.05
    """ε of the codes."""
    sinkhorn_iterations: Count = 3
    """Turns of balancing the codes."""
    queue_length: CountOrZero = 3840
    """Earlier embeddings that codes are balanced over, a multiple of the batch; 0 for none."""
    queue_from_epoch: CountOrZero = 15
    """Epochs before the queue begins to fill. It is used once it is full."""
    freeze_prototypes_epochs: CountOrZero = 1
    """First epochs in which the prototypes do not learn."""

    small_crops: CountOrZero = 6
    """V, small crops of an image beside the two large ones."""
    small_size: int | None = None
    """Side of the small crops in pixels; none for 96/224 of the large ones'."""
    crop_scale: tuple[float, float] = (0.14, 1.0)
    """Share of the image that a large crop covers."""
    small_crop_scale: tuple[float, float] = (0.05, 0.14)
    """Share of the image that a small crop covers."""
    jitter: float = 0.8
    """Strength of the distortion of colours."""
    blur: float = 2.0
    """Greatest σ of the blur in pixels; 0 for none."""

    epochs: Count = 50
    batch_size: Count = 256
    """Images of a step, all ranks together."""
    learning_rate: NonNegative = 0.6
    """Before LARC, which multiplies it by .001 ‖w‖ / ‖∇‖."""
    final_learning_rate: NonNegative = 0.0006
    """Where the half cosine ends."""
    weight_decay: NonNegative = 1e-6
    """On everything."""
    precision: Precision = "32-true"
    """Arithmetic of the network; embeddings, codes and loss are float32 in all of them."""

    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queue_length % self.batch_size:
            raise ValueError(
                f"queue_length is {self.queue_length}; it should be a multiple of batch_size, {self.batch_size}, or 0"
            )


class SwAV(Trainer):
    """The algorithm, for :func:`ssmkernels.trainers.loop.fit`.

    Args:
        config: the settings.
        images: what is learnt from; labels are not looked at.
        evaluation_images: what retrieval is measured on.
        fabric: the device, its precision and the other ranks.
        model: it sees images by their collection's mean and deviation; built of ``config`` if none is given.
    """

    shown = ("loss", "code_balance")

    def __init__(
        self,
        config: SwAVConfig,
        images: data.ImageCollection,
        evaluation_images: data.ImageCollection,
        fabric: Fabric,
        *,
        model: SwAVNetwork | None = None,
    ) -> None:
        config.check_multiple("batch_size", fabric.world_size, f"the {fabric.world_size} ranks")
        super().__init__(config, fabric)
        self.images, self.evaluation_images, self.images_per_step = images, evaluation_images, config.batch_size
        self.epoch_steps = math.ceil(len(images) / config.batch_size)
        self.steps = config.epochs * self.epoch_steps

        normalization = "native" if model is not None else models.preprocessing(config.model)
        size = images.image_size if config.data.image_size is None else config.data.image_size
        self.views = data.crop_views(
            images,
            normalization,
            size=size,
            small_size=round(size * SMALL_OVER_LARGE) if config.small_size is None else config.small_size,
            scale=config.crop_scale,
            small_scale=config.small_crop_scale,
            jitter=config.jitter,
            blur=config.blur,
            batched=config.data.augment == "batched",
        )
        self.evaluation_views = data.retrieval_views(evaluation_images, normalization, size=size)
        self.seen = data.SeenImages.of(*self.evaluation_views[1:], size=size)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.network = build_network(config, self.seen) if model is None else model
        self.load_weights(self.network)
        if fabric.world_size > 1 and fabric.device.type == "cuda":  # as SwAV does; there is none for the CPU
            nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        channels_last(self.network)
        optimizer = torch.optim.SGD(self.network.parameters(), lr=config.learning_rate, momentum=0.9, **self.fused)
        self.crops, self.optimizer = fabric.setup(self.compiled(self.network), optimizer)
        # Embeddings of earlier first and second crops, this rank's share, the latest first.
        self.queue = torch.zeros(
            2, config.queue_length // fabric.world_size, config.embedding_dim, device=fabric.device
        )

    def step(self, batch: data.MultiCropBatch, step: int) -> dict[str, Tensor]:
        config, fabric = self.config, self.fabric
        decay = warm_up_half_cosine(step, self.steps, 0)
        self.set_learning_rate(config.final_learning_rate + decay * (config.learning_rate - config.final_learning_rate))
        self.crops.train()
        self.network.head.normalize_prototypes_()
        self.optimizer.zero_grad()
        losses = self.losses(batch, step)
        fabric.backward(losses["loss"])
        if step < config.freeze_prototypes_epochs * self.epoch_steps:
            self.network.head.prototypes.weight.grad = None
        fabric.strategy.precision.unscale_gradients(self.optimizer.optimizer)
        larc_(self.network.parameters(), config.weight_decay)
        self.optimizer.step()
        return {name: value.detach() for name, value in losses.items()}

    def losses(self, batch: data.MultiCropBatch, step: int) -> dict[str, Tensor]:
        """The swapped prediction of a batch and how even its codes are. The queue moves on."""
        config, count = self.config, len(batch.positions)
        z, scores = self.crops(batch.large, batch.small)
        scores = scores.reshape(-1, count, config.num_prototypes)  # crop by crop
        log_p = (scores / config.temperature).log_softmax(dim=2)
        codes = torch.stack(
            [self._codes(z.detach()[i * count : (i + 1) * count], scores.detach()[i], i, step) for i in range(2)]
        )
        # −Σ_k q_ik log p_vk, the mean over images, for every code i and every crop v; then without v = i.
        every = -torch.einsum("ibk,vbk->iv", codes, log_p) / count
        loss = (every.sum() - every[0, 0] - every[1, 1]) / (2 * (len(log_p) - 1))
        share = all_reduce_mean(codes.mean(dim=(0, 1)))
        return {"loss": loss, "code_balance": torch.special.entr(share).sum().exp() / config.num_prototypes}

    @torch.no_grad()
    def _codes(self, z: Tensor, scores: Tensor, crop: int, step: int) -> Tensor:
        """q [B, K] of the large crops number ``crop``, balanced over the queue too, where there is one."""
        config, queue = self.config, self.queue[crop]
        first = config.queue_from_epoch * self.epoch_steps
        if step < first or config.queue_length == 0:
            return sinkhorn_codes(scores, epsilon=config.epsilon, iterations=config.sinkhorn_iterations)
        full = step - first >= config.queue_length // config.batch_size
        together = torch.cat([scores, self.network.head.prototypes(queue)]) if full else scores
        self.queue[crop] = torch.cat([z, queue])[: len(queue)]
        return sinkhorn_codes(together, epsilon=config.epsilon, iterations=config.sinkhorn_iterations)[: len(scores)]

    def evaluate(self) -> dict[str, float]:
        """Retrieval by the cosine of pooled features of the backbone: P@1, R@k, P@k, RP and MAP@R."""
        images = self.evaluation_images
        features, _, labels = self.embed(UnitFeatures(self.network), images.images, self.evaluation_views)
        figures = retrieval(features, labels, images.queries)
        return {f"test_{name}": value for name, value in figures.items()}

    def batches(self, start_step: int) -> Iterable[data.MultiCropBatch]:
        config = self.config
        batches = data.MultiCropBatches(
            self.images.images,
            self.views,
            num_small=config.small_crops,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start_step,
            num_steps=self.steps,
            **self.ranks,
        )
        return self.loader(batches)

    def parts(self) -> dict[str, Any]:
        return {"model": self.network, "optimizer": self.optimizer}

    def state_dict(self) -> dict[str, Any]:
        queue = all_gather_rows(self.queue.transpose(0, 1).contiguous())  # [queue_length, 2, D], rank after rank
        return {**super().state_dict(), "queue": queue}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        share = state["queue"].chunk(self.fabric.world_size)[self.fabric.global_rank]
        self.queue.copy_(share.transpose(0, 1))


class SwAVNetwork(nn.Module):
    """Backbone, mean over the image, and head, for crops of two sizes.

    Shape: large [M, C, H, W], small [N, C, h, w] or empty -> z [M + N, D], scores [M + N, K].
    """

    def __init__(self, backbone: nn.Module, head: PrototypeHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, large: Tensor, small: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(torch.cat([self.features(crops) for crops in (large, small) if len(crops)]))

    def features(self, images: Tensor) -> Tensor:
        return self.backbone(images).mean(dim=(2, 3))


def build_network(config: SwAVConfig, images: data.SeenImages) -> SwAVNetwork:
    """The network of ``config`` for these images, from random weights."""
    built = models.build_embedding_model(
        config.model, freeze_bn=False, in_channels=images.channels, image_size=images.image_size
    )
    head = PrototypeHead(built.feature_dim, config.hidden_dim, config.embedding_dim, config.num_prototypes)
    return SwAVNetwork(built.backbone, head)  # the linear embedding is of no use here


class UnitFeatures(nn.Module):
    """Unit features [N, d] of a backbone, twice, as :func:`embed` takes a network."""

    def __init__(self, network: SwAVNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = nn.functional.normalize(self.network.features(images).float(), dim=1)
        return features, features


@torch.no_grad()
def larc_(parameters: Iterable[nn.Parameter], weight_decay: float, *, trust: float = LARC_TRUST) -> None:
    """Makes of every gradient g of a parameter w what LARC gives the optimiser, trust · ‖w‖ / (‖g‖ + λ‖w‖) · (g + λw).

    λ is ``weight_decay``; the optimiser should have none. Where w or g is 0, the gradient stays as it is.
    """
    for parameter in parameters:
        if parameter.grad is None:
            continue
        norm, gradient_norm = parameter.norm(), parameter.grad.norm()
        rate = trust * norm / (gradient_norm + weight_decay * norm)
        moving = (norm > 0) & (gradient_norm > 0)
        parameter.grad.copy_(torch.where(moving, rate * (parameter.grad + weight_decay * parameter), parameter.grad))


def load_images(config: SwAVConfig) -> tuple[data.ImageCollection, data.ImageCollection]:
    """The images to learn from, and those to measure retrieval on."""
    chosen = config.data
    images = data.load_collection(chosen.name, chosen.root)
    if chosen.classes_file is None:
        count = images.num_classes - math.ceil(images.num_classes * chosen.test_fraction - 1e-9)
        if count < 1:
            raise ValueError(
                f"data.test_fraction is {chosen.test_fraction}; of {images.num_classes} classes it should leave one to"
                " learn from"
            )
        classes, tested = np.split(np.arange(images.num_classes), [count])
    else:
        train, validation, tested = kept.read_classes(config, images.class_names)
        classes = np.sort(np.concatenate([train, validation]))
    learnt = data.class_subset(images, classes)
    if chosen.unlabeled_name is not None:
        learnt = data.unite(learnt, data.load_collection(chosen.unlabeled_name, chosen.unlabeled_root))
    return learnt, data.class_subset(images, tested)


def train_swav(
    config: SwAVConfig,
    *,
    resume: bool = False,
    images: data.ImageCollection | None = None,
    evaluation_images: data.ImageCollection | None = None,
    model: SwAVNetwork | None = None,
) -> RunResult:
    """Trains as ``config`` says, from its checkpoint if ``resume``; on every rank under ``torchrun``.

    Every epoch ends with an evaluation. At the end ``run.out``/backbone.pt has the weights of the backbone, for
    :func:`ssmkernels.models.build_embedding_model` and the ``weights`` of other trainers.

    Args:
        images: what is learnt from, such as your own, see :class:`ssmkernels.data.ImageCollection`; ``config.data`` is
            loaded if none are given.
        evaluation_images: what retrieval is measured on; by default ``images``, where they are given.
        model: a :class:`SwAVNetwork` of your own backbone and a :class:`ssmkernels.nn.PrototypeHead`; ``config.model``
            is built if none is given.
    """
    if images is None:
        if evaluation_images is not None:
            raise ValueError("evaluation_images are given without images; it should be both, or images alone")
        images, evaluation_images = load_images(config)
    fabric = make_fabric(config.run, precision=config.precision)
    trainer = SwAV(config, images, images if evaluation_images is None else evaluation_images, fabric, model=model)
    epoch_ends = range(trainer.epoch_steps, trainer.steps + 1, trainer.epoch_steps)
    result = trainer.run(resume=resume, epoch_ends=epoch_ends)
    if result.finished and config.run.out is not None and fabric.is_global_zero:
        save_checkpoint(Path(config.run.out) / "backbone.pt", models.backbone_state(trainer.network.backbone))
    return result
