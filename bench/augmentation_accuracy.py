# SPDX-License-Identifier: BSD-3-Clause
"""Accuracy of a small run with views by Pillow and in batches, whose draws differ: SimMatch on digits with 40 labels,
the same labelled images, initial weights and order of images for both, by seed.

    python bench/augmentation_accuracy.py [--seeds 5] [--steps 300] [--out bench/results/cpu-augmentation-accuracy.md]
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import torch

from ssmkernels import info
from ssmkernels._files import write_atomically
from ssmkernels._text import markdown_table
from ssmkernels.trainers import train_simmatch
from ssmkernels.trainers.cli import parse_config

WAYS = ("pil", "batched")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    accuracies: dict[str, list[float]] = {way: [] for way in WAYS}
    rows = []
    for seed in range(1, args.seeds + 1):
        for way in WAYS:
            accuracies[way].append(accuracy(way, seed, args.steps))
        rows.append([f"seed {seed}", *(f"{accuracies[way][-1]:.1f}" for way in WAYS)])
        print(*rows[-1], flush=True)
    spread = [f"{statistics.mean(of_way):.1f} ± {statistics.stdev(of_way):.1f}" for of_way in accuracies.values()]
    rows.append(["mean ± standard deviation", *spread])
    differences = [new - old for old, new in zip(*accuracies.values(), strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    text = (
        f"one core of an {info.collect()['cpu']['model']}, torch {torch.__version__}; `python"
        f" bench/augmentation_accuracy.py --seeds {args.seeds} --steps {args.steps}`\n\n"
        f"{markdown_table(['student, % right', 'Pillow', 'batched'], rows)}\n\n"
        f"Batched less Pillow, by seed: {statistics.mean(differences):+.1f} ± {error:.1f} (standard error).\n"
    )
    print(text)
    if args.out:
        write_atomically(args.out, text)


def accuracy(way: str, seed: int, steps: int) -> float:
    """Of the student after the last step, in %."""
    settings = ["--config", "digits", "--data.labels", "40", "--data.augment", way, "--seed", str(seed)]
    quiet = ["--run.bar", "false", "--run.workers", "0", "--run.eval_every", str(steps), "--run.accelerator", "cpu"]
    config, _ = parse_config("simmatch", [*settings, "--steps", str(steps), *quiet])
    torch.set_num_threads(1)
    return 100 * train_simmatch(config).history[-1]["student_accuracy"]


if __name__ == "__main__":
    main()
