# SPDX-License-Identifier: BSD-3-Clause
"""pytorch-metric-learning's own training loop, its ContrastiveLoss swapped for ours: the same losses step by step, then time and memory.

A small network learns to embed scikit-learn's digits with ``trainers.MetricLossOnly``; the import of the loss is all that differs.
Run: ``python examples/metric_learning_loop.py``.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses, samplers, trainers
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from ssmkernels import nn
from ssmkernels.bench.measure import peak_extra_bytes, time_alternating


def train(loss_function, iterations):
    """The losses of the first ``iterations`` steps."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the sampler draws from it
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    trunk = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32))
    seen = []
    loop = trainers.MetricLossOnly(
        models={"trunk": trunk},
        optimizers={"trunk_optimizer": torch.optim.Adam(trunk.parameters(), lr=1e-3)},
        batch_size=320,
        loss_funcs={"metric_loss": loss_function},
        dataset=TensorDataset(images, labels),
        sampler=samplers.MPerClassSampler(labels, m=32, length_before_new_iter=320 * iterations),
        iterations_per_epoch=iterations,
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
        end_of_iteration_hook=lambda loop: seen.append(float(loop.losses["total_loss"].detach())),
    )
    loop.train()
    return torch.tensor(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=30, help="steps of training (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="*", default=[4096, 16384], help="sizes n to time the losses at (default: 4096 16384)")
    parser.add_argument("--dim", type=int, default=128, help="d, size of the embeddings timed (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each size (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to time")
    args = parser.parse_args()

    margins = {"pos_margin": 0.0, "neg_margin": 0.5}
    theirs, ours = losses.ContrastiveLoss(**margins), nn.ContrastiveLoss(**margins)
    before, after = train(theirs, args.iterations), train(ours, args.iterations)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)
    print(f"{args.iterations} losses equal, {before[0]:.4f} to {before[-1]:.4f}: largest difference {(after - before).abs().max():.1e}")

    for rows in args.rows:
        torch.manual_seed(0)
        labels = torch.arange(rows, device=args.device) // 16
        embeddings = F.normalize(torch.randn(rows // 16 + 1, args.dim, device=args.device))[labels]
        embeddings = (embeddings + torch.randn_like(embeddings) / args.dim**0.5).requires_grad_()

        def step(loss_function, embeddings=embeddings, labels=labels):
            return torch.autograd.grad(loss_function(embeddings, labels), embeddings)[0]

        steps = {"pytorch-metric-learning": lambda: step(theirs), "ssmkernels": lambda: step(ours)}
        expected, found = (each() for each in steps.values())
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        times = time_alternating(steps, device=args.device, seconds=args.seconds)
        print(f"\nn={rows} d={args.dim} on {args.device}, forward and backward, gradients equal")
        for name, each in steps.items():
            extra = peak_extra_bytes(each, device=args.device)
            memory = "?" if extra is None else f"{extra / 2**20:.1f}"
            print(f"{name:24} {1e3 * times[name].median:9.2f} ms   peak extra {memory} MiB")
        print(f"{times['pytorch-metric-learning'].median / times['ssmkernels'].median:.1f} times faster")


if __name__ == "__main__":
    main()
