# SPDX-License-Identifier: BSD-3-Clause
"""What the views of a training step cost the processor: SimMatch's on CIFAR-10, 64 labelled and 448 unlabelled images,
960 views, by Pillow and in batches.

    python bench/augmentation.py [--rounds 20] [--out bench/results/cpu-augmentation.md]

Milliseconds of processor time on one core, the least of steps that alternate between the two, since other programs
only add to it. The images are noise, which costs what photographs cost: no operation looks at them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from ssmkernels import data, info
from ssmkernels._files import write_atomically
from ssmkernels._text import markdown_table

MU, BATCH_SIZE = 7, 64
BAR = 20.0  # ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps = batches(args.rounds + 1)
    rows = []
    for variant in data.augment.VARIANTS:
        seconds: dict[str, list[float]] = {name: [] for name in steps[variant]}
        for step in range(args.rounds + 1):
            for name, made in steps[variant].items():
                begin = time.process_time()
                made[step]
                seconds[name].append(time.process_time() - begin)
        old, new = (1e3 * min(seconds[name][1:]) for name in ("pil", "batched"))
        rows.append([variant, f"{old:.1f}", f"{new:.1f}", f"{old / new:.1f}", "yes" if new <= BAR else "no"])
    titles = ["RandAugment", "Pillow, ms", "batched, ms", "ratio", f"at most {BAR:g} ms"]
    cpu = f"one core of an {info.collect()['cpu']['model']}, torch {torch.__version__}"
    text = f"{cpu}; `python bench/augmentation.py --rounds {args.rounds}`\n\n{markdown_table(titles, rows)}\n"
    print(text)
    if args.out:
        write_atomically(args.out, text)


def batches(steps: int) -> dict[str, dict[str, data.TrainBatches]]:
    """The steps of both ways, by variant of RandAugment."""
    pixels = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
    images = data.ArrayImages(pixels, np.arange(50_000) % 10, 10)
    splits = data.ImageSplits(images, images, 10, tuple("0123456789"), (0.5,) * 3, (0.25,) * 3, image_size=32)
    made: dict[str, dict[str, data.TrainBatches]] = {}
    for variant in data.augment.VARIANTS:
        of_pillow = data.default_transforms(splits, variant=variant)
        of_batches = data.batch_transforms(splits, variant=variant)
        settings = {"batch_size": BATCH_SIZE, "mu": MU, "seed": 1, "start_step": 0, "num_steps": steps}
        statistics_of_images = {"mean": splits.mean, "std": splits.std}
        arguments = images, np.arange(4000), images
        options = {**settings, **statistics_of_images}
        made[variant] = {
            "pil": data.TrainBatches(*arguments, weak=of_pillow.weak, strong=of_pillow.strong, **options),
            "batched": data.DeviceTrainBatches(
                *arguments, weak=of_batches.weak, strong=of_batches.strong, **options, device=torch.device("cpu")
            ),
        }
    return made


if __name__ == "__main__":
    main()
