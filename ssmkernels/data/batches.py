# SPDX-License-Identifier: BSD-3-Clause
"""The batches of a training run, and of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssmkernels.data.augment import EvaluationTransform, Transform, to_pixels, to_tensors
from ssmkernels.data.batched_augment import BatchTransform
from ssmkernels.data.batched_crops import CropTransform, finished_views, random_crops
from ssmkernels.data.images import ImageDataset
from ssmkernels.data.philox import uniforms
from ssmkernels.data.streams import IndexStream, Stream, generator, remaining


class Batch(NamedTuple):
    """What one step learns from: B labelled images, μB unlabelled ones in two views."""

    labeled_weak: Tensor
    """[B, C, H, W] float32."""
    labels: Tensor
    """[B] int64."""
    slots: Tensor
    """[B] int64, places of the labelled images in ``labeled_index``: their slots in a memory."""
    unlabeled_weak: Tensor
    """[μB, C, H, W] float32."""
    unlabeled_strong: Tensor
    """[μB, C, H, W] float32, of the same images in the same order."""
    unlabeled_labels: Tensor
    """[μB] int64, the true labels: to measure pseudo-labels with, never to learn from."""


def check_steps(batch_size: int, start_step: int, num_steps: int, rank: int, world_size: int) -> None:
    """Raises a ``ValueError`` unless these are the size, the steps and the slice of batches that ranks share evenly."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; it should be in [0, world_size), world_size being {world_size}")
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(f"batch_size is {batch_size}; it should be a positive multiple of world_size, {world_size}")
    if not 0 <= start_step <= num_steps:
        raise ValueError(f"start_step is {start_step}; it should be in [0, num_steps], num_steps being {num_steps}")


_VIEWS = {
    "labeled_weak": Stream.LABELED_WEAK,
    "unlabeled_weak": Stream.UNLABELED_WEAK,
    "unlabeled_strong": Stream.UNLABELED_STRONG,
}


class TrainBatches(Dataset[Batch]):
    """The batches of the steps ``start_step`` … ``num_steps`` − 1, for ``DataLoader(batches, batch_size=None,
    num_workers=k)``.

    Item i is the batch of step ``start_step + i``. It depends on the seed and the step alone: not on where a run
    started, not on how many processes load it. With several ranks each gets its slice of the batch of the step, so that
    all of them together see the images that one would see alone.

    Args:
        labeled: where labelled images come from.
        labeled_index: [K] which of them are labelled; drawn in seeded shuffles of all K.
        unlabeled: where unlabelled images come from, all of them, drawn in seeded shuffles too.
        weak, strong: transforms, see :mod:`ssmkernels.data.augment`; or both of :mod:`ssmkernels.data.batched_crops`:
            batches then have crops, uint8, of which :meth:`finish` makes the views.
        batch_size: B, labelled images of a step, all ranks together.
        mu: μ, unlabelled images per labelled one; with 0 none is loaded and the unlabelled tensors are empty.
        seed: seed of order and augmentation.
        start_step: the first step.
        num_steps: steps of the whole run, those before ``start_step`` included.
        rank, world_size: which slice of the batch is wanted, and how many there are.
        mean, std: per channel, see :func:`ssmkernels.data.to_tensor`.
        exclude_labeled: leave the labelled images out of the unlabelled ones, as SimMatch does on ImageNet; both must
            be the same data set.
    """

    def __init__(
        self,
        labeled: ImageDataset,
        labeled_index: np.ndarray,
        unlabeled: ImageDataset,
        *,
        weak: Transform | BatchTransform | CropTransform,
        strong: Transform | BatchTransform | CropTransform,
        batch_size: int,
        mu: int,
        seed: int,
        start_step: int,
        num_steps: int,
        rank: int = 0,
        world_size: int = 1,
        mean: Sequence[float],
        std: Sequence[float],
        exclude_labeled: bool = False,
    ) -> None:
        labeled_index = np.asarray(labeled_index)
        if labeled_index.ndim != 1 or labeled_index.dtype.kind not in "iu" or len(labeled_index) == 0:
            raise ValueError(
                f"labeled_index is {labeled_index.dtype} of shape {labeled_index.shape}; it should be integers of shape"
                " [K], K > 0"
            )
        lowest, highest = labeled_index.min(), labeled_index.max()
        if lowest < 0 or highest >= len(labeled):
            raise ValueError(
                f"labeled_index is in [{lowest}, {highest}]; it should be in [0, {len(labeled)}), the size of labeled"
            )
        if mu < 0:
            raise ValueError(f"mu is {mu}; it should be at least 0")
        check_steps(batch_size, start_step, num_steps, rank, world_size)
        if exclude_labeled and labeled is not unlabeled:
            raise ValueError("exclude_labeled is True; labeled and unlabeled should then be the same data set")

        self.labeled, self.labeled_index, self.unlabeled = labeled, labeled_index.astype(np.int64), unlabeled
        self.weak, self.strong = weak, strong
        self.batch_size, self.mu, self.seed = batch_size, mu, seed
        self.start_step, self.num_steps = start_step, num_steps
        self.rank, self.world_size = rank, world_size
        self.mean, self.std = tuple(mean), tuple(std)
        self._left_out = np.unique(self.labeled_index) if exclude_labeled else self.labeled_index[:0]
        self._labeled_order = IndexStream(len(labeled_index), seed, stream=Stream.LABELED_ORDER)
        if mu:
            count = len(unlabeled) - len(self._left_out)
            if count == 0:
                raise ValueError("unlabeled has no image left; it should have at least one")
            self._unlabeled_order = IndexStream(count, seed, stream=Stream.UNLABELED_ORDER)

    def __len__(self) -> int:
        return self.num_steps - self.start_step

    def __getitem__(self, item: int) -> Batch:
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of {len(self)} batches")
        step = self.start_step + item
        mine = self._slice(self.batch_size)
        slots = self._labeled_order.batch(step, self.batch_size)[mine]
        index = self.labeled_index[slots]
        (labeled_weak,) = self._views(self.labeled, index, ["labeled_weak"], step)
        labels, slots_tensor = torch.from_numpy(self.labeled.labels[index]), torch.from_numpy(slots)
        if self.mu == 0:
            empty = labeled_weak[:0]
            return Batch(labeled_weak, labels, slots_tensor, empty, empty, labels[:0])

        mine = self._slice(self.mu * self.batch_size)
        index = remaining(self._unlabeled_order.batch(step, self.mu * self.batch_size)[mine], self._left_out)
        weak, strong = self._views(self.unlabeled, index, ["unlabeled_weak", "unlabeled_strong"], step)
        unlabeled_labels = torch.from_numpy(self.unlabeled.labels[index])
        return Batch(labeled_weak, labels, slots_tensor, weak, strong, unlabeled_labels)

    @property
    def cropped(self) -> bool:
        """Whether batches have crops, uint8, of which :meth:`finish` makes views."""
        return isinstance(self.weak, CropTransform)

    def finish(self, batch: Batch, step: int) -> Batch:
        """The batch of a step with views instead of crops, made on the device where it is."""
        views = {name: self._finished(getattr(batch, name), name, step) for name in _VIEWS if len(getattr(batch, name))}
        none = views["labeled_weak"][:0]
        return batch._replace(**{name: views.get(name, none) for name in _VIEWS})

    def _slice(self, rows: int) -> slice:
        share = rows // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)

    def _views(self, dataset: ImageDataset, index: np.ndarray, names: Sequence[str], step: int) -> list[Tensor]:
        """The views of those names of some images, this rank's of the step."""
        if self.cropped:
            views = [(self._transform(name), self._draws(name, len(index), step)) for name in names]
            return random_crops(dataset, index, views)
        images = [dataset.image(i) for i in index]
        tensors = []
        for name in names:
            transform, stream = self._transform(name), _VIEWS[name]
            positions = self._positions(len(images))
            views_of_name = [
                transform(image, generator(self.seed, stream, step, int(position)))
                for image, position in zip(images, positions, strict=True)
            ]
            tensors.append(to_tensors(views_of_name, self.mean, self.std))
        return tensors

    def _transform(self, name: str) -> Any:
        return self.strong if name == "unlabeled_strong" else self.weak

    def _positions(self, count: int) -> np.ndarray:
        """Places of this rank's images in a batch of all ranks."""
        return self.rank * count + np.arange(count)

    def _draws(self, name: str, count: int, step: int) -> np.ndarray:
        return uniforms(self.seed, _VIEWS[name], step, self._positions(count), self._transform(name).num_draws)

    def _finished(self, crops: Tensor, name: str, step: int) -> Tensor:
        draws = self._draws(name, len(crops), step)
        return finished_views(crops, self._transform(name), draws, self.mean, self.std)


class CollectionBatch(NamedTuple):
    """Views of images, and which images they are: labels and weights that change from epoch to epoch are looked up
    by position.
    """

    images: Tensor
    """[B, C, H, W] float32."""
    positions: Tensor
    """[B] int64, places of the images in the data set."""


class CollectionBatches(Dataset[CollectionBatch]):
    """The batches of the steps ``start_step`` … ``num_steps`` − 1, for ``DataLoader(batches, batch_size=None,
    num_workers=k)``.

    As in :class:`TrainBatches`, item i is the batch of step ``start_step + i``, a function of the seed and the step, of
    which each rank gets its slice. No batch is short: one that reaches the end of a shuffle goes on in the next.

    Args:
        images: where the images come from.
        index: [K] which of them are drawn, in seeded shuffles of all K.
        transform: of a training image, see :func:`ssmkernels.data.retrieval_views`.
        batch_size: B, images of a step, all ranks together; it may exceed K.
        seed: seed of order and augmentation.
        start_step: the first step.
        num_steps: one past the last step.
        rank, world_size: which slice of the batch is wanted, and how many there are.
        mean, std: per channel, see :func:`ssmkernels.data.to_tensor`.
    """

    def __init__(
        self,
        images: ImageDataset,
        index: np.ndarray,
        *,
        transform: Transform | CropTransform,
        batch_size: int,
        seed: int,
        start_step: int,
        num_steps: int,
        rank: int = 0,
        world_size: int = 1,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        index = np.asarray(index)
        if index.ndim != 1 or index.dtype.kind not in "iu" or len(index) == 0:
            raise ValueError(
                f"index is {index.dtype} of shape {index.shape}; it should be integers of shape [K], K > 0"
            )
        if index.min() < 0 or index.max() >= len(images):
            raise ValueError(
                f"index is in [{index.min()}, {index.max()}]; it should be in [0, {len(images)}), the size of images"
            )
        check_steps(batch_size, start_step, num_steps, rank, world_size)
        self.images, self.index, self.transform = images, index.astype(np.int64), transform
        self.batch_size, self.seed, self.start_step, self.num_steps = batch_size, seed, start_step, num_steps
        self.mean, self.std = tuple(mean), tuple(std)
        share = batch_size // world_size
        self._mine = slice(rank * share, (rank + 1) * share)
        self._order = IndexStream(len(index), seed, stream=Stream.COLLECTION_ORDER)

    def __len__(self) -> int:
        return self.num_steps - self.start_step

    def __getitem__(self, item: int) -> CollectionBatch:
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of {len(self)} batches")
        step = self.start_step + item
        positions = self.index[self._places(step)[self._mine]]
        if isinstance(self.transform, CropTransform):
            (crops,) = random_crops(self.images, positions, [(self.transform, self._draws(step))])
            return CollectionBatch(crops, torch.from_numpy(positions))
        views = [
            self.transform(self.images.image(i), self._view_generator(step, place))
            for place, i in enumerate(positions, start=self._mine.start)
        ]
        return CollectionBatch(to_tensors(views, self.mean, self.std), torch.from_numpy(positions))

    @property
    def cropped(self) -> bool:
        """Whether batches have crops, uint8, of which :meth:`finish` makes views."""
        return isinstance(self.transform, CropTransform)

    def finish(self, batch: CollectionBatch, step: int) -> CollectionBatch:
        """The batch of a step with views instead of crops, made on the device where it is."""
        transform: Any = self.transform
        views = finished_views(batch.images, transform, self._draws(step), self.mean, self.std)
        return batch._replace(images=views)

    def _draws(self, step: int) -> np.ndarray:
        transform: Any = self.transform
        places = np.arange(self._mine.start, self._mine.stop)
        return uniforms(self.seed, self._view_stream(), step, places, transform.num_draws)

    def _view_stream(self) -> int:
        return Stream.COLLECTION_VIEW

    def _places(self, step: int) -> np.ndarray:
        """Places in ``index`` of the images of a step, all ranks together."""
        return self._order.batch(step, self.batch_size)

    def _view_generator(self, step: int, place: int) -> np.random.Generator:
        return generator(self.seed, Stream.COLLECTION_VIEW, step, place)


def evaluation_batches(
    dataset: ImageDataset,
    batch_size: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    transform: EvaluationTransform | None = None,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    worker_init_fn: Callable[[int], None] | None = None,
) -> Iterable[tuple[Tensor, Tensor]]:
    """Every image once, in order: (images [b, C, H, W] float32, labels [b] int64), the last batch as small as it comes
    out.

    Args:
        mean, std: per channel, see :func:`ssmkernels.data.to_tensor`; without them the images are uint8.
        transform: of an image before it becomes a tensor; none if the images are all of one size already.
        rank, world_size: take the run of images that is this rank's, as :func:`ssmkernels.distributed.split_rows`
            deals rows out.
        workers, worker_init_fn: loading processes, as in ``torch.utils.data.DataLoader``.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it should be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; it should be in [0, world_size), world_size being {world_size}")
    batches = _EvaluationBatches(
        dataset,
        np.arange(rank * len(dataset) // world_size, (rank + 1) * len(dataset) // world_size),
        batch_size,
        transform,
        None if mean is None or std is None else (tuple(mean), tuple(std)),
    )
    # Without one, a loader draws from the global generator, and evaluating would change the training after it
    own = torch.Generator()
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=worker_init_fn,
        generator=own,
        persistent_workers=workers > 0,
    )


class _EvaluationBatches(Dataset[tuple[Tensor, Tensor]]):
    def __init__(
        self,
        dataset: ImageDataset,
        index: np.ndarray,
        batch_size: int,
        transform: EvaluationTransform | None,
        mean_and_std: tuple[tuple[float, ...], tuple[float, ...]] | None,
    ) -> None:
        self.dataset, self.index, self.batch_size, self.transform = dataset, index, batch_size, transform
        self.mean_and_std = mean_and_std

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        index = self.index[item * self.batch_size : (item + 1) * self.batch_size]
        images = [self.dataset.image(i) for i in index]
        if self.transform is not None:
            images = [self.transform(image) for image in images]
        labels = torch.from_numpy(self.dataset.labels[index])
        if self.mean_and_std is None:
            return torch.from_numpy(np.ascontiguousarray(to_pixels(images))), labels
        return to_tensors(images, *self.mean_and_std), labels
