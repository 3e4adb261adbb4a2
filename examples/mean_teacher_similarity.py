# SPDX-License-Identifier: BSD-3-Clause
"""MLSN's similarity loss in a Mean-Teacher loop of plain PyTorch, on scikit-learn's digits with few labels.

The lines marked "+" are all that is added to the loop. Run: ``python examples/mean_teacher_similarity.py``.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from ssmkernels.nn import SimilarityNetwork, sample_pairs


def train(images, labels, is_labeled, *, steps, similarity, seed):
    """Test accuracy in percent after training on the images, of which those in ``is_labeled`` have labels."""
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(128))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, default=2, help="labelled images per class (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()

    pixels, classes = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(classes)
    for similarity in (False, True):
        found = []
        for seed in range(args.seeds):
            draw = torch.Generator().manual_seed(seed)
            is_labeled = torch.zeros(len(labels), dtype=torch.bool)
            for c in range(10):
                members = (labels == c).nonzero()[:, 0]
                is_labeled[members[torch.randperm(len(members), generator=draw)[: args.labels]]] = True
            found.append(train(images, labels, is_labeled, steps=args.steps, similarity=similarity, seed=seed))
        name = "Mean Teacher + similarity" if similarity else "Mean Teacher"
        print(f"{name:26} accuracy on the other images, %: {', '.join(f'{each:.1f}' for each in found)}")


if __name__ == "__main__":
    main()
