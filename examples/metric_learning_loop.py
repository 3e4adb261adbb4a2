# SPDX-License-Identifier: BSD-3-Clause
"""pytorch-metric-learning's own training loop, its ContrastiveLoss swapped for ours: the same losses, less time.

A small network learns to embed scikit-learn's digits with ``trainers.MetricLossOnly``; the import of the loss is all
that differs. Each step's loss is compared with that of their loss in float64.
Run: ``python examples/metric_learning_loop.py`` (needs pytorch-metric-learning and scikit-learn).
"""

import argparse
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses, samplers, trainers
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from ssmkernels import nn
from ssmkernels.bench.measure import peak_extra_bytes, time_alternating

MARGINS = {"pos_margin": 0.0, "neg_margin": 0.5}


def train(loss_function, iterations, seed, after_loss):
    """Calls ``after_loss(embeddings, labels, loss)`` in each of so many steps."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the sampler draws from it
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    trunk = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32))
    loss_function.register_forward_hook(lambda _, given, loss: after_loss(given[0].detach(), given[1], loss.detach()))
    trainers.MetricLossOnly(
        models={"trunk": trunk},
        optimizers={"trunk_optimizer": torch.optim.Adam(trunk.parameters(), lr=1e-3)},
        batch_size=320,
        loss_funcs={"metric_loss": loss_function},
        dataset=TensorDataset(images, labels),
        sampler=samplers.MPerClassSampler(labels, m=32, length_before_new_iter=320 * iterations),
        iterations_per_epoch=iterations,
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
    ).train()


def loss_and_gradient(loss_function, embeddings, labels):
    embeddings = embeddings.detach().requires_grad_()
    loss = loss_function(embeddings, labels)
    return loss.detach(), torch.autograd.grad(loss, embeddings)[0]


def tolerances(embeddings, labels):
    """What float32 may change of the loss, and of each row of its gradient [n, 1].

    A sum of k terms may be off by k·2⁻²⁴ of their size, whatever their order. So the distance D of two rows of length 1
    is off by 2 d·2⁻²⁴/D as √(2 − 2 x·y), and by d·2⁻²⁴·D as |x − y|, which ours takes below D = 1/4: by less than 10
    d·2⁻²⁴ in any case. A hinge is off by as much, and a pair so close to its margin may count or not; means are taken
    of rows of n pairs. A pair that counts gives its rows 2 (x − y)/D over the number M of those that do: x/D and y/D
    have a share n·2⁻²⁴ of error as sums, 1/D what D has.
    """
    n, dim = embeddings.shape
    rows = F.normalize(embeddings.double())
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    same = labels[:, None] == labels
    of_distance, of_sums = 10 * (dim + 8) * 2**-24, n * 2**-24
    loss = gradient = 0
    for pairs, excess in ((same, distances - MARGINS["pos_margin"]), (~same, MARGINS["neg_margin"] - distances)):
        pairs = pairs & distances.isfinite()
        counted, unsure = pairs & (excess > 0), pairs & (excess.abs() <= of_distance)
        number = max(1, int(counted.sum()))
        moved = int(unsure.sum()) / number
        loss = loss + of_distance + (of_sums + moved) * excess[counted].sum() / number
        shares = torch.where(counted, (of_distance + 2 * of_sums) / distances + moved, 0) + unsure.double()
        gradient = gradient + 2 * shares.sum(dim=1, keepdim=True) / number
    return loss, gradient / torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=30, help="steps of training (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="*", default=[1024, 4096], help="n, to time (default: 1024 4096)")
    parser.add_argument("--dim", type=int, default=128, help="d, size of the embeddings timed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and embeddings (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each size (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to time")
    args = parser.parse_args()

    theirs, ours = losses.ContrastiveLoss(**MARGINS), nn.ContrastiveLoss(**MARGINS)
    seen, shares = [], []

    def compare(embeddings, labels, loss):
        exact = losses.ContrastiveLoss(**MARGINS)(embeddings.double(), labels)
        seen.append(float(loss))
        shares.append(float((loss - exact).abs() / tolerances(embeddings, labels)[0]))
        assert shares[-1] <= 1, f"the loss of step {len(seen)} is off by {shares[-1]:.2g} × tolerance"

    train(nn.ContrastiveLoss(**MARGINS), args.iterations, args.seed, compare)
    print(f"{len(seen)} losses equal, {seen[0]:.4f} to {seen[-1]:.4f}; largest error {max(shares):.2g} × tolerance")

    for rows in args.rows:
        torch.manual_seed(args.seed)
        labels = torch.arange(rows, device=args.device) // 16
        centers = F.normalize(torch.randn(rows // 16, 4) @ torch.randn(4, args.dim))  # some of them close
        noise = 0.3 * torch.randn(rows, args.dim) / args.dim**0.5
        embeddings = centers.to(args.device)[labels] + noise.to(args.device)

        exact, allowed = loss_and_gradient(theirs, embeddings.double(), labels), tolerances(embeddings, labels)
        print(f"\nn={rows} d={args.dim} on {args.device}, forward and backward")
        computed = loss_and_gradient(ours, embeddings, labels)
        for name, value, expected, most in zip(("loss", "gradient"), computed, exact, allowed, strict=True):
            share = float(((value - expected).abs() / most).max())
            assert share <= 1, f"{name} is off by {share:.2g} × tolerance"
            print(f"{name} equal: largest error {share:.2g} × tolerance")
        blocks = {"pytorch-metric-learning": theirs, "ssmkernels": ours}
        steps = {name: partial(loss_and_gradient, loss, embeddings, labels) for name, loss in blocks.items()}
        times = time_alternating(steps, device=args.device, seconds=args.seconds)
        for name, step in steps.items():
            extra = peak_extra_bytes(step, device=args.device)
            memory = "?" if extra is None else f"{extra / 2**20:.1f}"
            print(f"{name:24} {1e3 * times[name].median:9.2f} ms   peak extra {memory} MiB")
        print(f"{times['pytorch-metric-learning'].median / times['ssmkernels'].median:.1f} times faster")


if __name__ == "__main__":
    main()
