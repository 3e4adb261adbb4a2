# SPDX-License-Identifier: BSD-3-Clause
"""What trainers measure: accuracy of a classifier, retrieval with embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssmkernels import data, metrics
from ssmkernels.data.batched_augment import normalize
from ssmkernels.distributed import Group, all_reduce_sum, gather_sizes, rank_of, split_rows, world_size

KEPT_BYTES = 2**30
"""Up to so many bytes of a rank's share of some images stay on the device between evaluations."""


class EvaluationSet:
    """This rank's share of some images as networks see them, in batches of 256: (images [b, C, H, W] float32, labels
    [b]), on ``device``. Those that take up to :data:`KEPT_BYTES` are loaded once.

    Args:
        images: the images.
        device: where they are wanted.
        mean, std: per channel, see :func:`ssmkernels.data.to_tensor`.
        loading: ``transform``, ``rank``, ``world_size``, ``workers`` and ``worker_init_fn`` of
            :func:`ssmkernels.data.evaluation_batches`.
    """

    def __init__(
        self,
        images: data.ImageDataset,
        device: torch.device,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        **loading: Any,
    ) -> None:
        self.images, self.device, self.mean, self.std = images, device, mean, std
        self.loaded: Iterable[tuple[Tensor, Tensor]] = data.evaluation_batches(images, 256, **loading)
        self.kept = False

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        keeping: list[tuple[Tensor, Tensor]] = []
        bytes_left = 0 if self.kept else KEPT_BYTES
        for pixels, labels in self.loaded:
            on_device = pixels.to(self.device), labels.to(self.device)
            bytes_left -= pixels.nbytes
            if bytes_left >= 0:
                keeping.append(on_device)
            else:
                keeping.clear()
            yield normalize(on_device[0], self.mean, self.std), on_device[1]
        if bytes_left >= 0:
            self.loaded, self.kept = keeping, True  # the loading processes end


@torch.no_grad()
def top_k_accuracies(
    networks: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    ks: tuple[int, ...] = (1,),
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, list[float]]:
    """The share of images whose class is among the k with the highest logits, for each network and k, over the batches
    of all ranks, which are gone through once.

    Args:
        networks: images [N, C, H, W] -> (logits [N, L], anything); they are put in eval mode for the time.
        batches: (images, labels [N]) of this rank.
        device: of the networks and the batches.
        autocast: the precision.
    """
    hits: dict[str, list[Tensor]] = {name: [] for name in networks}
    count = torch.zeros((), dtype=torch.float64, device=device)
    with evaluating(*networks.values()), autocast():
        for images, labels in batches:
            count += len(labels)
            for name, network in networks.items():
                logits, _ = network(images)
                right = logits.topk(max(ks), dim=1).indices == labels[:, None]
                hits[name].append(torch.stack([right[:, :k].sum() for k in ks]).double())
    none = count.new_zeros(len(ks))
    totals = torch.stack([count.expand(len(ks)), *(sum(of_batches, start=none) for of_batches in hits.values())])
    images_of_all, *correct = all_reduce_sum(totals).tolist()
    shares = [[right / max(images_of_all[0], 1) for right in of_network] for of_network in correct]
    return dict(zip(networks, shares, strict=True))


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """The networks are in eval mode within it."""
    training = [network.training for network in networks]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for network, was_training in zip(networks, training, strict=True):
            network.train(was_training)


@torch.no_grad()
def embed(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features v [n, d], embeddings z [n, δ], at least float32, and labels [n] of this rank's images. In rank order,
    as ``gather_on_first`` gathers them, they are in the order of the data set.

    Args:
        model: images [b, C, H, W] -> (v, z); it is put in eval mode for the time.
        batches: (images, labels [b]) of this rank, as :func:`ssmkernels.data.evaluation_batches` deals them out; also
            none, unless no rank has any.
        autocast: the precision.
    """
    with evaluating(model), autocast():
        parts = [(*model(images.to(device)), labels.to(device)) for images, labels in batches]
    rows, labels = [], torch.empty(0, dtype=torch.int64, device=device)
    if parts:
        *rows, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        rows = [part.float() if part.dtype.itemsize < 4 else part for part in rows]
    kinds = [number for part in rows for number in (part.shape[1], part.dtype.itemsize)] or [0] * 4
    width, itemsize, other_width, other_itemsize = torch.tensor(gather_sizes(kinds, device)).amax(dim=0).tolist()
    if not rows:
        dtypes = {4: torch.float32, 8: torch.float64}
        rows = [
            torch.empty(0, width, dtype=dtypes[itemsize], device=device),
            torch.empty(0, other_width, dtype=dtypes[other_itemsize], device=device),
        ]
    return rows[0], rows[1], labels


def retrieval(
    embeddings: Tensor, labels: Tensor, queries: np.ndarray | None = None, *, group: Group = None, **at: Any
) -> dict[str, float]:
    """:func:`ssmkernels.metrics.retrieval` of each image of all ranks among all others; or, where some are ``queries``
    [N] bool (:class:`ssmkernels.data.ImageCollection`), of those among the rest.
    """
    if queries is None or not queries.any():
        return metrics.retrieval(embeddings, labels, group=group, **at)
    own = queries[split_rows(len(queries), rank_of(group), world_size(group))]
    asked = torch.from_numpy(own).to(embeddings.device)
    return metrics.retrieval(
        embeddings[asked],
        labels[asked],
        references=embeddings[~asked],
        reference_labels=labels[~asked],
        group=group,
        **at,
    )


def retrieval_figures(embeddings: Tensor, labels: Tensor, queries: np.ndarray | None = None) -> dict[str, float]:
    """R@k and P@k for k = 1, 2, 4, 8, RP, MAP@R and NMI, equations (30)-(35) of mixed label propagation, by the
    names of the metrics, of the images of all ranks.
    """
    return {**retrieval(embeddings, labels, queries), "NMI": metrics.nmi(embeddings, labels, group=None)}
