# SPDX-License-Identifier: BSD-3-Clause
"""Benchmark cases of training: the views of a step, a step of SimMatch, an evaluation.

The floor of views is reading the pixels once and writing float32 once; that of a step and of an evaluation is the
network alone, forward and backward or forward, on images that are there.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import data, ops, reference
from ssmkernels.bench import views
from ssmkernels.bench.case import Case
from ssmkernels.bench.measure import Function
from ssmkernels.bench.memory import vectorised_update
from ssmkernels.trainers import DataConfig, RunConfig, SimMatchConfig
from ssmkernels.trainers.evaluation import EvaluationSet, top_k_accuracies
from ssmkernels.trainers.loop import make_fabric
from ssmkernels.trainers.simmatch import SimMatch

PIL, V2 = "Pillow, by image", "torchvision v2, by image"


def cases(*, device: str = "cpu", dtype: torch.dtype = torch.float32, quick: bool = False) -> Iterator[Case]:
    """All of them in float32: images are."""
    splits = views.small_images(1000 if quick else 50_000)
    for variant in data.augment.VARIANTS:
        yield small_views(splits, variant, 4 if quick else 64, device)
    with tempfile.TemporaryDirectory() as folder:
        photographs = views.photographs(Path(folder), 8 if quick else 40)
        yield photograph_views(photographs, 1 if quick else 8, device)
        yield multi_crop_views(photographs, 2 if quick else 8, device)
    model, rows, images = ("wrn-10-1", 2, 200) if quick else ("wrn-28-2", 8, 2000)
    yield simmatch_step(splits, model, rows, device)
    yield evaluation(splits, images, device)


def small_views(splits: data.ImageSplits, variant: str, rows: int, device: str) -> Case:
    """``rows`` labelled images in one view and seven times as many in two: SimMatch's step on CIFAR-10."""
    ways, torchvision = views.small_batches(splits, variant, rows, device), views.TorchvisionViews()
    weak, strong = (torchvision.small(strong=is_strong) for is_strong in (False, True))
    pixels = torch.zeros(8 * rows, 3, 32, 32, dtype=torch.uint8)

    def by_torchvision() -> list[Tensor]:
        unlabeled = pixels[rows:]
        return [
            stacked(weak(image) for image in pixels[:rows]),
            stacked(weak(image) for image in unlabeled),
            stacked(strong(image) for image in unlabeled),
        ]

    return _case("small_views", variant, rows, ways, by_torchvision, 15 * rows * 3 * 32**2, device)


def photograph_views(splits: data.ImageSplits, rows: int, device: str) -> Case:
    """``rows`` labelled photographs in one view and five times as many in two: SimMatch's step on ImageNet."""
    ways, torchvision = views.photograph_batches(splits, rows), views.TorchvisionViews()
    weak, strong = (torchvision.crop(224, (0.2, 1.0), jitter=jitter) for jitter in (0.0, 0.4))
    numbers = itertools.cycle(range(len(splits.train)))
    photograph = _photographs(splits, torchvision)

    def by_torchvision() -> list[Tensor]:
        labeled = stacked(weak(photograph(next(numbers))) for _ in range(rows))
        both = [(weak(image), strong(image)) for image in (photograph(next(numbers)) for _ in range(5 * rows))]
        return [labeled, *map(stacked, zip(*both, strict=True))]

    return _case("photograph_views", "crops", rows, ways, by_torchvision, 11 * rows * 3 * 224**2, device)


def multi_crop_views(splits: data.ImageSplits, rows: int, device: str) -> Case:
    """SwAV's of ``rows`` photographs."""
    ways, torchvision = views.multi_crop_batches(splits, rows), views.TorchvisionViews()
    large, small = torchvision.crop(224, (0.14, 1.0), jitter=0.8), torchvision.crop(96, (0.05, 0.14), jitter=0.8)
    numbers = itertools.cycle(range(len(splits.train)))
    photograph = _photographs(splits, torchvision)

    def by_torchvision() -> list[Tensor]:
        images = [photograph(next(numbers)) for _ in range(rows)]
        return [
            stacked(large(image) for image in images for _ in range(2)),
            stacked(small(image) for image in images for _ in range(6)),
        ]

    count = rows * 3 * (2 * 224**2 + 6 * 96**2)
    return _case("multi_crop_views", "2 x 224 + 6 x 96", rows, ways, by_torchvision, count, device)


def _photographs(splits: data.ImageSplits, torchvision: views.TorchvisionViews) -> Callable[[int], Tensor]:
    images: Any = splits.train
    return lambda number: torchvision.photograph(images, number)


def stacked(images: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(images))


def _case(op: str, phase: str, rows: int, ways: views.Ways, by_torchvision: Function, values: int, device: str) -> Case:
    """Every call is the next step; peers are on the processor."""
    steps = [itertools.count(), itertools.count()]
    return Case(
        op=op,
        phase=phase,
        size={"images": rows},
        dtype=torch.float32,
        ours=lambda: views.finished(ways.batched, next(steps[0]), device),
        peers={PIL: lambda: ways.pil[next(steps[1])], V2: by_torchvision},
        products={},
        product_counts={},
        flops=0,
        bytes=values * (1 + 4),
    )


def simmatch_step(splits: data.ImageSplits, model: str, rows: int, device: str) -> Case:
    """A step on views that are there, in the steady state: ``rows`` labelled images and 2 · 7 times as many others."""
    trainer = _trainer(splits, model, rows, device)
    memory = trainer.memory
    assert memory is not None
    draw = torch.Generator().manual_seed(0)
    memory.bank.copy_(F.normalize(torch.randn(memory.bank.shape, generator=draw), dim=1))
    labeled, weak, strong = (torch.randn(count * rows, 3, 32, 32, generator=draw) for count in (1, 7, 7))
    labels = torch.arange(rows) % 10
    batch = data.Batch(labeled, labels, torch.arange(rows), weak, strong, labels.repeat(7))
    on_device = trainer.fabric.to_device(batch)
    together = torch.cat([on_device.labeled_weak, on_device.unlabeled_weak, on_device.unlabeled_strong])

    def step() -> dict[str, Tensor]:
        return trainer.step(on_device, trainer.steps - 1)

    def eager() -> dict[str, Tensor]:
        with (
            mock.patch.object(ops, "instance_matching", eager_matching),
            mock.patch.object(ops, "memory_update_", lambda *args, momentum: vectorised_update(*args)),
        ):
            return step()

    def network() -> None:
        logits, embeddings = trainer.student(together)
        trainer.fabric.backward(logits.float().sum() + embeddings.float().sum())
        trainer.optimizer.zero_grad()

    return Case(
        op="simmatch_step",
        phase=model,
        size={"B": rows, "mu": 7},
        dtype=torch.float32,
        ours=step,
        peers={"eager formulas": eager},
        products={"network": network},
        product_counts={"network": 1},
        flops=0,
        bytes=0,
    )


def eager_matching(*args: Any, group: Any, **options: Any) -> Any:
    """Of one process."""
    return reference.instance_matching(*args, **options)


def evaluation(splits: data.ImageSplits, images: int, device: str) -> Case:
    """Two small networks on some images that earlier evaluations have loaded; and as it was before: image by image by
    Pillow, for each network.
    """
    trainer = _trainer(splits, "wrn-10-1", 8, device)
    networks = {"student": trainer.model, "ema": trainer.teacher}
    tested = data.ImageSubset(
        splits.test, torch.arange(images).numpy(), splits.test.labels[:images], splits.num_classes
    )
    on_device = trainer.fabric.device
    kept = EvaluationSet(tested, on_device, mean=splits.mean, std=splits.std)
    batches = list(kept)

    def ours() -> object:
        return top_k_accuracies(networks, kept, device=on_device)

    def by_pillow() -> object:
        return [
            top_k_accuracies({name: network}, _loaded(tested, splits, on_device), device=on_device)
            for name, network in networks.items()
        ]

    return Case(
        op="evaluation",
        phase="wrn-10-1, twice",
        size={"images": images},
        dtype=torch.float32,
        ours=ours,
        peers={PIL: by_pillow},
        products={"networks": lambda: top_k_accuracies(networks, batches, device=on_device)},
        product_counts={"networks": 1},
        flops=0,
        bytes=0,
    )


def _loaded(
    images: data.ImageDataset, splits: data.ImageSplits, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    for pixels, labels in data.evaluation_batches(images, 256, mean=splits.mean, std=splits.std):
        yield pixels.to(device), labels.to(device)


def _trainer(splits: data.ImageSplits, model: str, rows: int, device: str) -> SimMatch:
    run = RunConfig(accelerator="cuda" if device == "cuda" else "cpu", bar=False)
    config = SimMatchConfig(data=DataConfig(labels=40), model=model, batch_size=rows, steps=2000, run=run)
    return SimMatch(config, splits, make_fabric(run))
