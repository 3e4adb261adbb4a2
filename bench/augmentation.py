# SPDX-License-Identifier: BSD-3-Clause
"""What the views of a training step cost the processor, by Pillow and in batches: SimMatch's on CIFAR-10, 64 labelled
and 448 unlabelled images, 960 views; SimMatch's on ImageNet, 64 and 320 images, 704 views; SwAV's of 16 images.

    python bench/augmentation.py [--rounds 20] [--photograph-rounds 3] [--out bench/results/cpu-augmentation.md]

Milliseconds of processor time on one core, the least of steps that alternate between the two, since other programs
only add to it. Small images are noise, which costs what photographs cost: no operation looks at them. Photographs are
made, 500 by 375 pixels and about 80 KB (ImageNet's have 110 on average), written as JPEG and read from the page cache.
"Loading" is what loading processes do of it, to decode and to cut; the rest is done where the network is, and costs a
processor nothing where that is a GPU.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ssmkernels import data, info
from ssmkernels._files import write_atomically
from ssmkernels._text import markdown_table

CIFAR_BAR, PHOTOGRAPH_BAR = 20.0, 5.0  # ms; times less than Pillow's
TITLES = ["step", "Pillow, ms", "batched, ms", "ratio", "of it loading, ms", "ratio", "aim"]
Step = Callable[[int], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--photograph-rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for variant in data.augment.VARIANTS:
        made = cifar_batches(args.rounds + 1, variant)
        old, new = least_times([step.__getitem__ for step in made], args.rounds)
        rows.append(row(f"SimMatch, CIFAR-10, {variant}", old, new, None, f"{CIFAR_BAR:g} ms", new <= CIFAR_BAR))
        print(rows[-1], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        splits = photographs(Path(folder))
        for title, pil, batched in (
            ("SimMatch, ImageNet", *imagenet_batches(splits, args.photograph_rounds + 1)),
            ("SwAV, 2 x 224 + 6 x 96", *multi_crop_batches(splits, args.photograph_rounds + 1)),
        ):
            old, new, loading = least_times(
                [pil.__getitem__, whole(batched), batched.__getitem__], args.photograph_rounds
            )
            rows.append(
                row(title, old, new, loading, f"loading {PHOTOGRAPH_BAR:g} times", old / loading >= PHOTOGRAPH_BAR)
            )
            print(rows[-1], flush=True)
    cpu = f"one core of an {info.collect()['cpu']['model']}, torch {torch.__version__}"
    command = f"python bench/augmentation.py --rounds {args.rounds} --photograph-rounds {args.photograph_rounds}"
    text = f"{cpu}; `{command}`\n\n{markdown_table(TITLES, rows)}\n"
    print(text)
    if args.out:
        write_atomically(args.out, text)


def row(title: str, old: float, new: float, loading: float | None, aim: str, reached: bool) -> list[str]:
    of_loading = ["all", "-"] if loading is None else [f"{loading:.1f}", f"{old / loading:.1f}"]
    return [title, f"{old:.1f}", f"{new:.1f}", f"{old / new:.1f}", *of_loading, f"{aim}: {'yes' if reached else 'no'}"]


def least_times(steps: list[Step], rounds: int) -> list[float]:
    """Milliseconds of each, in turn; the first step is not counted."""
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 1):
        for step, of_step in zip(steps, seconds, strict=True):
            begin = time.process_time()
            step(number)
            of_step.append(time.process_time() - begin)
    return [1e3 * min(of_step[1:]) for of_step in seconds]


def whole(batches: Any) -> Step:
    """Crops and what is made of them."""
    return lambda number: batches.finish(batches[number], number)


def cifar_batches(steps: int, variant: str) -> tuple[data.TrainBatches, data.TrainBatches]:
    """By Pillow and in batches."""
    pixels = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
    images = data.ArrayImages(pixels, np.arange(50_000) % 10, 10)
    splits = data.ImageSplits(images, images, 10, tuple("0123456789"), (0.5,) * 3, (0.25,) * 3, image_size=32)
    of_pillow = data.default_transforms(splits, variant=variant)
    of_batches: Any = data.batch_transforms(splits, variant=variant)
    options: dict[str, Any] = {"batch_size": 64, "mu": 7, "seed": 1, "start_step": 0, "num_steps": steps}
    options |= {"mean": splits.mean, "std": splits.std}
    arguments = images, np.arange(4000), images
    return (
        data.TrainBatches(*arguments, weak=of_pillow.weak, strong=of_pillow.strong, **options),
        data.DeviceTrainBatches(
            *arguments, weak=of_batches.weak, strong=of_batches.strong, **options, device=torch.device("cpu")
        ),
    )


def photographs(folder: Path, count: int = 100) -> data.ImageSplits:
    """Sums of noise of several scales, whose power falls with frequency as that of photographs does."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for path in paths:
        pixels = np.zeros((375, 500, 3))
        for scale in (1, 2, 4, 8, 16, 32, 64, 128):
            noise = rng.integers(0, 256, (375 // scale + 2, 500 // scale + 2, 3), dtype=np.uint8)
            pixels += scale**0.25 * (np.asarray(Image.fromarray(noise).resize((500, 375), 2)) - 127.0)
        Image.fromarray((127 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    size = np.mean([path.stat().st_size for path in paths])
    print(f"photographs of {size / 1e3:.0f} KB", flush=True)
    images = data.FileImages(paths, np.arange(count) % 10, 10)
    names = tuple("0123456789")
    return data.ImageSplits(images, images, 10, names, (0.5,) * 3, (0.25,) * 3, 224, augmentation="imagenet")


def imagenet_batches(splits: data.ImageSplits, steps: int) -> list[data.TrainBatches]:
    """By Pillow and in batches."""
    return [
        data.TrainBatches(
            splits.train,
            np.arange(100),
            splits.train,
            weak=transforms.weak,
            strong=transforms.strong,
            batch_size=64,
            mu=5,
            seed=1,
            start_step=0,
            num_steps=steps,
            mean=splits.mean,
            std=splits.std,
        )
        for transforms in (data.default_transforms(splits), data.batch_transforms(splits))
    ]


def multi_crop_batches(splits: data.ImageSplits, steps: int) -> list[data.MultiCropBatches]:
    """By Pillow and in batches."""
    collection = data.ImageCollection(splits.train, splits.class_names)
    return [
        data.MultiCropBatches(
            splits.train,
            data.crop_views(collection, size=224, small_size=96, batched=batched),
            batch_size=16,
            seed=1,
            start_step=0,
            num_steps=steps,
        )
        for batched in (False, True)
    ]


if __name__ == "__main__":
    main()
