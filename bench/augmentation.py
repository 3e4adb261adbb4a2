# SPDX-License-Identifier: BSD-3-Clause
"""What the views of a training step cost the processor, by Pillow and in batches: SimMatch's on CIFAR-10, 64 labelled
and 448 unlabelled images, 960 views; SimMatch's on ImageNet, 64 and 320 images, 704 views; SwAV's of 16 images.

    python bench/augmentation.py [--rounds 20] [--photograph-rounds 3] [--out bench/results/cpu-augmentation.md]

Milliseconds of processor time on one core, the least of steps that alternate between the two, since other programs only
add to it. The images are those of :mod:`ssmkernels.bench.views`. "Loading" is what loading processes do of it, to
decode and to cut; the rest is done where the network is, and costs a processor nothing where that is a GPU.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ssmkernels import data, info
from ssmkernels._files import write_atomically
from ssmkernels._text import markdown_table
from ssmkernels.bench import views
from ssmkernels.trainers.host_memory import keep_freed_memory

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
    keep_freed_memory()  # as trainers do
    rows = []
    small = views.small_images()
    for variant in data.augment.VARIANTS:
        made = views.small_batches(small, variant, 64)
        old, new = least_times([step.__getitem__ for step in made], args.rounds)
        rows.append(row(f"SimMatch, CIFAR-10, {variant}", old, new, None, f"{CIFAR_BAR:g} ms", new <= CIFAR_BAR))
        print(rows[-1], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        splits = views.photographs(Path(folder))
        for title, ways in (
            ("SimMatch, ImageNet", views.photograph_batches(splits, 64)),
            ("SwAV, 2 x 224 + 6 x 96", views.multi_crop_batches(splits, 16)),
        ):
            steps = [ways.pil.__getitem__, functools.partial(views.finished, ways.batched), ways.batched.__getitem__]
            old, new, loading = least_times(steps, args.photograph_rounds)
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


if __name__ == "__main__":
    main()
