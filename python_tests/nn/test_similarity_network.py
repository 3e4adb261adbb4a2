# SPDX-License-Identifier: BSD-3-Clause
import math

import pytest
import torch
from torch import nn

from ssmkernels import reference
from ssmkernels.nn import ClassCenters, SimilarityNetwork, draw_class_centers, sample_pairs

INTERACTIONS = ["concat", "absdiff", "product"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def features(rows, dim=6, seed=0):
    return torch.randn(rows, dim, generator=generator(seed))


@pytest.fixture
def make_network():
    def make(interaction="concat", hidden=5):
        torch.manual_seed(0)
        return SimilarityNetwork(6, hidden, interaction)

    return make


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_logits_are_those_of_two_linear_layers(make_network, interaction):
    network, x, y = make_network(interaction), features(4), features(3, seed=1)
    first, second = nn.Linear(network.w1.shape[1], 5), nn.Linear(5, 1)
    first.weight, first.bias = network.w1, network.b1
    second.weight.data, second.bias.data = network.w2.data[None], network.b2.data[None]
    pair = {
        "concat": lambda a, b: torch.cat([a, b]),
        "absdiff": lambda a, b: (a - b).abs(),
        "product": lambda a, b: a * b,
    }[interaction]
    expected = torch.stack([torch.stack([second(first(pair(a, b)).relu())[0] for b in y]) for a in x])
    torch.testing.assert_close(network(x, y), expected)
    pairs = torch.tensor([[3, 0], [1, 2], [3, 0]])
    torch.testing.assert_close(network(x, y, pairs), expected[[3, 1, 3], [0, 2, 0]])


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_parameters_start_as_those_of_linear_layers_do(interaction):
    network = SimilarityNetwork(50, 400, interaction)
    width = 100 if interaction == "concat" else 50
    assert {name: tuple(p.shape) for name, p in network.named_parameters()} == {
        "w1": (400, width),
        "b1": (400,),
        "w2": (400,),
        "b2": (),
    }
    parameters = [p.detach() for p in network.parameters()]
    for parameter, inputs in zip(parameters, (width, width, 400, 400), strict=True):
        bound = 1 / math.sqrt(inputs)
        assert parameter.abs().max() <= bound
        if parameter.numel() > 100:
            assert parameter.abs().max() > 0.9 * bound
            assert float(parameter.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_focal_loss_is_the_ops(make_network):
    network, x = make_network("product"), features(8).requires_grad_()
    labels, pairs = torch.tensor([0, 1, 0, 1, 2, 2, -1, 0]), sample_pairs(4, 30, generator=generator())
    loss = network.focal_loss(x, x, labels, labels, pairs=pairs, alpha=0.4, gamma=1.5)
    parameters = [network.w1, network.b1, network.w2, network.b2]
    expected = reference.pair_focal_loss(
        x,
        x,
        labels,
        labels,
        *parameters,
        interaction="product",
        pairs=pairs,
        alpha=0.4,
        gamma=1.5,
    )
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, [x, *parameters]) for value in (loss, expected)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)
        assert mine.abs().sum() > 0
    assert network.focal_loss(x, x, labels, labels, reduction="none").shape == (8, 8)
    assert network.focal_loss(x, x, labels, labels, ignore_index=-2) != network.focal_loss(x, x, labels, labels)


def test_class_probabilities_do_not_depend_on_the_order_of_a_pair(make_network):
    x, centers = features(4), features(3, seed=1)
    network = make_network()
    assert not torch.allclose(network(x, centers), network(centers, x).t())
    probs = network.class_probabilities(x, centers)
    assert probs.shape == (4, 3)
    torch.testing.assert_close(probs, network.class_probabilities(centers, x).t())
    torch.testing.assert_close(probs, (network(x, centers).sigmoid() + network(centers, x).sigmoid().t()) / 2)
    network = make_network("absdiff")
    torch.testing.assert_close(network.class_probabilities(x, centers), network(x, centers).sigmoid())


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_learns_which_samples_are_of_one_class(interaction):
    """Four clusters; the network has to tell pairs within from pairs across, on samples that it has not seen."""
    torch.manual_seed(0)
    centers = 3 * torch.randn(4, 6)
    labels = torch.arange(4).repeat(16)
    x, unseen = (centers[labels] + 0.3 * torch.randn(64, 6) for _ in range(2))
    network = SimilarityNetwork(6, 32, interaction)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        network.focal_loss(x, x, labels, labels).backward()
        optimizer.step()
    correct = (network(unseen, unseen) > 0) == (labels[:, None] == labels)
    assert correct.float().mean() > 0.97
    drawn = draw_class_centers(x, labels, 4, generator=generator())
    assert (network.class_probabilities(unseen, drawn.features).argmax(dim=1) == labels).float().mean() > 0.95


def test_pairs_are_uniform_over_both_squares_and_never_mixed():
    n, m = 3, 36000
    pairs = sample_pairs(n, m, generator=generator())
    assert pairs.shape == (m, 2)
    assert pairs.dtype == torch.int64
    counts = torch.bincount(pairs[:, 0] * 2 * n + pairs[:, 1], minlength=4 * n * n).reshape(2, n, 2, n)
    assert counts[0, :, 1].sum() == counts[1, :, 0].sum() == 0
    expected = m / (2 * n * n)
    for square in (counts[0, :, 0], counts[1, :, 1]):
        assert (square - expected).abs().max() < 5 * math.sqrt(expected)


def test_pairs_are_those_of_the_generator():
    first, again, other = (sample_pairs(64, 512, generator=generator(seed)) for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
    assert sample_pairs(1, 0).shape == (0, 2)


def test_pairs_of_a_row_with_itself_can_be_left_out():
    """All 2n(n − 1) others come, and as often as each other: 200 draws of each on average, within 5 deviations."""
    n, draws = 4, 200 * 24
    first, second = sample_pairs(n, draws, self_pairs=False, generator=generator()).T
    assert not (first == second).any()
    assert ((first < n) == (second < n)).all()
    counts = torch.bincount(first * 2 * n + second, minlength=4 * n * n)
    assert (counts > 0).sum() == 24
    assert counts[counts > 0].sub(200).abs().max() < 5 * 200**0.5
    first, second = sample_pairs(n, draws, generator=generator()).T
    assert (first == second).any()


def test_centers_are_random_members_of_their_class():
    x, labels = features(40), torch.arange(4).repeat(10)
    seen = [set() for _ in range(4)]
    for seed in range(60):
        drawn = draw_class_centers(x, labels, 4, generator=generator(seed))
        assert drawn.present.all()
        for label, center in enumerate(drawn.features):
            (row,) = (x == center).all(dim=1).nonzero().flatten().tolist()
            assert labels[row] == label
            seen[label].add(row)
    assert all(len(rows) > 7 for rows in seen)
    first, again = (draw_class_centers(x, labels, 4, generator=generator(3)) for _ in range(2))
    assert first.features.equal(again.features)


def test_a_class_that_is_absent_keeps_its_center():
    x, y = features(4), features(2, seed=1)
    first = draw_class_centers(x, torch.tensor([0, 0, 2, 2]), 4, generator=generator())
    assert first.present.tolist() == [True, False, True, False]
    assert (first.features[[1, 3]] == 0).all()
    second = draw_class_centers(y, torch.tensor([1, 2]), 4, first, generator=generator())
    assert second.present.tolist() == [True, True, True, False]
    assert second.features[0].equal(first.features[0])
    assert second.features[1:3].equal(y)
    assert draw_class_centers(y[:0], torch.empty(0, dtype=torch.int64), 4, second) is second


def test_centers_are_constants():
    drawn = draw_class_centers(features(4).requires_grad_(), torch.arange(4), 4, generator=generator())
    assert not drawn.features.requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_pairs(0, 3), "n must be at least 1, got 0"),
        (lambda: sample_pairs(2, -1), "m must be at least 0, got -1"),
        (lambda: sample_pairs(1, 3, self_pairs=False), "n must be at least 2 without self_pairs, got 1"),
        (lambda: draw_class_centers(features(3), torch.arange(2), 4), "labels must have n of features = 3"),
        (lambda: draw_class_centers(features(3), torch.arange(3), 0), "num_classes must be at least 1, got 0"),
        (
            lambda: draw_class_centers(
                features(3), torch.arange(3), 3, ClassCenters(torch.zeros(2, 6), torch.zeros(2) > 0)
            ),
            r"previous must have features \[3, 6\], got shape \[2, 6\]",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
