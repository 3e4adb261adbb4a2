# SPDX-License-Identifier: BSD-3-Clause
import pytest
import torch


@pytest.fixture(scope="session")
def digits():
    """scikit-learn's digits: the kNN graph of the pixels in float64, and the classes."""
    datasets = pytest.importorskip("sklearn.datasets")
    from ssmkernels.graph import knn_graph

    pixels, classes = datasets.load_digits(return_X_y=True)
    return knn_graph(torch.from_numpy(pixels) / 16), torch.from_numpy(classes).long()


@pytest.fixture(scope="session")
def draw_labels():
    """A function: −1 but for a draw of labels, ``counts`` per class, in turn."""

    def draw(classes, seed, counts=(5,)):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.full_like(classes, -1)
        for c in range(int(classes.max()) + 1):
            members = (classes == c).nonzero()[:, 0]
            labels[members[torch.randperm(len(members), generator=generator)[: counts[c % len(counts)]]]] = c
        return labels

    return draw
