# SPDX-License-Identifier: BSD-3-Clause
"""MLSN's similarity loss in a Mean-Teacher loop of plain PyTorch, on scikit-learn's digits with few labels.

The lines marked "+" are all that is added to the loop; the loss is compared with its formula in float64 first.
Run: ``python examples/mean_teacher_similarity.py`` (needs torchvision and scikit-learn).
"""

import argparse
import copy
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from ssmkernels.nn import SimilarityNetwork, sample_pairs


def train(images, labels, is_labeled, *, steps, similarity, seed):
    """Test accuracy in percent after training on the images, of which those in ``is_labeled`` have labels."""
    torch.manual_seed(seed)
    first, second = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, 2)
    student = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.LazyLinear(128))
    classify = nn.Sequential(nn.ReLU(), nn.Linear(128, 10))
    student(images[:1])
    teacher, teacher_classify = copy.deepcopy(student), copy.deepcopy(classify)
    network = SimilarityNetwork(128, 512)  # +
    optimizer = torch.optim.Adam([*student.parameters(), *classify.parameters(), *network.parameters()], lr=1e-3)
    labeled, unlabeled = is_labeled.nonzero()[:, 0], (~is_labeled).nonzero()[:, 0]
    n = 64
    for step in range(steps):
        rows = torch.cat([labeled[torch.randint(len(labeled), (n,))], unlabeled[torch.randint(len(unlabeled), (n,))]])
        noisy = images[rows] + 0.15 * torch.randn_like(images[rows])
        features = student(noisy)
        logits = classify(features)
        with torch.no_grad():
            target = teacher_classify(teacher(images[rows] + 0.15 * torch.randn_like(noisy))).softmax(dim=1)
        ramp = min(1.0, step / (0.4 * steps))
        loss = F.cross_entropy(logits[:n], labels[rows[:n]]) + 10 * ramp * F.mse_loss(logits.softmax(dim=1), target)
        if similarity:  # +
            known = torch.cat([labels[rows[:n]], target[n:].argmax(dim=1)])  # +
            loss = loss + ramp * network.focal_loss(features, features, known, known, pairs=sample_pairs(n, 512))  # +
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for averaged, current in ((teacher, student), (teacher_classify, classify)):
                for a, b in zip(averaged.parameters(), current.parameters(), strict=True):
                    a.lerp_(b, 1 - min(0.99, step / (step + 1)))
    with torch.no_grad():
        predicted = teacher_classify(teacher(images)).argmax(dim=1)
    return 100 * float((predicted == labels)[~is_labeled].float().mean())


def compare_with_formula():
    """The similarity loss of random features against its formula in float64: an MLP on both's features, focal loss."""
    features, labels = torch.randn(128, 128), torch.randint(0, 10, (128,))
    network, pairs = SimilarityNetwork(128, 512), sample_pairs(64, 512)
    loss = float(network.focal_loss(features, features, labels, labels, pairs=pairs).detach())

    w1, b1, w2, b2 = (parameter.detach().double() for parameter in network.parameters())
    both = features.double()[pairs].flatten(1)  # [p, 2d]
    hidden = F.linear(both, w1, b1).relu()
    logits = (hidden @ w2 + b2).requires_grad_()
    same = (labels[pairs[:, 0]] == labels[pairs[:, 1]]).double()
    exact = sigmoid_focal_loss(logits, same, alpha=0.25, gamma=2, reduction="mean")
    # A sum of k terms in float32 may be off by k·2⁻²⁴ of their size, whatever their order: a hidden unit of 2d terms, a
    # logit of h, and a mean of p losses. What a logit is off by counts as often as the loss's slope there says.
    size = 256 * F.linear(both.abs(), w1.abs(), b1.abs()) + 512 * hidden
    (slope,) = torch.autograd.grad(exact, logits)
    allowed = 2**-24 * float(slope.abs() @ (size @ w2.abs()) + len(pairs) * exact.detach())
    share = abs(loss - float(exact.detach())) / allowed
    assert share <= 1, f"the similarity loss is off by {share:.2g} × tolerance"
    print(f"similarity loss equal: {loss:.6f}, error {share:.2g} × tolerance")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, default=2, help="labelled images per class (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="of training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first run (default: %(default)s)")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    compare_with_formula()
    pixels, classes = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(classes)
    seconds = {}
    for similarity in (False, True):
        accuracies, begin = [], time.perf_counter()
        for seed in range(args.seed, args.seed + args.seeds):
            draw = torch.Generator().manual_seed(seed)
            is_labeled = torch.zeros(len(labels), dtype=torch.bool)
            for c in range(10):
                members = (labels == c).nonzero()[:, 0]
                is_labeled[members[torch.randperm(len(members), generator=draw)[: args.labels]]] = True
            accuracies.append(train(images, labels, is_labeled, steps=args.steps, similarity=similarity, seed=seed))
        seconds[similarity] = time.perf_counter() - begin
        name = "Mean Teacher + similarity" if similarity else "Mean Teacher"
        print(f"{name:26} accuracy on the other images, %: {', '.join(f'{accuracy:.1f}' for accuracy in accuracies)}")
    print(f"a step with the similarity loss takes {seconds[True] / seconds[False]:.1f} times as long")


if __name__ == "__main__":
    main()
